"""The README's tables from the summaries in results/, so that no figure is typed by hand.

    python results/tables.py --readme          # write them into README.md
    python results/tables.py runs/a runs/b     # print one of these run folders
"""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PUBLISHED = "| EB-JEPA, published | 1 data-centre GPU | | 97 ± 2 (20 tasks) | | | | 37 (GPU) |"
HEAD = """| run | hardware | training, min | success, % [95 %] (tasks) | ever at the goal, % | random; straight line, % | position error after 1 / 8 / 32 steps, px | s per episode, batched; alone |
|---|---|---|---|---|---|---|---|"""


def row(name: str, s: dict) -> str:
    low, high = s.get("success_interval", ("", ""))
    error = [f"{s['position_error_px'][h - 1]:.1f}" for h in (1, 8, 32)]
    return (
        f"| {name} | {s['device']} | {s['train_seconds'] / 60:.1f} | {s.get('success_rate', '')} [{low}, {high}] ({s.get('episodes', 0)})"
        f" | {s.get('success_rate_any', '')} | {s.get('random_success_rate', '')}; {s.get('straight_line_success_rate', '')} | {' / '.join(error)}"
        f" | {s.get('episode_seconds', '')}; {s.get('episode_seconds_single', '')} |"
    )


def world_model() -> str:
    summaries = [json.loads(p.read_text()) for p in sorted((ROOT / "results/world_model").glob("*.json"))]
    return "\n".join([HEAD, *(row(f"`{s['preset']}`, seed {s['seed']}", s) for s in summaries), PUBLISHED])


def readme() -> str:
    """README.md as it should be: what stands between the markers is replaced."""
    text = (ROOT / "README.md").read_text()
    begin, end = "<!-- world_model -->", "<!-- /world_model -->"
    before, rest = text.split(begin)
    return before + begin + "\n" + world_model() + "\n" + end + rest.split(end)[1]


if __name__ == "__main__":
    if sys.argv[1:] == ["--readme"]:
        (ROOT / "README.md").write_text(readme())
    else:
        runs = [Path(p) for p in sys.argv[1:]]
        print("\n".join([HEAD, *(row(p.name, json.loads((p / "summary.json").read_text())) for p in runs)]))
