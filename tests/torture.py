"""Kill -9 at random moments, half of them while a checkpoint is being written; the run must end as if nothing had happened.

    python tests/torture.py                     # 20 kills a script: about 20 minutes on 2 cores
    python tests/torture.py video_jepa 5        # 5 kills of one script

Weights, optimiser and every logged loss are compared bit for bit with those of a run that nobody touched.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).parents[1]
FLAGS = {
    "world_model": ["--steps", "3000", "--episodes", "0", "--walks", "64"],
    "image_jepa": ["--epochs", "9", "--batch-size", "16", "--width", "8", "--no-evaluate"],
    "video_jepa": [
        "--epochs",
        "30",
        "--sequences",
        "100",
        "--batch-size",
        "4",
        "--predictor-width",
        "16",
        "--validation-clips",
        "0",
    ],
}
EVERY = 5  # steps between checkpoints


def start(script: str, folder: Path) -> subprocess.Popen:
    """The run in the folder, from its checkpoint if there is one."""
    flags = ["--resume"] if any(folder.glob("*.pt")) else ["--preset", "smoke", *FLAGS[script]]
    if "--resume" not in flags:
        shutil.rmtree(folder, ignore_errors=True)
    flags += ["--save-every", "0", "--log-every", str(EVERY), "--run-dir", str(folder)]
    command = [sys.executable, f"{script}.py", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finished(run: subprocess.Popen) -> None:
    _, error = run.communicate()
    assert run.returncode == 0, error


def state(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def losses(folder: Path) -> dict[int, dict]:
    """What was logged, by step; of steps that were logged twice, the last."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: {k: v for k, v in r.items() if k != "milliseconds"} for r in records}


def torture(script: str, kills: int, chance: random.Random, folder: Path) -> None:
    finished(start(script, folder / "whole"))
    parts, reached, writing, killed = folder / "parts", 0, 0, 0
    for n in range(kills):
        run = start(script, parts)
        temporary = parts / "checkpoint.tmp"
        deadline = time.time() + chance.uniform(2, 12)
        while time.time() < deadline and run.poll() is None:
            time.sleep(0.001)
        while n % 2 and run.poll() is None and not temporary.exists():  # the next time that it writes
            time.sleep(0.0002)
        if run.poll() is not None:  # it came to its end: FLAGS should make it longer
            assert run.returncode == 0, run.stderr.read()
            break
        writing += temporary.exists()
        run.kill()
        run.communicate()
        killed += 1
        if any(parts.glob("*.pt")):
            step = state(parts)["step"]
            assert step >= reached and step % EVERY == 0, f"{script}: step {step} after {reached}"
            reached = step
        print(f"{script}: kill {killed} of {kills}, {writing} while writing, step {reached}", flush=True)
    finished(start(script, parts))
    one, two = state(folder / "whole"), state(parts)
    assert all(same(one[key], two[key]) for key in one if key not in ("config", "seconds")), f"{script}: another end"
    assert losses(folder / "whole") == losses(parts), f"{script}: other losses"
    print(f"{script}: {killed} kills, {writing} while writing; the end is the same bit for bit", flush=True)


if __name__ == "__main__":
    names = [a for a in sys.argv[1:] if a in FLAGS] or list(FLAGS)
    numbers = [int(a) for a in sys.argv[1:] if a.isdigit()]
    os.environ["PYTHONPATH"] = str(ROOT)
    for name in names:
        with TemporaryDirectory() as scratch:
            torture(name, numbers[0] if numbers else 20, random.Random(0), Path(scratch))
