"""The shared losses and rollouts: against their definitions in float64, as registered ops, as Triton code.

The Triton code is interpreted (triton_cases.py) and compiled for GPUs that need not be there (triton_aot.py), each in a
process of its own; the tests at the end run on a GPU.
"""

import json
import os
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from kernels import (
    Muon,
    dispatch,
    gru_rollout_cost,
    muon,
    rollout,
    sigreg,
    sigreg_loss,
    use_triton,
    variance_covariance,
    variance_covariance_loss,
)

ROOT = Path(__file__).parent.parent


def definition(z, margin=1.0, eps=1e-4):
    """Feature by feature, from the formulas of the paper."""
    N, D = z.shape
    variance = torch.stack([torch.clamp(margin - torch.sqrt(z[:, d].var() + eps), min=0) for d in range(D)]).mean()
    C = torch.cov(z.T)
    return variance, sum(C[i, j] ** 2 for i in range(D) for j in range(D) if i != j) / (D * (D - 1))


@pytest.mark.parametrize("hinge", [{}, dict(margin=0.6, eps=0.05)])
@pytest.mark.parametrize("shape", [(2, 2), (5, 13), (13, 5), (7, 7), (31, 16)])
def test_variance_covariance_equals_its_definition(shape, hinge):
    z = (torch.randn(shape, dtype=torch.float64) * torch.linspace(0.1, 2, shape[1]) + 3).requires_grad_()
    ours, wanted = variance_covariance_loss(z, **hinge), definition(z, **hinge)
    torch.testing.assert_close(ours, wanted)
    for weights in ((1.0, 0.0), (0.0, 1.0), (-0.3, 2.5)):  # the gradient of each, and of a mixture
        losses = [weights[0] * v + weights[1] * c for v, c in (ours, wanted)]
        torch.testing.assert_close(*(torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in losses))


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_variance_covariance_accumulates_in_float32(dtype, tolerance):
    z = torch.randn(300, 40).add(5).to(dtype)  # the offset costs digits unless the mean is taken out first, in float32
    with torch.autocast("cpu", torch.bfloat16):
        ours = variance_covariance_loss(z)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    for a, b in zip(ours, variance_covariance_loss(z.double())):
        assert abs(a.item() - b.item()) <= tolerance * max(1.0, abs(b.item()))


def test_variance_covariance_undefined_input():
    z = torch.randn(8, 4)
    z[3, 2] = torch.nan
    losses = variance_covariance_loss(z.requires_grad_())
    assert all(loss.isnan() for loss in losses)
    assert all(torch.autograd.grad(loss, z, retain_graph=True)[0][:, 2].isnan().all() for loss in losses)
    z = z.detach()
    with pytest.raises(RuntimeError, match="does not require grad"):  # no second derivative, rather than a wrong one
        x = torch.randn(6, 3, requires_grad=True)
        (grad,) = torch.autograd.grad(variance_covariance_loss(x)[1], x, create_graph=True)
        grad.sum().backward()
    for shape in ((1, 4), (4, 1), (0, 4), (4,), (2, 3, 4)):
        with pytest.raises(ValueError, match="N >= 2"):
            variance_covariance_loss(torch.randn(shape))


def unit_columns(D, M, dtype=torch.float64):
    return torch.nn.functional.normalize(torch.randn(D, M, dtype=dtype), dim=0)


@pytest.mark.parametrize("N,D,M", [(1, 1, 1), (5, 3, 7), (31, 16, 4)])
@pytest.mark.parametrize("t_max,knots", [(3.0, 10), (2.5, 7), (1.0, 2)])
def test_sigreg_equals_its_definition(N, D, M, t_max, knots):
    torch.manual_seed(N + knots)
    z, u = torch.randn(N, D, dtype=torch.float64, requires_grad=True), unit_columns(D, M)
    t = torch.linspace(-t_max, t_max, knots, dtype=torch.float64)
    phi = torch.exp(1j * t * (z @ u)[..., None]).mean(0)  # [M, T], the empirical characteristic function
    wanted = torch.trapezoid(torch.exp(-t.square() / 2) * (phi - torch.exp(-t.square() / 2)).abs().square(), t).mean()
    ours = sigreg_loss(z, u, t_max, knots)
    torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x in (ours, wanted)))


