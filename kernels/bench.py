"""Milliseconds of the losses and rollouts at the scripts' sizes: python -m kernels.bench [--only NAME] [--json FILE]

Three ways of each: eager (as the formulas are usually written), compiled (torch.compile of that; of a rollout one
step) and ours. Each is checked against float64 first, value and gradient; what fails is not timed. On CUDA each is
captured in a CUDA graph, as the scripts run them, so that the GPU is timed and not the Python around it. Warm-up and
compilation stand apart. The share is of what this machine reaches itself in a large product and a large copy, whichever
of the two bounds the work. cuDNN's GRU is no rival: it has no LayerNorm between its steps. Without CUDA this times the
CPU paths.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, relu

from kernels import dispatch, gru_rollout_cost, sigreg_loss, variance_covariance_loss


# ------------------------------------------------------------------------------------------ as they are usually written
def eager_variance_covariance(z: Tensor) -> Tensor:
    N, D = z.shape
    x = z - z.mean(0)
    variance = relu(1 - torch.sqrt(x.var(0) + 1e-4)).mean()
    covariance = x.T @ x / (N - 1)  # [D, D]
    off_diagonal = covariance.flatten()[:-1].view(D - 1, D + 1)[:, 1:]
    return variance + 80 * off_diagonal.square().mean()


def eager_sigreg(z: Tensor, directions: Tensor) -> Tensor:
    t = torch.linspace(-3, 3, 10, dtype=z.dtype, device=z.device)
    gauss = torch.exp(-t.square() / 2)
    angle = (z @ directions)[..., None] * t  # [N, M, T]
    square = (angle.cos().mean(0) - gauss).square() + angle.sin().mean(0).square()
    return torch.trapezoid(square * gauss, t).mean()


def eager_rollout(step: Callable, state: Tensor, actions: Tensor, goal: Tensor) -> Tensor:
    E, S, H, _ = actions.shape
    h, goal, cost = state.repeat_interleave(S, 0), goal.repeat_interleave(S, 0), 0.0
    for t in range(H):
        h, distance = step(actions[:, :, t].flatten(0, 1), h, goal)
        cost = cost + distance
    return cost.view(E, S)


# ------------------------------------------------------------------------------------------------------------- cases
@dataclass
class Case:
    name: str
    size: str
    ways: dict[str, Callable]  # eager, compiled, ours: leaves -> loss
    leaves: list[Tensor]  # what gets a gradient; none: forward only
    exact: Callable  # the value in float64
    flops: float  # forward and backward
    bytes: float  # that must be read and written at least
    unit: str = "forward and backward"


def variance_covariance_case(N: int, D: int, views: int, device: torch.device) -> Case:
    both = lambda one: lambda *z: sum(one(x) for x in z)

    def ours(z):
        v, c = variance_covariance_loss(z)
        return v + 80 * c

    leaves = [torch.randn(N, D, device=device).mul_(0.8).requires_grad_() for _ in range(views)]
    eager = both(eager_variance_covariance)
    ways = dict(eager=eager, compiled=torch.compile(eager, dynamic=False), ours=both(ours))
    size = f"{views} x {N} x {D}" if views > 1 else f"{N} x {D}"
    flops, bytes = 4.0 * views * N * D * min(N, D), 12.0 * views * N * D
    return Case("variance_covariance", size, ways, leaves, ways["ours"], flops, bytes)


def sigreg_case(N: int, D: int, M: int, device: torch.device) -> Case:
    u = normalize(torch.randn(D, M, device=device), dim=0)
    leaves = [torch.randn(N, D, device=device, requires_grad=True)]
    compiled = torch.compile(eager_sigreg, dynamic=False)
    ways = dict(eager=lambda z: eager_sigreg(z, u), compiled=lambda z: compiled(z, u), ours=lambda z: sigreg_loss(z, u))
    exact = lambda z: sigreg_loss(z, u.double())
    return Case("sigreg", f"{N} x {D}, {M} directions", ways, leaves, exact, 6.0 * N * D * M, 12.0 * N * D)


def rollout_case(E: int, S: int, H: int, D: int, device: torch.device) -> Case:
    cell, norm = torch.nn.GRUCell(2, D, device=device), torch.nn.LayerNorm(D, device=device)
    weights = [w.detach() for w in (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh, norm.weight, norm.bias)]
    state, goal, actions = *torch.randn(2, E, D, device=device), torch.randn(E, S, H, 2, device=device)

    def step(action, h, goal):
        h = norm(cell(action, h))
        return h, (h - goal).square().mean(1)

    compiled_step = torch.compile(step, dynamic=False)
    ways = dict(
        eager=lambda: eager_rollout(step, state, actions, goal),
        compiled=lambda: eager_rollout(compiled_step, state, actions, goal),
        ours=lambda: gru_rollout_cost(state, actions, goal, *weights),
    )
    ways = {name: torch.no_grad()(way) for name, way in ways.items()}
    exact = torch.no_grad()(lambda: gru_rollout_cost(*(x.double() for x in (state, actions, goal, *weights))))
    flops, size = 6.0 * E * S * H * D * D, f"{E} x {S} rows, {H} steps, D {D}"
    return Case("gru_rollout_cost", size, ways, [], exact, flops, 4.0 * E * S * H * 2, "forward")


def cases(device: torch.device) -> dict[str, Callable[[], Case]]:
    """Sizes of the scripts: images (two views), world model, video (presets gpu and paper); plans of 1 .. 20 tasks."""
    cuda, made = device.type == "cuda", {}
    for N, D, views in ((256, 2048, 2), (6528, 512, 1), (40960, 64, 1), *([(2621440, 64, 1)] if cuda else [])):
        made[f"variance_covariance {N} {D}"] = lambda size=(N, D, views): variance_covariance_case(*size, device)
    for N in (256, 4096):
        made[f"sigreg {N}"] = lambda N=N: sigreg_case(N, 128, 256, device)
    for E in (1, 5, 20) if cuda else (1,):
        made[f"rollout {E}"] = lambda E=E: rollout_case(E, 200, 90, 512, device)
    return made


# ---------------------------------------------------------------------------------------------------- check, then time
def outcome(way: Callable, leaves: list[Tensor]) -> list[Tensor]:
    value = way(*leaves)
    return [value.detach(), *(torch.autograd.grad(value, leaves) if leaves else ())]


def captured(function: Callable, device: torch.device) -> Callable:
    """The function as a CUDA graph, its inputs and outputs always in the same memory; on other devices as it is."""
    if device.type != "cuda":
        return function
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()

    def replay():
        graph.replay()
        return outputs

    return replay


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Largest difference over the largest exact value, of the loss and of every gradient. NaN if anything is."""
    each = [(a.double() - b).abs().max() / b.abs().max() for a, b in zip(found, exact)]
    return torch.stack(each).max().item()


