"""Resume, kills, damaged checkpoints and bad input of world_model.py: what a person sees, and that nothing is lost."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import assert_same, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import world_model as wm

ROOT = Path(__file__).parents[1]
EVERY6 = dict(log_every=6, checkpoint_every=6)
FAST = {  # 24 steps and no evaluation
    wm: dict(episodes=0, distance_steps=0, cost="latent", steps=24, **EVERY6),
}
ENDLESS = {wm: ["--steps", "4000"]}
scripts = pytest.mark.parametrize("script", [wm], ids=lambda s: s.SCRIPT)


def fast(script, folder, **more):
    return script.preset("smoke", **{**FAST[script], "run_dir": str(folder), **more})


def start(script, *flags, cwd=ROOT):
    argv = [sys.executable, str(ROOT / f"{script.SCRIPT}.py"), "--preset", "smoke", *map(str, flags)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(argv, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def checkpoint(folder):
    """The last one; after a stop between the two renames of a save, that is still called previous.pt."""
    try:
        return torch.load(folder / "checkpoint.pt", weights_only=True)
    except FileNotFoundError:
        return torch.load(folder / "previous.pt", weights_only=True)


@scripts
def test_resume_is_exact_bit_for_bit(script, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    script.train(fast(script, whole))
    for stop in (7, 17, 0):  # not at a checkpoint, not at a block of data, to the end
        script.train(fast(script, parts, resume=stop != 7, max_steps=stop))
    a, b = checkpoint(whole), checkpoint(parts)
    assert a["step"] == 24
    for key in ("model", "optimizer", "step", "rng"):
        assert_same(a[key], b[key])
    records = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (whole, parts)]
    losses = [[r["loss"] for r in of_run if "loss" in r] for of_run in records]
    assert losses[0] == [x for x in losses[1] if x in losses[0]] and len(losses[0]) == 4


@scripts
def test_resume_is_exact_when_compiled(script, tmp_path):
    small = dict(rollout=1)
    settings = lambda folder, **more: fast(script, tmp_path / folder, compile=True, **small, **more)
    script.train(settings("whole", max_steps=12))
    script.train(settings("parts", max_steps=7))
    torch._dynamo.reset()
    script.train(settings("parts", max_steps=12, resume=True))
    a, b = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    for key in ("model", "optimizer", "step", "rng"):
        assert_same(a[key], b[key])


@scripts
def test_resume_needs_no_other_flag(script, tmp_path):
    folder, flags = tmp_path / "run", []
    for name, value in {**FAST[script], "seed": 3, "max_steps": 6}.items():
        flag = "--" + name.replace("_", "-")
        flags += ["--no-evaluate"] if name == "evaluate" else [flag, str(value)]
    first = script.parse(["--preset", "smoke", "--run-dir", str(folder), *flags])
    script.train(first)
    again = script.parse(["--resume", "--run-dir", str(folder), "--log-every", "3"])
    assert again == dataclasses.replace(first, resume=True, max_steps=0, log_every=3)
    assert script.train(again)["steps"] == 24
    with pytest.raises(script.UserError, match="seed 3"):
        script.train(script.parse(["--resume", "--run-dir", str(folder), "--seed", "4"]))


@scripts
def test_a_stop_between_two_renames_loses_nothing(script, tmp_path):
    script.train(fast(script, tmp_path, max_steps=6, run_dir=str(tmp_path / "run")))
    os.replace(tmp_path / "run/checkpoint.pt", tmp_path / "run/previous.pt")
    assert script.train(fast(script, tmp_path / "run", resume=True))["steps"] == 24


def test_the_distance_is_the_same_when_learnt_again(tmp_path):
    flags = dict(steps=6, log_every=6, checkpoint_every=6, episodes=0, run_dir=str(tmp_path / "run"))
    wm.train(wm.preset("smoke", **flags))
    first = checkpoint(tmp_path / "run")["model"]
    wm.train(wm.preset("smoke", **flags, resume=True))
    assert_same(first, checkpoint(tmp_path / "run")["model"])


@scripts
def test_kill_9_loses_at_most_the_steps_since_the_last_checkpoint(script, tmp_path):
    folder, reached = tmp_path / "run", 0
    for n in range(3):
        run = start(script, *ENDLESS[script], "--checkpoint-every", 5, "--run-dir", folder, *["--resume"] * (n > 0))
        wait_until(lambda: any(folder.glob("*.pt")) and checkpoint(folder)["step"] > reached, run)
        time.sleep(0.13 * n)
        run.kill()
        _, error = run.communicate()
        assert run.returncode == -signal.SIGKILL, error
        step = checkpoint(folder)["step"]
        assert step > reached and step % 5 == 0
        reached = step


@scripts
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_say_so(script, tmp_path, number):
    folder = tmp_path / "run"
    run = start(script, *ENDLESS[script], "--checkpoint-every", 4000, "--run-dir", folder)
    wait_until(lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size, run)
    run.send_signal(number)
    _, error = run.communicate(timeout=300)
    assert run.returncode == 128 + number and "--resume" in error and "Traceback" not in error
    assert checkpoint(folder)["step"] > 0


@scripts
def test_damaged_and_foreign_checkpoints(script, tmp_path):
    folder = tmp_path / "run"
    script.train(fast(script, folder, max_steps=12))
    good = (folder / "checkpoint.pt").read_bytes()
    assert checkpoint(folder)["step"] == 12 and torch.load(folder / "previous.pt", weights_only=True)["step"] == 6
    for tenth in range(10):
        (folder / "checkpoint.pt").write_bytes(good[: len(good) * tenth // 10])
        with pytest.raises(script.UserError, match="previous.pt"):
            script.load(folder)
    torch.save(dict(format="nanojepa/another/1"), folder / "checkpoint.pt")
    with pytest.raises(script.UserError, match="not a checkpoint of this script"):
        script.load(folder)

    class Malice:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "hacked"),))

    torch.save(Malice(), folder / "checkpoint.pt")
    with pytest.raises(script.UserError, match="damaged"):
        script.load(folder)
    assert not (tmp_path / "hacked").exists()
    (folder / "checkpoint.pt").write_bytes(good)
    other = dict(latent_dim=48)
    with pytest.raises(script.UserError, match=next(iter(other))):
        script.train(fast(script, folder, resume=True, **other))


NAN, INF = float("nan"), float("inf")
BAD = {  # field, value, what the line must say
    wm: [
        ("batch_size", 1, "variance"), ("batch_size", 0, "batch-size"), ("clip_frames", 8, "rollout"), ("clip_frames", 92, "trajectory"),
        ("elites", 17, "samples"), ("samples", 1, "samples"), ("smooth", 1.0, "smooth"), ("lr", NAN, "lr"), ("lr", 0.0, "lr"),
        ("variance_weight", -1.0, "variance-weight"), ("temperature", 0.0, "temperature"), ("horizon", 0, "horizon"), ("steps", 0, "steps"),
        ("rollout", 0, "rollout"), ("latent_dim", 1, "latent-dim"), ("slow_features", 32, "slow-features"), ("channels", (8, 0, 8), "channels"),
        ("ablate", ("distance",), "cost latent"), ("grad_clip", INF, "grad-clip"), ("join", 0.0, "join"), ("replan_every", 0, "replan"),
        ("planner", "best", "planner best is none of mppi, cem"), ("name", "best", "preset"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("script,field,value,said", [(s, *case) for s in BAD for case in BAD[s]])
def test_impossible_values(script, field, value, said, tmp_path):
    with pytest.raises(script.UserError, match=said):
        script.train(script.preset(**{"name": "smoke", "run_dir": str(tmp_path / "run"), field: value}))
    assert not (tmp_path / "run").exists()


FLAGS = [
    (["--stepz", "3"], "stepz"), (["--run-dir"], "run-dir"), (["--preset"], "preset"), (["--batch-size", "many"], "batch-size"), (["--preset", "best"], "best"),
    (["--resume", "--run-dir", "nowhere"], "no run"), (["--resume", "--overwrite"], "exclude"), (["--device", "cuda"], "no such device"),
]  # fmt: skip


@pytest.mark.parametrize(
    "script,flags,said",
    [(s, *case) for s in FAST for case in FLAGS] + [(wm, ["--ablate", "everything"], "ablate")],
)
def test_bad_flags_give_one_line(script, flags, said, tmp_path):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    ended = start(script, *flags, cwd=tmp_path)
    _, error = ended.communicate(timeout=300)
    assert ended.returncode == 2 and said in error and "Traceback" not in error
    assert len(error.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


def test_output_that_nobody_reads(tmp_path):
    """As with --help | head: it was taken for a full disk."""
    run = start(wm, "--help", cwd=tmp_path)
    run.stdout.close()
    error = run.stderr.read()
    assert run.wait() == 1 and error == "stopped: nobody reads the output any more\n"


@scripts
def test_a_run_is_never_written_over(script, tmp_path):
    folder = tmp_path / "run"
    script.train(fast(script, folder, max_steps=6))
    before = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(script.UserError, match="--overwrite"):
        script.train(fast(script, folder))
    assert (folder / "checkpoint.pt").read_bytes() == before
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(script.UserError, match="other things"):
        script.train(fast(script, other, overwrite=True))
    (other / "config.json").write_text("{}")  # of something else
    with pytest.raises(script.UserError, match="other things"):
        script.train(fast(script, other, overwrite=True))
    assert (other / "thesis.tex").exists()


@scripts
def test_resume_does_not_go_back(script, tmp_path):
    script.train(fast(script, tmp_path / "run", max_steps=12))
    with pytest.raises(script.UserError, match="--max-steps 6 lies before step 12"):
        script.train(fast(script, tmp_path / "run", resume=True, max_steps=6))


@scripts
def test_a_gradient_that_is_not_finite_is_never_saved(script, tmp_path, monkeypatch):
    """The loss of a step may be fine and its gradient not: the weights are looked at before they are saved."""
    real, steps = script.update, []

    def poisoned(model, *rest):
        steps.append(1)
        if len(steps) == 12:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(torch.nan)
        real(model, *rest)

    monkeypatch.setattr(script, "update", poisoned)
    with pytest.raises(script.UserError, match="in the weights at step 12"):
        script.train(fast(script, tmp_path / "run"))
    assert checkpoint(tmp_path / "run")["step"] == 6


@pytest.mark.parametrize(
    "script,part,term",
    [(wm, "inverse_dynamics", "inverse_dynamics")],
)
def test_nan_is_named_and_the_checkpoint_kept(script, part, term, tmp_path, monkeypatch):
    folder, real, steps = tmp_path / "run", script.update, []

    def poisoned(model, *rest):
        real(model, *rest)
        steps.append(1)
        if len(steps) == 9:
            first = next(iter(getattr(model, part).parameters()))
            first.data[(0,) * first.ndim] = torch.nan

    monkeypatch.setattr(script, "update", poisoned)
    with pytest.raises(script.UserError, match=f"step 9 in {term};"):
        script.train(fast(script, folder))
    assert checkpoint(folder)["step"] == 6
    assert all(p.isfinite().all() for p in checkpoint(folder)["model"].values())


LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=2"]
PROCESSES = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
GRADIENTS = """
import os, sys, torch, torch.distributed as dist
script = __import__(sys.argv[1])
dist.init_process_group("gloo") if "RANK" in os.environ else None
rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
cfg = script.preset("smoke", batch_size=8, **eval(sys.argv[3]))
torch.manual_seed(0)
model = script.WorldModel(cfg).double()
batch = script.ClipStream(cfg, torch.device("cpu"), rank, world)(0)
batch = script.Trajectories(batch.position.double(), batch.action.double(), script.Layout(*(x.double() for x in batch.layout)))
total, terms, _ = script.losses(model, cfg, batch)
total.backward()
grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
total = total.detach()
if dist.is_initialized():
    dist.all_reduce(grads.div_(world))
    dist.all_reduce(total.div_(world))
