"""The commands that fill results/."""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def test_the_gpu_campaign_goes_on_where_it_was_stopped(tmp_path):
    """At smoke size: stopped after one second, then to the end, then nothing left to do."""
    command = [sys.executable, "results/campaign.py", "gpu", "--smoke", "--flags", "--max-steps 4"]
    command += ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    call = lambda *more: subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True)
    stopped = call("--minutes", "0")
    assert stopped.returncode and "3 runs to go: give the same command again" in stopped.stderr
    done = call()
    assert done.returncode == 0 and "all 3 runs" in done.stdout, done.stderr
    for script in ("world_model", "image_jepa", "video_jepa"):
        summary = json.loads((tmp_path / "results" / script / "smoke-0.json").read_text())
        assert summary["preset"] == "smoke" and summary["steps"] == 4
        assert (tmp_path / "results" / script / "smoke-0-curves.png").exists()
    again = call("--minutes", "0")
    assert again.returncode == 0 and "all 3 runs" in again.stdout


def test_a_run_stopped_in_the_middle_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "results"))
    import campaign

    folder = tmp_path / "run"
    flags = ["--preset", "smoke", "--steps", "9000", "--episodes", "0", "--walks", "64"]
    deadline = time.time() + 18  # time to start on a busy machine
    assert campaign.run("world_model", folder, flags, deadline) is None
    step = torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
    assert 0 < step < 9000
    assert campaign.run("world_model", folder, [*flags, "--max-steps", str(step + 5)])["steps"] == step + 5
    assert json.loads((folder / "config.json").read_text())["resume"] is True
