"""Resume, kills, damaged checkpoints and bad input: what a person sees, and that nothing is lost."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import world_model as wm
from world_model import preset

ROOT = Path(__file__).parents[1]
FAST = dict(episodes=0, distance_steps=0, cost="latent", steps=24, log_every=6, checkpoint_every=6)


def command(*flags, timeout=120, cwd=ROOT):
    argv = [sys.executable, str(ROOT / "world_model.py"), "--preset", "smoke", *map(str, flags)]
    return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=timeout, env={**os.environ, "PYTHONPATH": str(ROOT)})


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_resume_is_exact_bit_for_bit(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    wm.train(preset("smoke", **FAST, run_dir=str(whole)))
    for stop in (7, 17, 0):  # not at a checkpoint, not at a block of data, to the end
        wm.train(preset("smoke", **FAST, run_dir=str(parts), resume=stop != 7, max_steps=stop))
    a, b = checkpoint(whole), checkpoint(parts)
    for key in ("model", "optimizer", "step", "rng"):
        assert_same(a[key], b[key])
    losses = [[json.loads(line)["loss"] for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (whole, parts)]
    assert losses[0] == [x for x in losses[1] if x in losses[0]] and len(losses[0]) == 4


def test_the_distance_is_the_same_when_learnt_again(tmp_path):
    flags = dict(steps=6, log_every=6, checkpoint_every=6, episodes=0, run_dir=str(tmp_path / "run"))
    wm.train(preset("smoke", **flags))
    first = checkpoint(tmp_path / "run")["model"]
    wm.train(preset("smoke", **flags, resume=True))
    assert_same(first, checkpoint(tmp_path / "run")["model"])


def test_kill_9_loses_at_most_the_steps_since_the_last_checkpoint(tmp_path):
    folder = tmp_path / "run"
    argv = [sys.executable, "world_model.py", "--preset", "smoke", "--steps", "4000", "--checkpoint-every", "5", "--run-dir", str(folder)]
    reached = 0
    for n in range(3):
        run = subprocess.Popen(argv + ["--resume"] * (n > 0), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        until = time.time() + 60
        while time.time() < until and run.poll() is None:
            if (folder / "checkpoint.pt").exists() and checkpoint(folder)["step"] > reached:
                break
            time.sleep(0.05)
        time.sleep(0.13 * n)
        run.kill()
        _, error = run.communicate()
        assert run.returncode == -signal.SIGKILL, error
        step = checkpoint(folder)["step"]
        assert step > reached and step % 5 == 0
        reached = step


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_say_so(tmp_path, number):
    folder = tmp_path / "run"
    argv = [sys.executable, "world_model.py", "--preset", "smoke", "--steps", "4000", "--checkpoint-every", "4000", "--run-dir", str(folder)]
    run = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.time() + 60
    while time.time() < until and not ((folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size):
        time.sleep(0.05)
    run.send_signal(number)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 128 + number and "--resume" in error and "Traceback" not in error
    assert checkpoint(folder)["step"] > 0


def test_damaged_and_foreign_checkpoints(tmp_path):
    folder = tmp_path / "run"
    wm.train(preset("smoke", **FAST, run_dir=str(folder), max_steps=12))
    good = (folder / "checkpoint.pt").read_bytes()
    assert checkpoint(folder)["step"] == 12 and torch.load(folder / "previous.pt", weights_only=True)["step"] == 6
    for tenth in range(10):
        (folder / "checkpoint.pt").write_bytes(good[: len(good) * tenth // 10])
        with pytest.raises(wm.UserError, match="previous.pt"):
            wm.load(folder)
    torch.save(dict(format="nanojepa/image_jepa/1"), folder / "checkpoint.pt")
    with pytest.raises(wm.UserError, match="not a checkpoint of this script"):
        wm.load(folder)

    class Malice:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "hacked"),))

    torch.save(Malice(), folder / "checkpoint.pt")
    with pytest.raises(wm.UserError, match="damaged"):
        wm.load(folder)
    assert not (tmp_path / "hacked").exists()
    (folder / "checkpoint.pt").write_bytes(good)
    with pytest.raises(wm.UserError, match="latent_dim"):
        wm.train(preset("smoke", **FAST, run_dir=str(folder), resume=True, latent_dim=48))


BAD = [  # field, value, what the line must say
    ("batch_size", 1, "variance"), ("batch_size", 0, "batch-size"), ("clip_frames", 8, "rollout"), ("clip_frames", 92, "trajectory"),
    ("elites", 17, "samples"), ("samples", 1, "samples"), ("smooth", 1.0, "smooth"), ("lr", float("nan"), "lr"), ("lr", 0.0, "lr"),
    ("variance_weight", -1.0, "variance-weight"), ("temperature", 0.0, "temperature"), ("horizon", 0, "horizon"), ("steps", 0, "steps"),
    ("rollout", 0, "rollout"), ("latent_dim", 1, "latent-dim"), ("slow_features", 32, "slow-features"), ("channels", (8, 0, 8), "channels"),
    ("ablate", ("distance",), "cost latent"), ("grad_clip", float("inf"), "grad-clip"), ("join", 0.0, "join"), ("replan_every", 0, "replan"),
    ("preset", "best", "preset"),
]  # fmt: skip


@pytest.mark.parametrize("field,value,said", BAD)
def test_impossible_values(field, value, said, tmp_path):
    with pytest.raises(wm.UserError, match=said):
        wm.train(preset(**{"name": "smoke", "run_dir": str(tmp_path / "run"), **({"name": value} if field == "preset" else {field: value})}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags,said",
    [
        (["--stepz", "3"], "stepz"), (["--steps", "many"], "steps"), (["--preset", "best"], "best"), (["--ablate", "everything"], "ablate"),
        (["--resume", "--run-dir", "nowhere"], "no run"), (["--resume", "--overwrite"], "exclude"), (["--device", "cuda"], "no such device"),
    ],
)  # fmt: skip
def test_bad_flags_give_one_line(flags, said, tmp_path):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    ended = command(*flags, cwd=tmp_path)
    assert ended.returncode == 2 and said in ended.stderr and "Traceback" not in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_run_is_never_written_over(tmp_path):
    folder = tmp_path / "run"
    wm.train(preset("smoke", **FAST, run_dir=str(folder), max_steps=6))
    before = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(wm.UserError, match="--overwrite"):
        wm.train(preset("smoke", **FAST, run_dir=str(folder)))
    assert (folder / "checkpoint.pt").read_bytes() == before
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(wm.UserError, match="other things"):
        wm.train(preset("smoke", **FAST, run_dir=str(other), overwrite=True))
    assert (other / "thesis.tex").exists()


def test_nan_is_named_and_the_checkpoint_kept(tmp_path, monkeypatch):
    folder, real = tmp_path / "run", wm.update

    def poisoned(model, optimizer, cfg, lr):
        real(model, optimizer, cfg, lr)
        if optimizer.state[next(iter(model.inverse_dynamics.parameters()))]["step"] == 9:
            next(iter(model.inverse_dynamics.parameters())).data[0, 0] = torch.nan

    monkeypatch.setattr(wm, "update", poisoned)
    with pytest.raises(wm.UserError, match="step 9 in inverse_dynamics"):
        wm.train(preset("smoke", **FAST, run_dir=str(folder)))
    assert checkpoint(folder)["step"] == 6
    assert all(p.isfinite().all() for p in checkpoint(folder)["model"].values())


def test_two_processes_give_the_gradients_of_one(tmp_path):
    code = """
