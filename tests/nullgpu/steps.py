"""What the scripts do on a GPU, as far as the host sees it: python steps.py WHAT [SCRIPT PRESET]; prints one JSON line.

To be run with the null GPU of driver.c preloaded (test_nullgpu.py does it), from the repository's root."""

import ctypes
import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path[:0] = [os.getcwd(), "results"]
from gpu_check import parts  # noqa: E402

NAMES = "launches syncs to_host to_device graphs captured bytes peak_bytes".split()
driver = ctypes.CDLL("libcuda.so.1")


def counts() -> dict[str, float]:
    values = (ctypes.c_double * len(NAMES))()
    driver.nullgpu_counts(values)
    return dict(zip(NAMES, values))


def small(script, name: str, **settings):
    """A preset as it is on a GPU, but for the amount of data, which are made here."""
    data = dict(image_jepa=dict(data="digits", evaluate=False), video_jepa=dict(data="digits", sequences=80))
    data |= dict(world_model=dict(walks=384, episodes=0))
    if script.SCRIPT == "video_jepa":
        settings.setdefault("validation_clips", 0)
    return script.preset(name, device="cuda", **data[script.SCRIPT], **settings)


def train(script, name: str) -> dict:
    """Three steps through train(), two more after a resume, and the model loaded again."""
    cfg = small(script, name, compile=False, max_steps=3, run_dir=str(Path(tempfile.mkdtemp()) / "run"))
    script.train(cfg)
    script.train(script.dataclasses.replace(cfg, resume=True, max_steps=5))
    loaded = script.load(cfg.run_dir, device="cuda")
    module = getattr(loaded, "model", loaded)
    lines = (Path(cfg.run_dir) / "metrics.jsonl").read_text().splitlines()
    return dict(device=next(module.parameters()).device.type, steps=[json.loads(line)["step"] for line in lines])


def step(script, name: str) -> dict:
    """One whole step, its loss compiled as one graph, in which nothing may wait for the device."""
    cfg = small(script, name)
    script.start_device(cfg)
    model, batch = parts(script, cfg)
    optimizers = script.make_optimizers(model, cfg)
    compiled = torch.compile(script.losses, backend="aot_eager", fullgraph=True, dynamic=False)
    found = {}
    for k in range(3):
        if k == 2:  # the others compile, and make the optimisers' state
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.set_sync_debug_mode("error")
        made = batch(k)
        before, begin = counts(), time.perf_counter()
        loss, _, _ = compiled(model, cfg, *made)
        loss.backward()
        middle = counts()
        for _, optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        after = counts()
        found = dict(forward_backward=middle["launches"] - before["launches"])
        found |= dict(update=after["launches"] - middle["launches"], milliseconds=1e3 * (time.perf_counter() - begin))
        found |= {name: after[name] - before[name] for name in ("syncs", "to_host", "to_device")}
    torch.cuda.set_sync_debug_mode("default")
    found |= dict(peak_gigabytes=torch.cuda.max_memory_allocated() / 2**30)
    stats = torch._dynamo.utils.counters["stats"]
    return found | dict(graphs=stats["unique_graphs"])


def planner(script, name: str) -> dict:
    """Two rounds of the search as a graph: what the second one launches, and what an eager round would."""
    cfg = small(script, name)
    device, _, _ = script.start_device(cfg)
    agent = script.Agent(script.Model(cfg).to(device).requires_grad_(False), cfg)
    obs = torch.zeros(20, 2, 65, 65, dtype=torch.uint8, device=device)
    found = {}
    for way in ("graph", "eager"):
        if way == "eager":
            agent.search = agent.search.function
        for _ in range(2):
            agent.reset()
            before, begin = counts(), time.perf_counter()
            agent.act(obs, obs, 200)
            seconds, after = time.perf_counter() - begin, counts()
        found |= {f"{way}_{what}": after[what] - before[what] for what in ("launches", "graphs")}
        found[f"{way}_milliseconds"] = 1e3 * seconds
    return found


def compiled(script, name: str) -> dict:
    """Sixty steps through train() as on a GPU: inductor, and its graphs replayed. Of the last twenty: host time."""
    cfg = small(script, name, max_steps=60, log_every=20, run_dir=str(Path(tempfile.mkdtemp()) / "run"))
    before = counts()
    script.train(cfg)
    after = counts()
    line = json.loads((Path(cfg.run_dir) / "metrics.jsonl").read_text().splitlines()[-1])
    found = {what: after[what] - before[what] for what in ("launches", "graphs")}
    return found | dict(milliseconds=line["milliseconds"], reserved_gigabytes=torch.cuda.max_memory_reserved() / 2**30)


def faults() -> dict:
    """Mistakes that the null GPU must tell from good code: name -> whether it did."""
    x, caught = torch.zeros(8, device="cuda"), {}

    def expect(name, function):
        torch.cuda.set_sync_debug_mode("error")
        try:
            function()
            caught[name] = False
        except RuntimeError:
            caught[name] = True
        torch.cuda.set_sync_debug_mode("default")

    def captured(function):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            function()

    x + x  # good code passes
    expect("nothing", lambda: x + x)
    expect("a value read", lambda: x.sum().item())
    expect("a boolean mask", lambda: x[x > 0])
    expect("another device", lambda: x + torch.zeros(8))
    expect("another device's generator", lambda: torch.randn(8, device="cuda", generator=torch.Generator()))
    expect("more memory than there is", lambda: torch.empty(2**38, device="cuda"))
    expect("a copy from the host in a graph", lambda: captured(lambda: x + torch.zeros(8).to("cuda")))
    return caught


if __name__ == "__main__":
    what, *which = sys.argv[1:]
    if which:
        which[0] = importlib.import_module(which[0])
    print(json.dumps(globals()[what](*which)))
