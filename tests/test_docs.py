"""README, Makefile, presets and results agree."""

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
import torch

import image_jepa as ij
import video_jepa as vj
import world_model as wm

ROOT = Path(__file__).parents[1]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def test_tables_are_those_of_the_results():
    sys.path.insert(0, str(ROOT / "results"))
    import tables

    for page in tables.PAGES:
        assert page.read_text() == tables.renewed(page), "run: make results"


def test_every_command_flag_and_path_exists():
    code = (
        "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S)) + "\n" + "\n".join(re.findall(r"`([^`\n]+)`", README))
    )
    targets = set(re.findall(r"^([a-z_]+):", MAKEFILE, re.M))
    assert (wanted := set(re.findall(r"make ([a-z_]+)", code))) and wanted <= targets
    fields = {f.name.replace("_", "-") for script in (wm, ij, vj) for f in dataclasses.fields(script.Config)}
    flags = {f.removeprefix("no-") for f in re.findall(r"--([a-z][a-z_-]+)", code)} - {"newest"}
    assert flags <= fields | {"help", "nproc_per_node", "nnodes", "node_rank", "rdzv-endpoint"}, flags - fields
    for script in (wm, ij, vj):  # each flag is one of the script that it stands behind
        lines = re.findall(rf"^(?:python|torchrun .*?) {script.SCRIPT}\.py(.*)", code, re.M)
        lines = [shlex.split(line, comments=True) for line in lines if "--resume" not in line]
        assert lines and all(script.parse_args(["--preset", "cpu", *line]) for line in lines)
    for path in re.findall(r"(?:^|[\s`(])((?:kernels|tests|results)/[\w./]+|\w+\.py)", README):
        assert (ROOT / path).exists(), path


def test_make_lists_its_targets():
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True).stdout
    assert all(
        f"make {target} " in shown
        for target in re.findall(r"^\.PHONY: (.*)", MAKEFILE, re.M)[0].split()
        if target != "help"
    )


def example(script) -> str:
    (found,) = (code for code in EXAMPLES if re.search(rf"(import|from) .*\b{script}\b", code))
    return found


def test_every_example_is_tested():
    assert len(EXAMPLES) == 4


def test_example_of_image_features(tmp_path, monkeypatch):
    from torchvision.utils import save_image

    monkeypatch.chdir(ROOT)
    images = ij.draw_digits(32)
    for n, (image, label) in enumerate(zip(images.train[:60], images.train_labels)):
        for part in ("train", "test"):
            path = tmp_path / "data" / part / images.classes[label] / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_image(image / 255, path)
    exec(example("image_jepa").replace("path/to/folder", str(tmp_path / "data")), names := {})
    assert names["classifier"].coef_.shape == (10, 512)


