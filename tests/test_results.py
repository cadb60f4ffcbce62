"""The commands that fill results/."""
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_gpu_campaign_goes_on_where_it_was_stopped(tmp_path):
    """At smoke size: stopped after four seconds, then to the end, then nothing left to do."""
    command = [sys.executable, "results/campaign.py", "gpu", "--smoke", "--flags", "--max-steps 4"]
    command += ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    call = lambda *more: subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True)
    stopped = call("--minutes", "0.4")
    assert stopped.returncode and "3 runs to go: give the same command again" in stopped.stderr
    done = call()
    assert done.returncode == 0 and "all 3 runs" in done.stdout, done.stderr
    for script in ("world_model", "image_jepa", "video_jepa"):
        summary = json.loads((tmp_path / "results" / script / "smoke-0.json").read_text())
        assert summary["preset"] == "smoke" and summary["steps"] == 4
        assert (tmp_path / "results" / script / "smoke-0-curves.png").exists()
    again = call("--minutes", "0.4")
    assert again.returncode == 0 and "all 3 runs" in again.stdout
