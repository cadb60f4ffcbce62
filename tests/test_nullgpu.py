"""The CUDA side of the scripts on a GPU that computes nothing (tests/nullgpu): devices, synchronisations, launches,
memory, graphs. Not numbers, which are zeros there, nor the speed of kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from nullgpu import build

import world_model

ROOT = Path(__file__).parents[1]
SCRIPTS = ["image_jepa", "video_jepa", "world_model"]
pytestmark = pytest.mark.skipif(bool(build.obstacle()), reason=f"null GPU: {build.obstacle()}")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    library = build.build(tmp_path_factory.mktemp("nullgpu"))

    def run_with_null_gpu(*arguments, **environment):
        variables = dict(os.environ, LD_PRELOAD=str(library), TRITON_LIBCUDA_PATH=str(library.parent), **environment)
        command = [sys.executable, "tests/nullgpu/steps.py", *arguments]
        ended = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr[-3000:]
        return json.loads(ended.stdout.splitlines()[-1])

    return run_with_null_gpu


def test_faults_are_caught(run):
    caught = run("faults")
    assert not caught.pop("nothing") and all(caught.values()), caught


@pytest.mark.parametrize("preset", ["gpu", "paper"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_trains_resumes_and_loads(run, script, preset):
    assert run("train", script, preset) == dict(device="cuda", steps=[3, 5])


@pytest.mark.parametrize("preset", ["gpu", "paper"])
def test_a_round_of_the_planner_is_one_graph(run, preset):
    found = run("planner", "world_model", preset)
    cfg = world_model.preset(preset)
    assert found["graph_graphs"] == cfg.iterations and found["eager_graphs"] == 0
    assert found["graph_launches"] < 100 + 15 * cfg.iterations < found["eager_launches"], found


# at most so many launches forward and backward, and in the update, uncompiled; GiB allocated
BOUNDS = {
    ("image_jepa", "gpu"): (3500, 900, 2),
    ("image_jepa", "paper"): (1800, 460, 2),
    ("video_jepa", "gpu"): (740, 700, 1.7),
    ("video_jepa", "paper"): (2000, 20, 50),
    ("world_model", "gpu"): (1000, 1000, 6),
    ("world_model", "paper"): (720, 10, 5.5),
}


@pytest.mark.parametrize("script, preset", BOUNDS)
def test_a_step_is_one_graph_and_waits_for_nothing(run, script, preset):
    """Any call that makes the host wait for the device raises here, in the batch, the loss, its gradient or the update."""
    found = run("step", script, preset)
    assert found["graphs"] == 1 and found["syncs"] == found["to_host"] == 0, found
    measured = found["forward_backward"], found["update"], found["peak_gigabytes"]
    assert all(0 < value < bound for value, bound in zip(measured, BOUNDS[script, preset])), measured


@pytest.mark.skipif("NULLGPU_INDUCTOR" not in os.environ, reason="minutes of compiling: set NULLGPU_INDUCTOR=1")
@pytest.mark.parametrize("script, preset", BOUNDS)
def test_training_replays_graphs(run, script, preset):
    """Compiled in earnest, each step but the first few is one graph forward and one backward."""
    found = run("compiled", script, preset)
    print(script, preset, found)
    assert 2 * 38 <= found["graphs"] <= 2 * 60, found
