"""The tables of the project's and of results' README from the summaries in results/: no figure is typed by hand.

python results/tables.py --readme          # write them into both
python results/tables.py runs/a runs/b     # print a table of these run folders
"""

import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COLUMNS = {  # heading -> its cell, from a summary
    "world_model": {
        "run": "{name}",
        "hardware": "{device}",
        "training, min": "{minutes:.1f}",
        "success, % [95 %] (tasks)": "{success_rate:.1f} {success_interval} ({episodes})",
        "ever at the goal, %": "{success_rate_any:.1f}",
        "published 20 tasks, %": "{published_tasks_success_rate:.0f}",
        "random; straight line; untrained, %": "{random_success_rate:.0f}; {straight_line_success_rate:.0f}; "
        "{untrained_success_rate:.0f}",
        "s per episode": "{episode_seconds:.2f}",
    },
    "image_jepa": {
        "run": "{name}, {loss}",
        "data": "{data_name}",
        "hardware": "{device}",
        "training, min (epochs)": "{minutes:.1f} ({epochs:.2g})",
        "linear probe, %": "{linear_accuracy}",
        "online probe, %": "{online_accuracy}",
        "kNN, %": "{knn_accuracy}",
        "untrained encoder, linear; kNN, %": "{untrained_linear_accuracy}; {untrained_knn_accuracy}",
        "effective rank": "{effective_rank:.0f}",
    },
    "video_jepa": {
        "run": "{name}",
        "data": "{data_name}",
        "hardware": "{device}",
        "training, min": "{minutes:.1f}",
        "mAP, parallel (AP 1 .. 7 frames ahead)": "{map_parallel:.3f} ({ap_parallel[0]:.2f} .. {ap_parallel[6]:.2f})",
        "mAP, autoregressive": "{map_autoregressive:.3f}",
        "baseline: last true frame": "{map_last_frame:.3f}",
        "true frames": "{map_true_frames:.3f}",
    },
}
PUBLISHED = {
    "world_model": ["| EB-JEPA, published | 1 data-centre GPU | | | | 97 ± 2 | | 37 (GPU) |"],
    "image_jepa": [
        "| EB-JEPA, published, VICReg | CIFAR-10 | 1 GPU | a few hours (300) | | 90.12 | | | |",
        "| EB-JEPA, published, SIGReg | CIFAR-10 | 1 GPU | a few hours (300) | | 91.02 | | | |",
    ],
    "video_jepa": ["| EB-JEPA, published | Moving MNIST | 1 GPU | | .607 (.76 .. .40) | | | |"],
}
MAIN = {  # the figures that stand for a run: their names -> key of the summary, how it is written
    "world_model": {"success": ("success_rate", "{:.1f} %")},
    "image_jepa": {"linear probe": ("linear_accuracy", "{:.1f} %")},
    "video_jepa": {
        "mAP, parallel": ("map_parallel", "{:.3f}"),
        "mAP, autoregressive": ("map_autoregressive", "{:.3f}"),
    },
}


def script_of(summary: dict) -> str:
    return summary["script"]


def row(name: str, s: dict) -> str:
    script = script_of(s)
    more = dict(name=name, minutes=s["train_seconds"] / 60, data_name=s.get("data_name", s.get("data")))
    return "| " + " | ".join(cell.format(**{**s, **more}) for cell in COLUMNS[script].values()) + " |"


def head(script: str) -> str:
    return "| " + " | ".join(COLUMNS[script]) + " |\n" + "|---" * len(COLUMNS[script]) + "|"


def table(script: str) -> str:
    """Rows of results/<script>/*.json, the published figures, the mean over seeds of each preset."""
    summaries = [json.loads(p.read_text()) for p in sorted((ROOT / "results" / script).glob("*.json"))]
    lines = [head(script), *(row(f"`{s['preset']}`, seed {s['seed']}", s) for s in summaries), *PUBLISHED[script]]
    kind = lambda s: (s["preset"], s.get("loss", ""))
    for preset, loss in dict.fromkeys(map(kind, summaries)):
        seeds, found = [s for s in summaries if kind(s) == (preset, loss)], []
        for name, (key, form) in MAIN[script].items() if len(seeds) > 1 else ():
            values = [s[key] for s in seeds]
            mean, deviation = form.format(statistics.mean(values)), form.format(statistics.stdev(values))
            found.append(f"{name} {mean} (standard deviation {deviation})")
        lines += ["", f"`{preset}`, {len(seeds)} seeds: {', '.join(found)}."] if found else []
    return "\n".join(lines)


def kernels() -> str:
    """Milliseconds of results/kernels/*.json: as usually written, compiled, ours."""
    lines = [
        "| kernel, size | hardware | eager, ms | torch.compile, ms | ours, ms | eager / ours |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted((ROOT / "results/kernels").glob("*.json")):
        bench = json.loads(path.read_text())
        for r in bench["rows"]:
            ms = {way: entry["both"]["median"] for way, entry in r["ways"].items() if "both" in entry}
            cells = [f"{ms[way]:.3g}" if way in ms else "" for way in ("eager", "compiled", "ours")]
            ratio = f"{ms['eager'] / ms['ours']:.1f}"
            lines.append(
                f"| `{r['kernel']}` {r['size']} ({r['unit']}) | {bench['device']} | {' | '.join(cells)} | {ratio} |"
            )
    return "\n".join(lines)


def ablations() -> str:
    """results/ablations.json, one table a script: a run, the main figure, its published counterpart."""
    path, parts = ROOT / "results/ablations.json", []
    for script, record in (json.loads(path.read_text()) if path.exists() else {}).items():
        main, flags = MAIN[script], record["flags"]
        names = " | ".join(main)
        lines = [f"| `{script}.py`, {flags} | {names} | effective rank | published |", "|---" * (len(main) + 3) + "|"]
        for name, r in record["runs"].items():
            figures = " | ".join(form.format(r[key]) for key, form in main.values())
            lines.append(f"| {name} | {figures} | {r['effective_rank']:.1f} | {r['published']} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


PAGES = [ROOT / "README.md", ROOT / "results/README.md"]


def renewed(page: Path) -> str:
    """A page as it should be: what stands between its markers is replaced."""
    text = page.read_text()
    made = {script: table(script) for script in COLUMNS} | dict(kernels=kernels(), ablations=ablations())
    for name, content in made.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if begin in text:
            before, rest = text.split(begin)
            text = before + begin + "\n" + content + "\n" + end + rest.split(end)[1]
    return text


if __name__ == "__main__":
    if sys.argv[1:] == ["--readme"]:
        for page in PAGES:
            page.write_text(renewed(page))
    else:
        runs = {Path(p).name: json.loads((Path(p) / "summary.json").read_text()) for p in sys.argv[1:]}
        print(head(script_of(next(iter(runs.values())))), *(row(name, s) for name, s in runs.items()), sep="\n")
