"""What every script promises: exact resume, nothing saved is lost, clear errors, several processes, importable."""

import ast
import dataclasses
import functools
import inspect
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

import image_jepa as ij
import video_jepa as vj
import world_model as wm

ROOT = Path(__file__).parents[1]
FAST = {  # 24 steps
    vj: dict(sequences=60, batch_size=4, predictor_width=16, epochs=1, max_steps=24, log_every=6, save_every=0),
    ij: dict(batch_size=50, width=8, epochs=0.2, log_every=6, save_every=0),
    wm: dict(walks=64, steps=24, log_every=6, save_every=0),
}
NO_EVALUATION = {vj: dict(validation_clips=0), ij: dict(evaluate=False), wm: dict(episodes=0)}
SMALL = {vj: dict(rounds=1), ij: {}, wm: dict(rollout=1)}  # compiles faster
ENDLESS = {vj: dict(epochs=1000, max_steps=0), ij: dict(epochs=1000), wm: dict(steps=10**6)}
SCRIPTS = pytest.mark.parametrize("script", FAST, ids=lambda script: script.SCRIPT)
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=2"]
PROCESSES = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def fast(script, folder, **more):
    """A smoke run of 24 steps without evaluation."""
    options = {**FAST[script], **NO_EVALUATION[script], "run_dir": str(folder), **more}
    return script.preset("smoke", **options)


def flags(options: dict) -> list[str]:
    names = {name: name.replace("_", "-") for name in options}
    pairs = [["--no-" + names[name]] if x is False else ["--" + names[name], str(x)] for name, x in options.items()]
    return sum(pairs, [])