def test_sigreg_is_least_for_a_gaussian():
    torch.manual_seed(0)
    u, z = unit_columns(8, 64), torch.randn(4000, 8, dtype=torch.float64)
    samples = dict(gauss=z, wide=2 * z, off=z + 1, flat=z * (torch.arange(8) > 0), point=0 * z)
    at = {name: sigreg_loss(x, u).item() for name, x in samples.items()}
    gauss = at.pop("gauss")
    assert gauss < 0.002 and min(at.values()) > 5 * gauss and at["point"] > at["wide"]


def test_sigreg_precision_and_undefined_input():
    torch.manual_seed(0)
    z, u = torch.randn(300, 40).bfloat16(), unit_columns(40, 16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = sigreg_loss(z, u)
    assert ours.dtype == torch.float32 and abs(ours - sigreg_loss(z.double(), u.double())) < 1e-6
    z[5, 5] = torch.nan
    assert sigreg_loss(z, u).isnan()
    with pytest.raises(ValueError, match="directions.detach"):
        sigreg_loss(torch.randn(4, 40), u.requires_grad_())
    for a, b in (((4, 3), (2, 5)), ((4,), (4, 2)), ((0, 3), (3, 5)), ((4, 3), (3, 0))):
        with pytest.raises(ValueError, match=r"z \[N, D\]"):
            sigreg_loss(torch.randn(a), torch.randn(b))
    with pytest.raises(ValueError, match="knots"):
        sigreg_loss(torch.randn(4, 3), torch.randn(3, 5), knots=1)


def rollout_arguments(E, S, H, D, dtype):
    torch.manual_seed(E + S + H + D)
    cell, norm = torch.nn.GRUCell(2, D, dtype=dtype), torch.nn.LayerNorm(D, dtype=dtype)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    state, goal = torch.randn(2, E, D, dtype=dtype)
    actions = torch.randn(E, H, S, 2, dtype=dtype).transpose(1, 2)  # not contiguous
    weights = [w.detach() for w in (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh, norm.weight, norm.bias)]
    return cell, norm, state, actions, goal, weights


@pytest.mark.parametrize("E,S,H,D", [(1, 1, 1, 3), (3, 5, 7, 16), (2, 17, 4, 33)])
@pytest.mark.parametrize("objective", ["sum", "last"])
@torch.no_grad()
def test_rollout_equals_the_modules(E, S, H, D, objective):
    cell, norm, state, actions, goal, weights = rollout_arguments(E, S, H, D, torch.float64)
    wanted = torch.zeros(E, S, dtype=torch.float64)
    for e in range(E):
        for s in range(S):
            h = state[e : e + 1]
            for t in range(H):
                h = norm(cell(actions[e, s, t : t + 1], h))
                if objective == "sum" or t == H - 1:
                    wanted[e, s] += (h - goal[e]).square().mean()
    torch.testing.assert_close(gru_rollout_cost(state, actions, goal, *weights, objective=objective), wanted)


@torch.no_grad()
def test_rollout_under_autocast_is_as_good_as_bf16_can_be():
    _, _, state, actions, goal, weights = rollout_arguments(2, 30, 8, 64, torch.float32)
    wanted = gru_rollout_cost(state, actions, goal, *weights)
    with torch.autocast("cpu", torch.bfloat16):
        ours = gru_rollout_cost(state, actions, goal, *weights)
    assert ours.dtype == torch.float32 and not torch.equal(ours, wanted)  # the products are in bf16, the sums are not
    torch.testing.assert_close(ours, wanted, rtol=0.01, atol=0)  # measured: 0.3 %


@torch.no_grad()
def test_rollout_leaves_its_arguments_alone_and_checks_the_objective():
    _, _, state, actions, goal, weights = rollout_arguments(2, 3, 4, 8, torch.float32)
    before = [x.clone() for x in (state, actions, goal, *weights)]
    assert gru_rollout_cost(state, actions, goal, *weights).dtype == torch.float32
    for a, b in zip(before, (state, actions, goal, *weights)):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="objective"):
        gru_rollout_cost(state, actions, goal, *weights, objective="mean")