if rank == 0:
    torch.save((grads, total, [b.clone() for b in model.buffers()]), sys.argv[2])
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
    names = [open(f"/proc/self/task/{thread}/comm").read() for thread in os.listdir("/proc/self/task")]
    assert not any("gloo" in name for name in names), names  # one that outlives Python may abort the process
"""


@pytest.mark.parametrize(
    "script,flags",
    [(wm, {})],
    ids=["world_model"],
)
def test_two_processes_give_the_gradients_of_one(script, flags, tmp_path):
    (tmp_path / "grads.py").write_text(GRADIENTS)
    arguments = lambda out: [tmp_path / "grads.py", script.SCRIPT, tmp_path / out, repr(flags)]
    subprocess.run([sys.executable, *arguments("one.pt")], check=True, env=PROCESSES)
    ended = subprocess.run([*LAUNCH, *arguments("two.pt")], env=PROCESSES, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    (one, loss, buffers), (two, loss2, buffers2) = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10 * one.abs().max().item())
    torch.testing.assert_close(loss, loss2, rtol=1e-10, atol=0)
    for a, b in zip(buffers, buffers2):  # BatchNorm's averages too
        torch.testing.assert_close(a, b)


EVALUATED = {  # a run with all of its evaluation, small
    wm: dict(steps=24, **EVERY6),
}
FIGURES = {  # of summary.json
    wm: (
        "success_rate",
        "success_rate_any",
        "failed_tasks",
        "random_success_rate",
        "position_error_px",
        "latent_error",
        "distance_error_px",
    ),
}


@scripts
def test_a_run_moves_between_one_and_two_processes(script, tmp_path):
    """Twelve steps on one process, six on two, which share the evaluation; then it is evaluated again by one."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    config = lambda folder, **more: script.preset("smoke", **{**EVALUATED[script], "run_dir": str(folder), **more})
    off = dict(episodes=0) if script is wm else dict(evaluate=False)
    script.train(config(folder, max_steps=12, **off))
    flags = [
        "--resume",
        "--run-dir",
        folder,
        "--max-steps",
        "18",
        *(["--episodes", "6"] if script is wm else ["--evaluate"]),
    ]
    ended = subprocess.run(
        [*LAUNCH, ROOT / f"{script.SCRIPT}.py", *flags], env=PROCESSES, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    two, threads = json.loads((folder / "summary.json").read_text()), torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the two had
    one = script.train(config(folder, resume=True, max_steps=18))
    torch.set_num_threads(threads)
    assert checkpoint(folder)["step"] == 18
    for name in FIGURES[script]:
        assert one[name] == pytest.approx(two[name], rel=1e-3), name
    script.train(config(whole, max_steps=18, **off))
    logs = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (folder, whole)]
    (a, b) = ({r["step"]: r["loss"] for r in log if "loss" in r} for log in logs)
    assert a[18] == pytest.approx(b[18], rel=0.02)