def start(script, *arguments):
    command = [sys.executable, ROOT / f"{script.SCRIPT}.py", *arguments]
    return subprocess.Popen(command, env=PROCESSES, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_endless(script, folder, *more):
    options = {**FAST[script], **ENDLESS[script], "run_dir": folder}
    return start(script, "--preset", "smoke", *flags(options), *more)


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def losses(folder) -> dict[int, float]:
    """Loss by step; of steps that were logged twice, the last."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records}


# ----------------------------------------------------------------------------------------------- resume, stops, kills
@SCRIPTS
@pytest.mark.parametrize("compile", [False, True])
def test_resume_is_exact_bit_for_bit(script, compile, tmp_path):
    """In two or three parts as in one: weights, optimiser and every logged loss."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = dict(compile=compile, **(SMALL[script] if compile else {}))
    script.train(fast(script, whole, **options))
    for stop in (7, 24) if compile else (7, 17, 24):  # each part compiles anew
        script.train(fast(script, parts, max_steps=stop, resume=stop > 7, **options))
    a, b = checkpoint(whole), checkpoint(parts)
    assert a["step"] == 24
    assert a.keys() == b.keys()
    for key in a.keys() - {"config", "seconds"}:
        assert_same(a[key], b[key])
    all_steps = losses(parts)
    assert losses(whole) == {step: all_steps[step] for step in (6, 12, 18, 24)}


@SCRIPTS
def test_resume_on_the_command_line(script, tmp_path, monkeypatch):
    """--resume takes the run's own settings, refuses others, and alone finds the newest run of the preset."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs", script.SCRIPT, "smoke-20260101-000000")
    older = Path("runs", script.SCRIPT, "smoke-20250101-000000")
    script.train(fast(script, older, max_steps=6))
    first = fast(script, folder, seed=3, max_steps=6)
    script.train(first)
    again = script.parse_args(["--resume", "--preset", "smoke", "--log-every", "3", "--max-steps", "12"])
    assert again == dataclasses.replace(first, resume=True, max_steps=12, log_every=3)
    assert script.train(again)["steps"] == 12
    contradiction = script.parse_args(["--resume", "--run-dir", str(folder), "--seed", "0"])
    with pytest.raises(script.UserError, match="seed 3, not 0"):
        script.train(contradiction)
    with pytest.raises(script.UserError, match="there is no checkpoint"):
        script.parse_args(["--resume", "--preset", "paper"])


@SCRIPTS
def test_sigkill_loses_at_most_the_steps_since_the_last_checkpoint(script, tmp_path):
    folder, reached = tmp_path / "run", 0
    for n in range(2):
        run = start(script, "--resume", "--run-dir", folder) if n else start_endless(script, folder)
        wait_until(lambda: (folder / "checkpoint.pt").exists() and checkpoint(folder)["step"] > reached, run)
        time.sleep(0.13 * n)
        run.kill()
        _, error = run.communicate()
        assert run.returncode == -signal.SIGKILL, error
        step = checkpoint(folder)["step"]
        assert step > reached and step % 6 == 0
        reached = step


@pytest.mark.parametrize(
    "script, number",
    [(vj, signal.SIGINT), (ij, signal.SIGTERM), (wm, signal.SIGINT)],
    ids=lambda x: getattr(x, "SCRIPT", ""),
)
def test_a_signal_saves_and_says_so(script, tmp_path, number):
    folder = tmp_path / "run"
    run = start_endless(script, folder, "--log-every", "50", "--save-every", "9999")
    wait_until(lambda: (folder / "config.json").exists(), run)
    time.sleep(1)
    run.send_signal(number)
    output, error = run.communicate(timeout=300)
    assert run.returncode == 128 + number and not error, error
    step = checkpoint(folder)["step"]
    assert step > 0 and f"stopped at step {step}, checkpoint saved: go on with --resume" in output


# ---------------------------------------------------------------------------------------------- files, errors, limits
@SCRIPTS
def test_damaged_foreign_and_malicious_checkpoints(script, tmp_path):
    folder = tmp_path / "run"
    script.train(fast(script, folder, max_steps=6))
    path = folder / "checkpoint.pt"
    sound = path.read_bytes()
    for tenth in range(10):
        path.write_bytes(sound[: len(sound) * tenth // 10])
        with pytest.raises(script.UserError, match="is damaged or not a checkpoint"):
            script.load(folder)

    class Malice:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "hacked"),))

    torch.save(Malice(), path)
    with pytest.raises(script.UserError, match="is damaged or not a checkpoint"):
        script.load(folder)
    assert not (tmp_path / "hacked").exists()
    torch.save(dict(format="nanojepa/another/1"), path)
    with pytest.raises(script.UserError, match="of another script or version"):
        script.load(folder)
    with pytest.raises(script.UserError, match="there is no checkpoint"):
        script.load(tmp_path)


@SCRIPTS
def test_a_run_is_never_written_over(script, tmp_path):
    folder = tmp_path / "run"
    script.train(fast(script, folder, max_steps=6))
    before = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(script.UserError, match="exists: choose another --run-dir, or go on with its run by --resume"):
        script.train(fast(script, folder))
    assert (folder / "checkpoint.pt").read_bytes() == before


@SCRIPTS
def test_nan_ends_the_run_and_is_never_saved(script, tmp_path, monkeypatch):
    folder, losses, steps = tmp_path / "run", script.losses, []

    def poisoned(model, *rest):
        steps.append(1)
        loss, *others = losses(model, *rest)
        return (loss * (torch.nan if len(steps) == 9 else 1), *others)  # a fine loss, but then weights of NaN

    monkeypatch.setattr(script, "losses", poisoned)
    with pytest.raises(script.UserError, match="NaN or Inf at step 12 .*the last checkpoint is kept"):
        script.train(fast(script, folder))
    state = checkpoint(folder)
    assert state["step"] == 6 and all(p.isfinite().all() for p in state["model"].values())


@SCRIPTS
@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--stepz", "3"], 2, "--stepz"),
        (["--preset", "best"], 2, "best"),
        (["--batch-size", "many"], 2, "batch-size"),
        (["--batch-size", "0"], 2, "--batch-size"),
        (["--resume", "--run-dir", "nowhere"], 1, "error: there is no checkpoint nowhere/checkpoint.pt"),
        (["--device", "cuda"], 1, "error: --device cuda: PyTorch finds no CUDA device here"),
        (["--preset", "smoke", "--run-dir", "/proc/run"], 1, "error: [Errno"),
    ],
)
def test_mistakes_on_the_command_line(script, arguments, code, message, tmp_path, monkeypatch, capsys):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script.SCRIPT, *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its own
    with pytest.raises(SystemExit) as ended:
        script.main()
    exit_code, error = ended.value.code, capsys.readouterr().err
    if isinstance(exit_code, str):  # Python prints it and exits with 1
        exit_code, error = 1, error + exit_code
    assert exit_code == code and message in error
    assert not list(tmp_path.iterdir())


@SCRIPTS
def test_a_full_disk_gives_one_line_and_keeps_the_last_checkpoint(script, tmp_path):
    """On a file system of its own that has room for two checkpoints and not for the third."""
    script.train(fast(script, tmp_path / "fits", max_steps=6))
    kilobytes = (tmp_path / "fits/checkpoint.pt").stat().st_size * 3 // 2 // 1024
    small, kept = tmp_path / "small", tmp_path / "kept"
    small.mkdir()
    arguments = " ".join(flags({**FAST[script], **NO_EVALUATION[script]}))
    command = f"""mount -t tmpfs -o size={kilobytes}k none {small} || exit 99
        {sys.executable} {ROOT}/{script.SCRIPT}.py --preset smoke {arguments} --run-dir {small}/run
        code=$?; cp -r {small}/run {kept}; exit $code"""
    ended = subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True)
    if "unshare" in ended.stderr or ended.returncode == 99:
        pytest.skip("no file system can be mounted here")
    assert ended.returncode == 1 and ended.stderr.startswith("error: ") and "No space left" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1 and checkpoint(kept)["step"] == 6


@SCRIPTS
def test_many_trainings_in_one_process_compile(script, tmp_path, monkeypatch):
    """A sweep in a notebook must not reach the limit of recompilations, which is eight (of any backend: here a fast one)."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for n in range(9):
        options = dict(compile=True, variance_weight=float(n), max_steps=1, log_every=1)
        assert script.train(fast(script, tmp_path / str(n), **SMALL[script], **options))["steps"] == 1


# -------------------------------------------------------------------------------------------------- several processes
LAUNCHER = """
import runpy, sys, torch
torch.nn.BatchNorm1d = torch.nn.BatchNorm2d = lambda channels: torch.nn.Identity()  # on CPUs it is for one process
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

GRADIENTS = """
import os, sys, torch, torch.distributed as dist
script = __import__(sys.argv[1])
options = dict(batch_size=8)
if sys.argv[1] == "video_jepa":
    options |= dict(sequences=60, predictor_width=16)
cfg = script.preset("smoke", **options)
device, rank, world = script.start_device(cfg)
torch.manual_seed(0)
if sys.argv[1] == "video_jepa":
    model = script.Model(cfg).double()
    batch = [script.make_batch(cfg, script.make_clips(script.load_sequences(cfg)[0], device), 3, rank, world)]
elif sys.argv[1] == "world_model":
    model = script.Model(cfg).double()
    walks = script.shortest_paths(cfg, script.make_walks(cfg, cfg.walks, 0))
    batch = [script.make_batch(cfg, type(walks)(*(x.double() for x in walks[:3]), walks.steps), 3, rank, world)]
else:
    script.augment = lambda images, cfg: images / 255 + torch.rand(3, 32, 32)  # the same for all images
    model = script.Model(cfg, 10).double()
    batch = script.make_batch(cfg, script.load_images(cfg), 3, rank, world)
loss, terms, _ = script.losses(model, cfg, *batch)
loss.backward()
terms = torch.stack([term for name, term in terms.items() if name != "projection_std"])
gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
if world > 1:
    dist.all_reduce(gradients.div_(world))
    dist.all_reduce(terms.div_(world))
if rank == 0:
    torch.save((gradients, terms), sys.argv[2])
if world > 1:
    dist.destroy_process_group()
"""


@pytest.fixture
def launcher(tmp_path):
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    return tmp_path / "launcher.py"


@SCRIPTS
def test_two_processes_give_the_gradients_of_one(script, launcher, tmp_path):
    """With the anti-collapse statistics over the samples of both."""
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    for launch, out in (([sys.executable], "one.pt"), (LAUNCH, "two.pt")):
        command = [*launch, launcher, tmp_path / "gradients.py", script.SCRIPT, tmp_path / out]
        ended = subprocess.run(command, env=PROCESSES, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
    (one, terms), (two, terms2) = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10 * one.abs().max().item())
    torch.testing.assert_close(terms, terms2, rtol=1e-10, atol=0)


@SCRIPTS
def test_a_run_moves_between_one_and_two_processes(script, launcher, tmp_path):
    """Twelve steps on one, six on two, the rest on one: about the losses of one alone."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    begin = ["--preset", "smoke", *flags({**FAST[script], **NO_EVALUATION[script]})]
    resume = ["--resume", "--run-dir", folder, "--max-steps"]
    for launch, arguments in (
        ([sys.executable], [*begin, "--run-dir", whole]),
        ([sys.executable], [*begin, "--run-dir", folder, "--max-steps", "12"]),
        (LAUNCH, [*resume, "18"]),
        ([sys.executable], [*resume, "24"]),
    ):
        command = [*launch, launcher, ROOT / f"{script.SCRIPT}.py", *arguments]
        ended = subprocess.run(command, env=PROCESSES, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
    one, moved = losses(whole), losses(folder)
    assert one[12] == moved[12] and moved[18] == pytest.approx(one[18], rel=0.02 if script is vj else 0.1)
    assert checkpoint(folder)["step"] == 24


def test_batch_norm_over_several_processes_needs_gpus(tmp_path, monkeypatch):
    options = ["--preset", "smoke", "--device", "cpu", "--run-dir", tmp_path / "run"]
    command = [*LAUNCH, ROOT / "image_jepa.py", *options]
    ended = subprocess.run(command, env=PROCESSES, capture_output=True, text=True)
    assert ended.returncode and "error: batch norm over several processes needs GPUs" in ended.stderr
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(vj.UserError, match="needs GPUs"):
        vj.start_device(vj.preset("paper", device="cpu"))
    with pytest.raises(vj.UserError, match="does not divide over 2 processes"):
        vj.start_device(vj.preset("smoke", device="cpu", batch_size=7))


# --------------------------------------------------------------------------------------------------- the script itself
@SCRIPTS
def test_presets_and_fields_have_no_dead_names(script):
    fields = {field.name for field in dataclasses.fields(script.Config)}
    assert len(fields) <= 40 and script.MAY_CHANGE_ON_RESUME <= fields
    assert list(script.PRESETS) == ["gpu", "paper", "cpu", "smoke"] and not script.PRESETS["paper"]
    tree = ast.parse((ROOT / f"{script.SCRIPT}.py").read_text())
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert fields <= read | {"resume"}, fields - read


@SCRIPTS
def test_help_shows_every_field_with_its_meaning(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    lines = inspect.getsource(script.Config).splitlines()
    for field in dataclasses.fields(script.Config):
        (line,) = [line for line in lines if line.startswith(f"    {field.name}: ")]
        assert "--" + field.name.replace("_", "-") in words and line.split("  # ")[1] in words, line


def test_importing_does_nothing():
    code = (
        "import torch; before = torch.get_rng_state()\n"
        "import image_jepa, video_jepa, world_model\n"
        "assert torch.equal(before, torch.get_rng_state()) and not torch.cuda.is_initialized()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, "--no-such-flag"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0 and not ended.stdout and not ended.stderr, ended.stderr