# --------------------------------------------------------------------------------------------------- registered ops
def ops_and_arguments(dtype=torch.float64):
    """Every registered op with arguments: on a CPU the ops hold the formulas and their gradients written out."""
    z, wide = torch.randn(9, 4, dtype=dtype) * 0.7, torch.randn(4, 9, dtype=dtype)
    z, wide = z.requires_grad_(), wide.requires_grad_()
    u, one = unit_columns(4, 5, dtype), torch.tensor(0.7, dtype=dtype)
    _, _, *saved = (x.detach() for x in variance_covariance.op(z, 1.0, 1e-4))
    slopes = sigreg.op(z, u, 3.0, 10)[1].detach()
    _, _, state, actions, goal, weights = rollout_arguments(2, 3, 4, 8, dtype)
    return {
        "variance_covariance": (variance_covariance.op, (z, 1.0, 1e-4)),
        "variance_covariance, N < D": (variance_covariance.op, (wide, 1.2, 0.3)),
        "variance_covariance backward": (variance_covariance.backward_op, (one, -one, z.detach(), *saved, 1.0, 1e-4)),
        "sigreg": (sigreg.op, (z, u, 3.0, 10)),
        "sigreg, odd knots": (sigreg.op, (z, u, 2.5, 7)),
        "sigreg backward": (sigreg.backward_op, (one, z.detach(), u, slopes, 3.0, 10)),
        "rollout": (rollout.op, (state, actions, goal, *weights, "sum")),
    }


OPS = list(ops_and_arguments())


@pytest.mark.parametrize("name", OPS)
def test_ops_are_registered_well(name):
    for dtype in (torch.float64, torch.float32):
        torch.library.opcheck(*ops_and_arguments(dtype)[name])


@pytest.mark.parametrize("name", [name for name in OPS if "backward" not in name and name != "rollout"])
def test_written_out_gradients(name):
    op, (z, *rest) = ops_and_arguments()[name]
    losses = lambda x: op(x, *rest)[: 2 if op is variance_covariance.op else 1]
    assert torch.autograd.gradcheck(losses, (z,))
    gradient = lambda x: torch.autograd.grad(sum(losses(x)).double(), z)[0]
    exact = gradient(z)
    assert (gradient(z.bfloat16()) - exact).abs().max() < 0.03 * exact.abs().max()  # bf16 in, sums in float32


def test_ops_equal_the_pytorch_path():
    z, u = torch.randn(30, 8), unit_columns(8, 5, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(variance_covariance.op(z, 1.0, 1e-4), variance_covariance_loss(z)))
    assert torch.equal(sigreg.op(z, u, 3.0, 10)[0], sigreg_loss(z, u))
    _, _, state, actions, goal, weights = rollout_arguments(2, 3, 4, 8, torch.float32)
    arguments = (state, actions, goal, *weights, "last")
    assert torch.equal(rollout.op(*arguments), gru_rollout_cost(*arguments))


def all_losses(through_ops):
    """One function of everything in kernels/ with a gradient to z and, on the PyTorch path, to the rollout's state."""

    def function(z, u, state, actions, goal, *weights, autocast=False):
        with torch.autocast(z.device.type, torch.bfloat16, enabled=autocast):
            if through_ops:
                v, c, *_ = variance_covariance.op(z, 1.0, 1e-4)
                s, cost = sigreg.op(z, u, 3.0, 10)[0], rollout.op(state.detach(), actions, goal, *weights, "sum")
            else:
                v, c = variance_covariance_loss(z)
                s, cost = sigreg_loss(z, u), gru_rollout_cost(state, actions, goal, *weights)
        return v + 3 * c + 5 * s, cost

    return function


@pytest.mark.parametrize("through_ops", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_whole_graphs_compile_forward_and_backward(through_ops, autocast):
    _, _, state, actions, goal, weights = rollout_arguments(2, 3, 4, 8, torch.float32)
    function, results = all_losses(through_ops), []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)):
        torch.manual_seed(0)
        z, start = torch.randn(30, 8, requires_grad=True), state.clone().requires_grad_()
        loss, cost = run(z, unit_columns(8, 5, torch.float32), start, actions, goal, *weights, autocast=autocast)
        (loss + (0 if through_ops else cost.sum())).backward()
        results.append([loss, cost, z.grad, *([] if through_ops else [start.grad])])
    torch.testing.assert_close(*results)


