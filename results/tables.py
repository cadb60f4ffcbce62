"""The README's tables from the summaries in results/, so that no figure is typed by hand.

    python results/tables.py --readme          # write them into README.md
    python results/tables.py runs/a runs/b     # print a table of these run folders
"""
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORLD_MODEL = """| run | hardware | training, min | success, % [95 %] (tasks) | ever at the goal, % | random; straight line, % | position error after 1 / 8 / 32 steps, px | s per episode, batched; alone |
|---|---|---|---|---|---|---|---|"""
IMAGE_JEPA = """| run | data | hardware | training, min (epochs) | linear probe, % | online probe, % | kNN, k = 20; 200, % | untrained encoder, linear; kNN, % | effective rank |
|---|---|---|---|---|---|---|---|---|"""
PUBLISHED = {
    "world_model": ["| EB-JEPA, published | 1 data-centre GPU | | 97 ± 2 (20 tasks) | | | | 37 (GPU) |"],
    "image_jepa": [
        "| EB-JEPA, published, VICReg | CIFAR-10 | 1 GPU | a few hours (300) | | 90.12 | | | |",
        "| EB-JEPA, published, SIGReg | CIFAR-10 | 1 GPU | a few hours (300) | | 91.02 | | | |",
    ],
}


def world_model(name: str, s: dict) -> str:
    low, high = s.get("success_interval", ("", ""))
    error = [f"{s['position_error_px'][h - 1]:.1f}" for h in (1, 8, 32)]
    return (
        f"| {name} | {s['device']} | {s['train_seconds'] / 60:.1f} | {s.get('success_rate', '')} [{low}, {high}] ({s.get('episodes', 0)})"
        f" | {s.get('success_rate_any', '')} | {s.get('random_success_rate', '')}; {s.get('straight_line_success_rate', '')} | {' / '.join(error)}"
        f" | {s.get('episode_seconds', '')}; {s.get('episode_seconds_single', '')} |"
    )


def image_jepa(name: str, s: dict) -> str:
    return (
        f"| {name}, {s['loss']} | {s.get('data_name', s['data'])} | {s['device']} | {s['train_seconds'] / 60:.1f} ({s['epochs']:.2g}) | {s['linear_accuracy']}"
        f" | {s['online_accuracy']} | {s['knn20_accuracy']}; {s['knn_accuracy']} | {s['random_encoder_accuracy']}; {s['random_encoder_knn_accuracy']}"
        f" | {s['effective_rank']:.0f} |"
    )


HEAD, ROW, MAIN = dict(world_model=WORLD_MODEL, image_jepa=IMAGE_JEPA), dict(world_model=world_model, image_jepa=image_jepa), dict(world_model="success_rate", image_jepa="linear_accuracy")


def script_of(summary: dict) -> str:
    return "image_jepa" if "loss" in summary else "world_model"


def table(script: str) -> str:
    """Rows of results/<script>/*.json, the mean over seeds of each preset, the published figures."""
    summaries = [json.loads(p.read_text()) for p in sorted((ROOT / "results" / script).glob("*.json"))]
    lines = [HEAD[script], *(ROW[script](f"`{s['preset']}`, seed {s['seed']}", s) for s in summaries), *PUBLISHED[script]]
    for preset in dict.fromkeys(s["preset"] for s in summaries):
        values = [s[MAIN[script]] for s in summaries if s["preset"] == preset]
        if len(values) > 1:
            what = MAIN[script].replace("_", " ")
            lines += ["", f"`{preset}`, {len(values)} seeds: {what} {statistics.mean(values):.1f} % (standard deviation {statistics.stdev(values):.1f})."]
    return "\n".join(lines)


def readme() -> str:
    """README.md as it should be: what stands between the markers is replaced."""
    text = (ROOT / "README.md").read_text()
    for script in ROW:
        begin, end = f"<!-- {script} -->", f"<!-- /{script} -->"
        before, rest = text.split(begin)
        text = before + begin + "\n" + table(script) + "\n" + end + rest.split(end)[1]
    return text


if __name__ == "__main__":
    if sys.argv[1:] == ["--readme"]:
        (ROOT / "README.md").write_text(readme())
    else:
        runs = {Path(p).name: json.loads((Path(p) / "summary.json").read_text()) for p in sys.argv[1:]}
        script = script_of(next(iter(runs.values())))
        print("\n".join([HEAD[script], *(ROW[script](name, s) for name, s in runs.items())]))