import os, sys, torch, torch.distributed as dist, world_model as wm
dist.init_process_group("gloo") if "RANK" in os.environ else None
rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
cfg = wm.preset("smoke", batch_size=8)
torch.manual_seed(0)
model = wm.WorldModel(cfg).double()
batch = wm.ClipStream(cfg, torch.device("cpu"), rank, world)(0)
batch = wm.Trajectories(batch.position.double(), batch.action.double(), wm.Layout(*(x.double() for x in batch.layout)))
model.encoder.forward = lambda obs, e=model.encoder: e.norm(e.linear(torch.relu(e.cnn(obs[:, :, ::2, ::2][:, :, :32, :32].double() / 99)).flatten(1)))
wm.metric = lambda a, b: ((a - b).square().sum(-1) + 1e-6).sqrt()
wm.losses(model, cfg, batch)[0].backward()
grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
if dist.is_initialized():
    dist.all_reduce(grads)
if rank == 0:
    torch.save(grads, sys.argv[1])
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
"""
    (tmp_path / "grads.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, tmp_path / "grads.py", tmp_path / "one.pt"], check=True, env=env)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=2"]
    ended = subprocess.run([*launch, tmp_path / "grads.py", tmp_path / "two.pt"], env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    one, two = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    # the terms are means taken in float32
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6 * one.abs().max().item())