SHARED = """
import sys, torch, torch.distributed as dist, os, world_model as wm
dist.init_process_group("gloo") if "RANK" in os.environ else None
wm.use_bf16 = lambda device: False
torch.manual_seed(0)
found = []
for flags in (dict(), dict(planner="mppi", execute="elite", replan_every=2, patience=4)):
    cfg = wm.preset("smoke", episodes=5, episode_steps=12, **flags)
    model = wm.WorldModel(cfg)
    for episodes in (5, 1):
        run = wm.run_episodes(cfg, episodes, wm.Agent(model, cfg, shared=True), torch.device("cpu"))
        found.append(run.position)
if not dist.is_initialized() or dist.get_rank() == 0:
    torch.save(found, sys.argv[1])
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
"""


def test_processes_that_share_episodes_act_as_one(tmp_path):
    """Every position of every episode, also where one process has none to plan for."""
    (tmp_path / "plan.py").write_text(SHARED)
    for launch, out in (([sys.executable], "one.pt"), (LAUNCH, "two.pt")):
        ended = subprocess.run(
            [*launch, tmp_path / "plan.py", tmp_path / out], env=PROCESSES, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
    for one, two in zip(*(torch.load(tmp_path / out) for out in ("one.pt", "two.pt")), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-3)
        assert (one[:, -1] - one[:, 0]).norm(dim=1).min() > 0.1


def test_when_one_process_is_killed_the_other_says_so_and_the_run_resumes(tmp_path):
    folder = tmp_path / "run"
    command = [
        *LAUNCH,
        ROOT / "world_model.py",
        "--preset",
        "smoke",
        *ENDLESS[wm],
        "--checkpoint-every",
        "5",
        "--run-dir",
        folder,
    ]
    run = subprocess.Popen(command, env=PROCESSES, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until((folder / "previous.pt").exists, run)
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    second = next(pid for pid in workers if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(int(second), signal.SIGKILL)
    _, error = run.communicate(timeout=300)
    # torchrun asks the other to stop: it says which it noticed first, that or its broken connection
    said = "another process of this run has ended" in error or "stopped with the other processes" in error
    assert run.returncode and said and "go on with --resume" in error, error
    assert 'world_model.py"' not in error  # no traceback of ours; torchrun reports in its own words
    step = checkpoint(folder)["step"]
    assert step >= 10 and step % 5 == 0
    wm.train(
        wm.preset(
            "smoke", steps=4000, checkpoint_every=5, run_dir=str(folder), resume=True, max_steps=step + 1, episodes=0
        )
    )
    assert checkpoint(folder)["step"] == step + 1


@scripts
def test_a_signal_during_evaluation_leaves_a_run_that_can_be_finished(script, tmp_path):
    folder = tmp_path / "run"
    script.train(fast(script, folder, **({"cost": "distance", "distance_steps": 30} if script is wm else {})))
    (folder / "summary.json").unlink()
    flags = ["--episodes", 6, "--episode-steps", 4000] if script is wm else ["--evaluate"]
    run = start(script, "--resume", "--run-dir", folder, *flags)
    for line in run.stdout:
        if line.startswith("compile and warm-up"):
            break
    time.sleep(1.0)
    run.send_signal(signal.SIGTERM)
    _, error = run.communicate(timeout=300)
    assert run.returncode == 128 + signal.SIGTERM and "--resume" in error and "Traceback" not in error, error
    assert not (folder / "summary.json").exists()
    assert checkpoint(folder)["step"] == 24


def test_a_signal_while_compiling(tmp_path):
    folder = tmp_path / "compiling"
    run = start(wm, "--compile", "--rollout", 1, "--run-dir", folder)
    wait_until((folder / "metrics.jsonl").exists, run)
    time.sleep(2.0)
    run.send_signal(signal.SIGINT)
    _, error = run.communicate(timeout=300)
    assert run.returncode == 128 + signal.SIGINT and "stopped at step 0" in error and "Traceback" not in error, error


@scripts
def test_a_full_disk_gives_one_line_and_keeps_the_last_checkpoint(script, tmp_path):
    """On a file system of its own that has room for two checkpoints and not for the third."""
    script.train(fast(script, tmp_path / "fits", max_steps=6))
    kilobytes = (tmp_path / "fits/checkpoint.pt").stat().st_size * 5 // 2 // 1024
    small, kept = tmp_path / "small", tmp_path / "kept"
    small.mkdir()
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in FAST[script].items() if name != "evaluate"]
    command = f"""mount -t tmpfs -o size={kilobytes}k none {small} || exit 99
        {sys.executable} {ROOT}/{script.SCRIPT}.py --preset smoke {" ".join(flags)} --run-dir {small}/run
        code=$?; cp -r {small}/run {kept}; exit $code"""
    ended = subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True)
    if "unshare" in ended.stderr or ended.returncode == 99:
        pytest.skip("no file system can be mounted here")
    assert ended.returncode == 2 and "No space left on device" in ended.stderr, ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert checkpoint(kept)["step"] == 12 and not list(kept.glob("*.tmp"))


def test_a_run_folder_that_cannot_be_written(tmp_path):
    for folder, said in (("/proc/run", "/proc"), ("/dev/full/run", "/dev/full")):
        with pytest.raises((OSError, wm.UserError), match=said):
            wm.train(fast(wm, folder))
    ended = start(wm, "--run-dir", "/proc/run")
    _, error = ended.communicate(timeout=300)
    assert ended.returncode == 2 and error.startswith("error: /proc") and len(error.strip().splitlines()) == 1


@scripts
def test_long_runs_do_not_grow(script, tmp_path, monkeypatch):
    """2,000 steps: what the process holds after 600 is, but for a few MiB, what it holds at the end."""
    taken, real = {}, script.log_step

    def spy(run_dir, cfg, step, *rest):
        taken[step] = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        real(run_dir, cfg, step, *rest)

    monkeypatch.setattr(script, "log_step", spy)
    small = {
        wm: dict(steps=2000, batch_size=4),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: faster so
    script.train(fast(script, tmp_path / "run", **{**small[script], "log_every": 100, "checkpoint_every": 200}))
    torch.set_num_threads(threads)
    assert max(taken) == 2000 and max(taken.values()) - taken[600] < 16, taken


# Fuzzing. What it found is kept as examples and in the tables above.
bounded = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
VALUES = st.one_of(
    st.integers(-3, 2**65).map(str), st.floats().map(str), st.text(max_size=12), st.sampled_from(["", "true", "None", "cpu", "smoke", "vicreg", "mnist", "0", "-1"])
)  # fmt: skip


@scripts
@bounded
@given(data=st.data())
def test_any_command_line_is_taken_or_refused_in_one_line(script, data):
    names = ["--" + f.name.replace("_", "-") for f in dataclasses.fields(script.Config)]
    flags = data.draw(
        st.lists(st.tuples(st.sampled_from([*names, "--no-compile", "--", "-x", "word"]), VALUES), max_size=4)
    )
    argv = [part for flag in flags for part in flag if part != ""]
    try:
        assert isinstance(script.check(script.parse(["--preset", "smoke", *argv])), script.Config)
    except script.UserError as error:
        assert str(error) and "\n" not in str(error)
    except SystemExit as ended:  # --help
        assert not ended.code


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folders = {script: tmp_path_factory.mktemp(script.SCRIPT) / "run" for script in FAST}
    for script, folder in folders.items():
        script.train(fast(script, folder, max_steps=6))
    return {script: (folder / "checkpoint.pt").read_bytes() for script, folder in folders.items()}


@scripts
@bounded
@given(data=st.data())
def test_any_damage_to_a_checkpoint_is_refused_in_one_line_or_harmless(script, data, sound, tmp_path_factory):
    content = bytearray(sound[script])
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=4)):
        # half of the damage goes to the beginning and to the end, where the structure is
        content[(at % 8192 if byte % 4 == 0 else -1 - at % 8192 if byte % 4 == 1 else at * 7919) % len(content)] = byte
    cut = data.draw(st.integers(0, 5000))
    path = tmp_path_factory.getbasetemp() / f"{script.SCRIPT}-fuzzed.pt"
    path.write_bytes(content[: len(content) - cut] if cut % 3 == 0 else content)
    try:
        script.load(path)
    except script.UserError as error:
        assert "\n" not in str(error)


@scripts
@bounded
@given(data=st.data())
def test_a_checkpoint_with_other_content_is_refused_in_one_line(script, data, sound, tmp_path_factory):
    """Sound files whose content is not what it should be: parts missing, of another type, other settings."""
    state = torch.load(io.BytesIO(sound[script]), weights_only=True)
    junk = st.one_of(
        st.none(), st.integers(-2, 70), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=3)
    )
    where = state["config"] if data.draw(st.booleans()) else state
    key = data.draw(st.sampled_from(sorted(where)))
    if data.draw(st.booleans()):
        where[key] = data.draw(junk)
    else:
        del where[key]
    path = tmp_path_factory.getbasetemp() / f"{script.SCRIPT}-other.pt"
    torch.save(state, path)
    try:
        script.load(path)
    except script.UserError as error:
        assert "\n" not in str(error)
