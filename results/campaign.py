"""Many runs in one command that goes on where it was stopped.

    python results/campaign.py ablations          # the cpu presets, shortened, one thing changed at a time
    python results/campaign.py ablations image_jepa --data data/cifar10    # of one script; a flag for each of its runs
    python results/campaign.py gpu --minutes 9    # on a GPU: benchmark, presets gpu and paper; again until done

Ablations go to results/ablations.json, the summaries and figures of the others to results/<script>/. What has ended is
not run again, whatever has changed in flags or code since: remove its folder under runs/ first.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# script -> flags of every run, {run: (its flags, published figure or "")}, figures that are kept
ABLATIONS = {
    "world_model": (
        ["--steps", "1000", "--episodes", "200"],
        {
            "preset cpu, without similarity": ([], "61"),
            "with similarity": (["--similarity-weight", "12"], "97"),
            "no variance": (["--variance-weight", "0"], "47"),
            "no covariance": (["--covariance-weight", "0"], "46"),
            "no inverse dynamics": (["--inverse-weight", "0"], "1"),
            "one step instead of four": (["--rollout", "1"], ""),
            "latent cost": (["--cost", "latent"], ""),
            "AdamW": (["--optimizer", "adamw", "--lr", "0.0015"], ""),
        },
        ("success_rate", "success_interval", "effective_rank", "train_seconds"),
    ),
    "image_jepa": (
        ["--epochs", "0.6", "--warmup-epochs", "0.05"],
        {
            "VICReg": ([], "90.12"),
            "VICReg, no projector": (["--projector-width", "0"], "87.27"),
            "VICReg, variance 100, covariance 100": (["--variance-weight", "100", "--covariance-weight", "100"], ""),
            "SIGReg": (["--loss", "sigreg", "--projector-out", "128"], "91.02"),
            "SIGReg, weight 0.1": (["--loss", "sigreg", "--projector-out", "128", "--sigreg-weight", "0.1"], ""),
        },
        ("linear_accuracy", "knn_accuracy", "effective_rank", "train_seconds"),
    ),
    "video_jepa": (
        ["--sequences", "2500", "--epochs", "1.2", "--validation-clips", "512"],
        {
            "K = 4": ([], ".607"),
            "K = 1": (["--rounds", "1"], ".385"),
            "K = 2": (["--rounds", "2"], ".524"),
            "K = 8": (["--rounds", "8"], ".595"),
            "variance 1, covariance 1": (["--variance-weight", "1", "--covariance-weight", "1"], ".259"),
            "variance 0.1, covariance 0.1": (["--variance-weight", "0.1", "--covariance-weight", "0.1"], ""),
            "no hidden state": (["--hidden-dim", "0"], ""),
            "positions not centred": (["--no-centre-positions"], ""),
            "batch norm": (["--norm", "batch"], ""),
        },
        ("map_parallel", "map_autoregressive", "ap_parallel", "effective_rank", "train_seconds"),
    ),
}

GPU = [  # in the order of worth: script, name of the run, flags
    *(("world_model", f"gpu-{seed}", ["--preset", "gpu", "--seed", str(seed)]) for seed in range(3)),
    ("world_model", "paper-0", ["--preset", "paper", "--episodes", "20"]),  # evaluation cannot be stopped and resumed
    *(("image_jepa", f"gpu-{seed}", ["--preset", "gpu", "--seed", str(seed)]) for seed in range(3)),
    *(("image_jepa", f"paper-{loss}-0", ["--preset", "paper", "--loss", loss]) for loss in ("sigreg", "vicreg")),
    *(("video_jepa", f"gpu-{seed}", ["--preset", "gpu", "--seed", str(seed)]) for seed in range(3)),
    ("video_jepa", "paper-0", ["--preset", "paper", "--data", "moving-mnist"]),  # the published task
]


def run(script: str, folder: Path, flags: list[str], deadline: float = float("inf")) -> dict | None:
    """The summary of a run; trained if it is not there, resumed if it was stopped. None: stopped at the deadline."""
    if not (folder / "summary.json").exists():
        started = ["--resume"] if any(folder.glob("*.pt")) else []
        if not started:
            shutil.rmtree(folder, ignore_errors=True)  # stopped before its first checkpoint
        command = [sys.executable, f"{script}.py", *flags, *started, "--run-dir", str(folder)]
        process = subprocess.Popen(command, cwd=ROOT)
        try:
            code = process.wait(None if deadline == float("inf") else max(1, deadline - time.time()))
        except subprocess.TimeoutExpired:
            process.terminate()  # it saves a checkpoint
            process.wait()
            return None
        if code:
            sys.exit(f"{folder} ended with code {code}")
    return json.loads((folder / "summary.json").read_text())


def ablations(arguments: list[str]) -> None:
    scripts = [a for a in arguments if a in ABLATIONS]
    for script in scripts or ABLATIONS:
        common, runs, kept = ABLATIONS[script]
        common, rows = ["--preset", "cpu", *common, *(a for a in arguments if a not in scripts)], {}
        for name, (flags, published) in runs.items():
            folder = ROOT / "runs" / script / ("ablation " + name).replace(" ", "-").replace(",", "")
            summary = run(script, folder, [*common, *flags])
            last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
            rows[name] = {key: (last | summary)[key] for key in kept} | dict(published=published)
            print(f"{name:<40}{rows[name]}", flush=True)
        path = ROOT / "results/ablations.json"
        record = json.loads(path.read_text()) if path.exists() else {}
        record[script] = dict(flags=" ".join(common), device=summary["device"], runs=rows)
        path.write_text(json.dumps(record, indent=1))
        if script == "video_jepa":
            draw_horizons(rows)


def draw_horizons(rows: dict[str, dict]) -> None:
    """results/video_jepa/recipe.png: what each choice changes, by the number of frames predicted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for n, (name, row) in enumerate(rows.items()):
        style = dict(marker="osD^v<>pX*"[n % 10], color=f"C{n % 10}", lw=2.5 if n == 0 else 1)
        axis.plot(range(1, 8), row["ap_parallel"], label=f"{name}: {row['map_parallel']:.2f}", **style)
    axis.set(xlabel="frames ahead", ylabel="average precision, parallel rollout")
    axis.grid(alpha=0.3)
    axis.legend(
        fontsize=8, title="run: mAP", title_fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False
    )
    figure.savefig(ROOT / "results/video_jepa/recipe.png", dpi=110)