def test_example_of_video(monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(example("video_jepa"), names := {})
    assert names["where"].shape == (8, 5, 8, 8) and names["model"].decode(names["future"]).shape == (8, 5, 64, 64)


def test_example_of_an_agent(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(example("world_model"), names := {})
    assert names["truncated"].all() and names["info"]["success"].all() and "tensor([" in capsys.readouterr().out


def test_demo(tmp_path):
    command = [sys.executable, "results/demo.py", "--out", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0 and "100 % of 12 tasks solved" in ended.stdout, ended.stdout + ended.stderr
    for figure in ("paths.png", "episodes.gif", "rollout.gif", "views.png", "neighbours.png"):
        assert (tmp_path / figure).stat().st_size > 10_000


def test_example_of_kernels():
    encoder = torch.nn.Linear(8, 4)
    exec(example("kernels"), dict(encoder=encoder, batch=torch.randn(16, 8), energy=lambda z: z.square().mean()))
    assert encoder.weight.grad.abs().sum() > 0


def test_the_experiment_applies_and_trains(tmp_path):
    """The README's edit of image_jepa.py, with the flags given there."""
    (diff,) = re.findall(r"```diff\n(.*?)```", README, re.S)
    lines = lambda signs: "".join(line[1:] + "\n" for line in diff.splitlines() if line[0] in signs)
    source = (ROOT / "image_jepa.py").read_text()
    assert source.count(lines(" -")) == 1
    (tmp_path / "edited.py").write_text(source.replace(lines(" -"), lines(" +")))
    (flags,) = re.findall(r"`python image_jepa.py (--epochs 0.6 .*?)`", README)
    flags = [
        "--preset",
        "smoke",
        *flags.split(),
        "--no-evaluate",
        "--run-dir",
        str(tmp_path / "run"),
        "--max-steps",
        "40",
    ]
    command = [sys.executable, tmp_path / "edited.py", *flags, "--log-every", "20"]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    first, last = (json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()[:2])
    assert 0 < last["variance"] < first["variance"] and last["covariance"] > 0


CHANGES = sorted((ROOT / "changes").glob("*.diff"))


@pytest.mark.parametrize("diff", CHANGES, ids=[path.stem for path in CHANGES])
def test_changes_apply_and_train(diff, tmp_path, monkeypatch):
    """Each of the README's changes: at most ten lines, and some steps of preset smoke with it."""
    assert f"`changes/{diff.name}`" in README
    assert sum(line[0] == "+" for line in diff.read_text().splitlines()[2:]) <= 10
    name, part = diff.stem.split("-")
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    subprocess.run(["git", "apply", diff], cwd=tmp_path, check=True)
    spec = importlib.util.spec_from_file_location(f"changed_{name}_{part}", tmp_path / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    settings = dict(image_jepa=dict(evaluate=False), video_jepa=dict(validation_clips=0), world_model=dict(episodes=0))
    settings = settings[name] | dict(run_dir=str(tmp_path / "run"), max_steps=10, log_every=5)
    generator = np.random.default_rng(0)
    pictures = lambda *shape: generator.integers(256, size=shape, dtype=np.uint8)
    if diff.stem == "image_jepa-data":
        labels = np.arange(100) % 4
        parts = dict(train=pictures(100, 3, 32, 32), test=pictures(20, 3, 32, 32))
        np.savez(tmp_path / "mine.npz", train_labels=labels, test_labels=labels[:20], **parts)
        settings |= dict(data=str(tmp_path / "mine.npz"), epochs=100)
    if diff.stem == "video_jepa-data":
        np.save(tmp_path / "mine.npy", pictures(30, 20, 64, 64))
        settings |= dict(data=str(tmp_path / "mine.npy"), epochs=10)
    if diff.stem == "image_jepa-backbone":
        settings |= dict(backbone="mobilenet")
    assert script.train(script.preset("smoke", **settings))["steps"] == 10
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(line["effective_rank"] > 1 for line in lines)


def test_the_notebook_runs(tmp_path):
    """From top to bottom, with a training of one epoch; what is stored with it are pictures alone, and under 1 MB."""
    path = ROOT / "notebooks/tour.ipynb"
    notebook = nbformat.read(path, 4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert path.stat().st_size < 1e6 and all("image/png" in output["data"] for output in outputs) and len(outputs) == 4
    (training,) = (cell for cell in notebook.cells if "epochs=24" in cell.source)
    training.source = training.source.replace("epochs=24", "epochs=1")
    for cell in notebook.cells:
        cell.source = cell.source.replace("runs/tour", str(tmp_path / "tour"))
    nbclient.NotebookClient(notebook, timeout=300, resources=dict(metadata=dict(path=ROOT / "notebooks"))).execute()
    drawn = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(drawn) == 4 and (tmp_path / "tour/summary.json").exists()


@pytest.mark.parametrize("command", [["format", "--check"], ["check"]])
def test_the_tree_is_formatted_and_free_of_lint(command):
    ended = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout
    for path in ROOT.glob("**/*.py"):
        assert ".venv" in path.parts or "fmt: " + "off" not in path.read_text(), path
