"""The CUDA side of the scripts on a GPU that computes nothing (tests/nullgpu): devices, synchronisations, launches,
memory, graphs. Not numbers, which are zeros there, nor the speed of kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from nullgpu import build

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