def keep(script: str, name: str, folder: Path, results: Path, **facts) -> None:
    """The summary, and of the first seed the figures, into results/<script>/."""
    target = results / script
    target.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, ROOT / "results/draw.py", folder], check=True)
    summary = json.loads((folder / "summary.json").read_text())
    (target / f"{name}.json").write_text(json.dumps(summary | facts, indent=1))
    for figure in [*folder.glob("*.png"), *folder.glob("*.gif")] if name.endswith("-0") else []:
        shutil.copy(figure, target / f"{name}-{figure.name}")


def gpu(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=9.0, help="stop after so long; the next call goes on")
    parser.add_argument("--data", default="cifar10", help="of image_jepa: cifar10, or a folder of it")
    parser.add_argument("--data-name", default="", help="what it is called in results/")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/campaign")
    parser.add_argument("--flags", default="", help="more flags for every run")
    parser.add_argument("--smoke", action="store_true", help="the smoke presets, one seed: to see that all of it works")
    a = parser.parse_args(arguments)
    deadline = time.time() + 60 * a.minutes - 20
    bench = a.results / "kernels/bench.json"
    if not a.smoke and not bench.exists():
        bench.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "kernels.bench", "--json", str(bench)], cwd=ROOT, check=True)
    failed = []
    jobs = [(s, "smoke-0", ["--preset", "smoke"]) for s in ABLATIONS] if a.smoke else GPU
    for n, (script, name, flags) in enumerate(jobs):
        if (a.results / script / f"{name}.json").exists():
            continue
        data = ["--data", a.data] if script == "image_jepa" and not a.smoke else []
        folder = a.runs / f"{script}-{name}"
        try:
            summary = run(script, folder, [*flags, *data, *a.flags.split()], deadline)
        except SystemExit as error:  # the others may do better
            failed.append(str(error))
            continue
        if summary is None:
            sys.exit(f"stopped in {script} {name}, {len(jobs) - n} runs to go: give the same command again")
        keep(script, name, folder, a.results, **(dict(data_name=a.data_name) if a.data_name and data else {}))
    if failed:
        sys.exit("\n".join(failed))
    print(f"all {len(jobs)} runs are in {a.results}; the README's tables: make results")


if __name__ == "__main__":
    commands = dict(ablations=ablations, gpu=gpu)
    if sys.argv[1:2] and sys.argv[1] in commands:
        commands[sys.argv[1]](sys.argv[2:])
    else:
        sys.exit(__doc__)