def milliseconds(function: Callable, device: torch.device, seconds: float) -> dict[str, float]:
    """Median and quartiles over at least 5 calls, after 3 that do not count."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times, begin = [], time.perf_counter()
    while len(times) < 8 or time.perf_counter() - begin < seconds:
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(1000 * (time.perf_counter() - start))
    low, middle, high = statistics.quantiles(times[3:], n=4)
    return dict(median=middle, low=low, high=high, calls=len(times) - 3)


def ceiling(device: torch.device) -> dict[str, float]:
    """TFLOP/s of a large product in float32 and bf16, GB/s of a large copy."""
    cuda, found = device.type == "cuda", {}
    side = 8192 if cuda else 2048
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(side, side, device=device).to(dtype)
        found[str(dtype)[6:]] = 2e-9 * side**3 / milliseconds(lambda: a @ a, device, 0.5)["median"]
    source = torch.zeros(2**28 if cuda else 2**25, device=device)
    target = torch.empty_like(source)
    found["copy"] = 2e-6 * source.nbytes / milliseconds(lambda: target.copy_(source), device, 0.5)["median"]
    return found


def measure(case: Case, device: torch.device, limits: dict[str, float], seconds: float) -> dict:
    row = dict(kernel=case.name, size=case.size, unit=case.unit, ways={})
    exact = outcome(case.exact, [x.detach().double().requires_grad_() for x in case.leaves])
    for name, way in case.ways.items():
        start = time.perf_counter()
        both = captured(lambda way=way: outcome(way, case.leaves), device)
        found = error(both(), exact)
        entry = row["ways"][name] = dict(error=found, first_call_seconds=time.perf_counter() - start)
        allowed = 0.05 if name == "eager" else 2 * row["ways"]["eager"]["error"] + 5e-5
        if not found <= allowed:
            entry["refused"] = f"error {found:.1e}, {allowed:.1e} allowed"
            continue
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            outcome(way, case.leaves)
            entry["peak_megabytes"] = (torch.cuda.max_memory_allocated() - before) / 1e6
        entry["both"] = milliseconds(both, device, seconds)
        if case.leaves:
            forward = captured(torch.no_grad()(lambda way=way: way(*case.leaves)), device)
            entry["forward"] = milliseconds(forward, device, seconds)
        least = max(1e-9 * case.flops / limits["float32"], 1e-6 * case.bytes / limits["copy"])  # ms
        entry["share"] = least / entry["both"]["median"]
    return row


def table(row: dict) -> str:
    ours = row["ways"]["ours"].get("both", {}).get("median")
    lines = [f"{row['kernel']}  {row['size']}  ({row['unit']})"]
    for name, entry in row["ways"].items():
        if "refused" in entry:
            lines.append(f"  {name:11} not timed: {entry['refused']}")
            continue
        both = entry["both"]
        parts = f"  forward {entry['forward']['median']:.3f}" if "forward" in entry else ""
        ratio = f"  {both['median'] / ours:6.2f} x ours" if ours else ""
        memory = f"  {entry['peak_megabytes']:.1f} MB" if "peak_megabytes" in entry else ""
        spread = f"{both['median']:10.3f} ms ({both['low']:.3f}-{both['high']:.3f})"
        share = f"  {100 * entry['share']:.0f} % of the ceiling"
        lines.append(f"  {name:11}{spread}{parts}{ratio}{share}{memory}  error {entry['error']:.0e}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", metavar="FILE", help="also write everything measured")
    parser.add_argument("--only", default="", metavar="NAME", help="only cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=1.0, help="timed at least that long, each")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    triton = getattr(dispatch.triton, "__version__", None)
    ours = "Triton" if dispatch.takes_triton(torch.empty(0, device=device)) else "PyTorch"
    name = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, triton {triton}; ours: {ours}")
    if not cuda:
        print("No CUDA device: these are the CPU paths, the Triton kernels are not timed.")
    chosen = {key: make for key, make in cases(device).items() if arguments.only in key}
    if not chosen:
        sys.exit(f"no case is named {arguments.only!r}; there are: {', '.join(cases(device))}")
    limits = ceiling(device)
    products = f"{limits['float32']:.2f} TFLOP/s float32, {limits['bfloat16']:.2f} bf16"
    print(f"ceiling: {products}, copy {limits['copy']:.0f} GB/s\n")
    rows = []
    for make in chosen.values():
        rows.append(measure(make(), device, limits, arguments.seconds))
        print(table(rows[-1]) + "\n", flush=True)
    if arguments.json:
        report = dict(device=name, torch=torch.__version__, triton=triton, ours=ours, ceiling=limits, rows=rows)
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)
    if any("refused" in row["ways"]["ours"] for row in rows):
        sys.exit("ours failed a check")


if __name__ == "__main__":
    main()