def test_rollout_has_a_gradient():
    _, _, state, actions, goal, weights = rollout_arguments(2, 2, 3, 5, torch.float64)
    leaves = [x.clone().requires_grad_() for x in (state, actions, goal)]
    assert torch.autograd.gradcheck(lambda *x: gru_rollout_cost(*x, *weights), leaves)


# ------------------------------------------------------------------------------------------------------------- Muon
def muon_steps(weights, optimizer):
    """Four steps; the last gradients nearly cancel the momentum: another momentum, or none of Nesterov, turns the step.

    -> after each the step without the weight decay, and the matrix that it orthogonalises."""
    gradients = [size * torch.randn(w.shape) for size, w in zip((1, 1000, 1, 1), weights)]
    sums, steps = [0] * len(weights), []
    for last in ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1), (-1.07, -1.19, -1.19, -1.1)):
        before = [w.detach().clone() for w in weights]
        for w, g, factor in zip(weights, gradients, last):
            w.grad = factor * g
        optimizer.step()
        for i, (w, old) in enumerate(zip(weights, before)):
            sums[i] = 0.9 * sums[i] + w.grad
            steps.append((((1 - 0.1 * 0.5) * old - w.detach()).flatten(1) / 0.1, (w.grad + 0.9 * sums[i]).flatten(1)))
    return steps


@pytest.mark.parametrize("bfloat16", [True, False])
def test_muon_against_its_definition(bfloat16, monkeypatch):
    monkeypatch.setattr(muon, "has_bfloat16", lambda device: bfloat16)
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 12), (6, 3, 2, 2), (12, 6), (6, 12))]
    for step, momentum in muon_steps(weights, Muon(weights, lr=0.1, weight_decay=0.5)):
        u, _, v = torch.linalg.svd(momentum, full_matrices=False)
        assert torch.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0) > 0.95
        values = torch.linalg.svdvals(step) / max(1, len(step) / step.shape[1]) ** 0.5
        assert 0.6 < values.min() and values.max() < 1.3


def test_muon_equals_pytorchs_and_resumes(monkeypatch):
    monkeypatch.setattr(muon, "has_bfloat16", lambda device: True)
    torch.manual_seed(0)
    shapes = (40, 64), (40, 16, 2, 2), (64, 40), (40, 64)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    matrices = [torch.nn.Parameter(w.detach().flatten(1).clone()) for w in weights]
    ours, theirs = Muon(weights, lr=0.1), torch.optim.Muon(matrices, lr=0.1, momentum=0.9, weight_decay=0.01)
    for n in range(4):
        for w, matrix in zip(weights, matrices):
            w.grad = torch.randn_like(w)
            matrix.grad = w.grad.flatten(1)
        if n == 2:
            saved, ours = ours.state_dict(), Muon(weights)
            ours.load_state_dict(saved)
        ours.step()
        theirs.step()
        for w, matrix in zip(weights, matrices):
            torch.testing.assert_close(w.flatten(1), matrix, rtol=0, atol=2e-3)  # bit for bit, if sums are alike


# ------------------------------------------------------------------------------------------------------- which path
def pretend(kind, index=None, dtype=torch.float32):
    return types.SimpleNamespace(device=torch.device(kind, index), dtype=dtype)


@pytest.fixture
def gpu(monkeypatch):
    """-> set the compute capability of a GPU that is not there; the choice between paths is restored afterwards."""
    dispatch._obstacle.cache_clear()
    yield lambda *capability: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    dispatch._obstacle.cache_clear()
    use_triton(None)


def test_triton_is_chosen_where_it_can_run(gpu):
    pytest.importorskip("triton")
    gpu(9, 0)
    cuda = pretend("cuda", 0)
    assert dispatch.takes_triton(cuda, pretend("cuda", 0, torch.bfloat16))
    assert not dispatch.takes_triton(pretend("cuda", 0, torch.float64)) and not dispatch.takes_triton(pretend("cpu"))
    assert not dispatch.takes_triton(pretend("mps")) and not dispatch.takes_triton(cuda, pretend("cpu"))
    assert not dispatch.takes_triton(cuda, unless="it must not")
    use_triton(False)
    assert not dispatch.takes_triton(cuda)
    use_triton(True)
    assert dispatch.takes_triton(cuda)


