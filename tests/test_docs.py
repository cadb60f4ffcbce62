"""README, Makefile, presets and results agree."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

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

    assert README == tables.readme(), "run: make results"


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


def trained(script, folder: Path, **more) -> str:
    """The folder of a run of a few steps."""
    script.train(script.preset("smoke", **{**dict(max_steps=3, run_dir=str(folder)), **more}))
    return repr(str(folder))


def example(script) -> str:
    (found,) = (code for code in EXAMPLES if re.search(rf"(import|from) .*\b{script}\b", code))
    return found


def test_every_example_is_tested():
    assert len(EXAMPLES) == 4


def test_example_of_image_features(tmp_path):
    from torchvision.utils import save_image

    images = ij.draw_digits(32)
    for n, (image, label) in enumerate(zip(images.train[:60], images.train_labels)):
        for part in ("train", "test"):
            path = tmp_path / "data" / part / images.classes[label] / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_image(image / 255, path)
    run = trained(ij, tmp_path / "run", evaluate=False, log_every=1)
    code = example("image_jepa").replace('"runs/image_jepa/cpu-20261126-101500"', run)
    exec(code.replace("path/to/folder", str(tmp_path / "data")), names := {})
    assert names["classifier"].coef_.shape == (10, 8 * 24)


def test_example_of_video(tmp_path):
    run = trained(vj, tmp_path / "run", validation_clips=0, sequences=100, log_every=1)
    code = example("video_jepa").replace('"runs/video_jepa/cpu-20261125-101500"', run)
    exec(code, names := {})
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


@pytest.mark.parametrize("command", [["format", "--check"], ["check"]])
def test_the_tree_is_formatted_and_free_of_lint(command):
    ended = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout
    for path in ROOT.glob("**/*.py"):
        assert ".venv" in path.parts or "fmt: " + "off" not in path.read_text(), path
