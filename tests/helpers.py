"""What several test files need."""

import time

import torch


def wait_until(happened, run, seconds=300):
    """Until happened() is true of the process `run`, which must not have ended before."""
    until = time.time() + seconds
    while not happened():
        assert run.poll() is None, run.communicate()
        assert time.time() < until, f"{run.args} has not come so far within {seconds} s"
        time.sleep(0.02)


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