def test_explicit_requests_are_met_or_explained(gpu):
    pytest.importorskip("triton")
    gpu(9, 0)
    use_triton(True)
    _, _, state, actions, goal, weights = rollout_arguments(1, 2, 2, 8, torch.float32)
    calls = [
        lambda: variance_covariance_loss(torch.randn(5, 3)),
        lambda: sigreg_loss(torch.randn(5, 3), torch.randn(3, 2)),
        lambda: gru_rollout_cost(state, actions, goal, *weights),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="asked for, but they run on CUDA devices and the tensors are on cpu"):
            call()
    for other, reason in ((pretend("cuda", 0, torch.float64), "float64"), (pretend("cuda", 1), "different devices")):
        with pytest.raises(RuntimeError, match=reason):
            dispatch.takes_triton(pretend("cuda", 0), other)
    with pytest.raises(RuntimeError, match="wants a gradient"):
        gru_rollout_cost(state.requires_grad_(), actions, goal, *weights)
    gpu(7, 5)
    dispatch._obstacle.cache_clear()
    with pytest.raises(RuntimeError, match="capability 8.0"):
        dispatch.takes_triton(pretend("cuda", 0))


def test_falling_back_is_said_once(gpu):
    pytest.importorskip("triton")
    gpu(7, 5)
    with pytest.warns(UserWarning, match="PyTorch instead of Triton on cuda: they need .* compute capability 8.0"):
        assert not dispatch.takes_triton(pretend("cuda", 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not dispatch.takes_triton(pretend("cuda", 0))


def test_without_a_c_compiler_pytorch_computes(gpu, monkeypatch):
    pytest.importorskip("triton")
    gpu(9, 0)
    assert dispatch.takes_triton(pretend("cuda", 0))
    dispatch._obstacle.cache_clear()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.warns(UserWarning, match="C compiler"):
        assert not dispatch.takes_triton(pretend("cuda", 0))


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # import triton raises ImportError
import torch
import kernels
z = torch.randn(9, 4, requires_grad=True)
sum(kernels.variance_covariance_loss(z)).backward()
assert z.grad.isfinite().all() and kernels.sigreg_loss(z, torch.randn(4, 3)).isfinite()
try:
    kernels.use_triton(True)
except RuntimeError as error:
    print(error)
"""


def process(*command, **environment):
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=variables, **pipes)


def finished(running):
    out, err = running.communicate(timeout=600)
    assert running.returncode == 0, (out + err)[-6000:]
    return out


def test_everything_works_without_triton():
    assert "triton is not installed" in finished(process("-c", WITHOUT_TRITON))


# ------------------------------------------------------------------------------------------- Triton code without a GPU
def test_triton_code_interpreted():
    pytest.importorskip("triton")
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton_cases.py")
    out = finished(process(*command, TRITON_INTERPRET="1"))
    assert re.search(r"\b[1-9]\d* passed", out) and "skipped" not in out, out


SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program can have
STACK = 48  # bytes of a thread: sine and cosine of large angles take 32-40; more would be spilled registers
KERNELS = {  # -> whether it is there for its products
    "kernels.variance_covariance.product_kernel": True,
    "kernels.variance_covariance.reduce_kernel": False,
    "kernels.variance_covariance.finish_kernel": False,
    "kernels.variance_covariance.gradient_kernel": True,
    "kernels.sigreg.sums_kernel": True,
    "kernels.sigreg.integral_kernel": False,
    "kernels.sigreg.gradient_kernel": True,
    "kernels.rollout.rollout_kernel": True,
}


def test_triton_code_compiles_ahead_of_time(tmp_path):
    """For sm_80 and sm_90, as launched at the scripts' sizes: shared memory fits, registers too, products are matrix
    instructions."""
    pytest.importorskip("triton")
    variables = dict(TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    running = {arch: process("tests/triton_aot.py", str(arch), **variables) for arch in SHARED}
    for arch, limit in SHARED.items():
        rows = [json.loads(line) for line in finished(running[arch]).splitlines()]
        assert {row["kernel"] for row in rows} == set(KERNELS)
        for row in rows:
            assert row["shared"] <= limit and row["stack"] <= STACK, row
            assert row["products"] == bool(row["matrix"]) == KERNELS[row["kernel"]], row


# ------------------------------------------------------------------------------------------------------------ on a GPU
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: no CUDA device here")


@pytest.fixture
def explicit():
    use_triton(True)
    yield
    use_triton(None)


def errors(function, *arguments):
    """Errors of Triton, and of PyTorch in the same dtype, against PyTorch in float64: of every value and gradient."""
    results = []
    for choice, dtype in ((True, None), (False, None), (False, torch.float64)):
        use_triton(choice)
        ready = [x.detach().to(dtype or x.dtype) if isinstance(x, torch.Tensor) else x for x in arguments]
        leaf = ready[0].requires_grad_(function is not gru_rollout_cost)
        out = function(*ready)
        outs = out if isinstance(out, tuple) else (out,)
        grads = torch.autograd.grad(sum(w * o for w, o in zip((0.3, 40.0), outs)), leaf) if leaf.requires_grad else ()
        results.append([x.double() for x in (*outs, *grads)])
    use_triton(None)
    return [[((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, results[2])] for found in results[:2]]


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 2048), (512, 128), (65536, 64), (6528, 512), (255, 257), (257, 63), (2, 2)])
def test_losses_on_a_gpu(shape, dtype):
    torch.manual_seed(0)
    z = (torch.randn(shape, device="cuda") * torch.linspace(0.2, 1.6, shape[1], device="cuda") + 1).to(dtype)
    u = unit_columns(shape[1], 256, torch.float32).cuda()
    for function, rest in ((variance_covariance_loss, ()), (sigreg_loss, (u,))):
        for ours, theirs in zip(*errors(function, z, *rest)):
            assert ours <= 2 * theirs + 1e-5, function


ROLLOUTS = [(1, 200, 90, 512), (5, 200, 30, 512), (8, 128, 10, 1024), (3, 77, 30, 128), (1, 5, 9, 100)]


@needs_gpu
@pytest.mark.parametrize("E,S,H,D", ROLLOUTS)
@pytest.mark.parametrize("autocast", [False, True])
def test_rollouts_on_a_gpu(E, S, H, D, autocast):
    _, _, state, actions, goal, weights = rollout_arguments(E, S, H, D, torch.float32)
    arguments = [x.cuda() for x in (state, actions, goal, *weights)]
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        (ours,), (theirs,) = errors(gru_rollout_cost, *arguments)
    assert ours <= 2 * theirs + 1e-5


@needs_gpu
def test_runs_repeat_on_a_gpu(explicit):
    z, u = torch.randn(6528, 512, device="cuda", requires_grad=True), unit_columns(512, 64, torch.float32).cuda()
    grads = [torch.autograd.grad(sum(variance_covariance_loss(z)) + sigreg_loss(z, u), z)[0] for _ in range(3)]
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@needs_gpu
@pytest.mark.parametrize("kernels_on", [True, False])
def test_whole_graphs_compile_on_a_gpu(kernels_on):
    use_triton(kernels_on)
    function, results = all_losses(False), []
    _, _, *rest, weights = rollout_arguments(2, 3, 4, 8, torch.float32)
    z, u = torch.randn(30, 8, device="cuda", requires_grad=True), unit_columns(8, 5, torch.float32).cuda()
    for run in (function, torch.compile(function, fullgraph=True)):
        loss, cost = run(z, u, *(x.cuda() for x in (*rest, *weights)))
        results.append((loss, cost, torch.autograd.grad(loss, z)[0]))
    use_triton(None)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@needs_gpu
def test_fifty_steps_with_and_without_kernels_on_a_gpu():
    curves = []
    for choice in (True, False):
        use_triton(choice)
        torch.manual_seed(0)
        net, x = torch.nn.Linear(64, 256, device="cuda"), torch.randn(512, 64, device="cuda")
        u, optimizer = unit_columns(256, 128, torch.float32).cuda(), torch.optim.SGD(net.parameters(), 0.05)
        curve = []
        for _ in range(50):
            v, c = variance_covariance_loss(net(x))
            loss = v + 10 * c + sigreg_loss(net(x), u)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.detach())
        curves.append(torch.stack(curve))
    use_triton(None)
    assert curves[0][-1] < 0.9 * curves[0][0]
    torch.testing.assert_close(*curves, rtol=1e-3, atol=0)
