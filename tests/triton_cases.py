"""The Triton kernels, interpreted on the CPU, against the PyTorch path in float64.

Triton decides at import whether it interprets, so test_kernels.py runs this file in a process of its own:
TRITON_INTERPRET=1 python -m pytest tests/triton_cases.py
"""

import pytest
import torch
from torch.nn.functional import normalize
from triton.runtime import interpreter

import kernels.rollout
import kernels.sigreg
import kernels.variance_covariance
from kernels import dispatch, gru_rollout_cost, sigreg_loss, use_triton, variance_covariance_loss

assert dispatch.INTERPRETED, "run with TRITON_INTERPRET=1"
BF16 = 2**-7  # the interpreter cuts float32 off to bf16 where a GPU rounds


def with_index(tensor, scope, patch=interpreter._patch_lang_tensor):
    """The interpreter of triton 3.6 takes int() of one-element arrays for a loop's bounds, which numpy 2.4 refuses."""
    patch(tensor, scope)
    tensor.__index__ = lambda self: self.handle.data.item()


interpreter._patch_lang_tensor = with_index


@pytest.fixture(autouse=True)
def explicit():
    torch.manual_seed(0)
    use_triton(True)
    yield
    use_triton(None)


def in_float64(function, *arguments):
    use_triton(None)
    result = function(*(x.double() if isinstance(x, torch.Tensor) else x for x in arguments))
    use_triton(True)
    return result


def close(ours, wanted, error):
    """Largest difference against the largest wanted value."""
    assert ours.shape == wanted.shape
    assert (ours.double() - wanted).abs().max() <= error * wanted.abs().max().clamp(min=1e-3)


def layouts(rows, columns):
    """The same numbers as rows, as columns, and with gaps."""
    x = torch.randn(rows, columns) * torch.linspace(0.2, 1.6, columns) + 3
    return {"rows": x, "columns": x.T.contiguous().T, "gaps": torch.stack((x, x), 2).flatten(1)[:, ::2]}


# block edges: 64 rows or features of a tile, 32 along the inner axis, 32 splits of it
SHAPES = [(2, 2), (5, 13), (63, 65), (65, 63), (64, 64), (66, 131), (131, 66), (7, 1061), (1061, 7)]


@pytest.mark.parametrize("shape,hinge", [*((shape, ()) for shape in SHAPES), ((5, 13), (0.6, 0.05))])
def test_variance_covariance(shape, hinge):  # hinge: margin and eps, where they are not the usual ones
    z = layouts(*shape)["rows"].requires_grad_()
    double = z.detach().double().requires_grad_()
    ours, wanted = variance_covariance_loss(z, *hinge), in_float64(variance_covariance_loss, double, *hinge)
    for a, b in zip(ours, wanted):
        assert a.dtype == torch.float32 and abs(a.item() - b.item()) <= 3e-6 * max(abs(b.item()), 0.1)
    gradient = lambda loss, x: torch.autograd.grad(loss, x, retain_graph=True)[0]
    for weigh in (lambda v, c: v, lambda v, c: c, lambda v, c: -0.3 * v + 250 * c):  # each unused in turn
        close(gradient(weigh(*ours), z), gradient(weigh(*wanted), double), 1e-5)


@pytest.mark.parametrize("shape", [(40, 70), (70, 40)])
@pytest.mark.parametrize("layout", ["columns", "gaps", "bf16", "long splits", "small tiles"])
def test_variance_covariance_layouts_and_dtypes(shape, layout, monkeypatch):
    if layout == "long splits":  # several blocks of the inner axis in a split, the last one short
        monkeypatch.setattr(kernels.variance_covariance, "PROGRAMS", 2)
    if layout == "small tiles":  # three on a side
        monkeypatch.setattr(kernels.variance_covariance, "_launch", lambda R: (16, 4, 3))
    z = layouts(*shape).get(layout, layouts(*shape)["rows"])
    z = (z.bfloat16() if layout == "bf16" else z).detach().requires_grad_()
    double = z.detach().double().requires_grad_()
    ours, wanted = variance_covariance_loss(z), in_float64(variance_covariance_loss, double)
    for a, b in zip(ours, wanted):
        assert abs(a.item() - b.item()) <= 3e-6
    (ours[0] + 20 * ours[1]).backward()
    (wanted[0] + 20 * wanted[1]).backward()
    assert z.grad.dtype == z.dtype
    close(z.grad, double.grad, BF16 if layout == "bf16" else 1e-5)


def test_equal_input_gives_equal_output():
    z = torch.randn(40, 70)
    assert all(torch.equal(a, b) for a, b in zip(variance_covariance_loss(z), variance_covariance_loss(z.clone())))


@pytest.mark.parametrize("shape", [(3, 40), (40, 3)])
def test_nan_stays_nan(shape):
    z = torch.randn(shape)
    z[1, 2] = torch.nan
    losses = variance_covariance_loss(z.requires_grad_())
    assert all(x.isnan() for x in losses)
    assert all(torch.autograd.grad(x, z, retain_graph=True)[0][:, 2].isnan().all() for x in losses)
    assert sigreg_loss(z, torch.randn(shape[1], 5)).isnan()


# block edges: 32 rows, directions, features; above 2048 rows a part is more than one block
SIGREG = [(1, 1, 1, 3.0, 10), (31, 33, 7, 2.5, 7), (33, 3, 33, 1.0, 2), (37, 65, 5, 3.0, 17), (4161, 3, 17, 3.0, 10)]


@pytest.mark.parametrize("N,D,M,t_max,knots", SIGREG)
def test_sigreg(N, D, M, t_max, knots):
    z, u = torch.randn(N, D, requires_grad=True), normalize(torch.randn(D, M), dim=0)
    double = z.detach().double().requires_grad_()
    ours, wanted = sigreg_loss(z, u, t_max, knots), in_float64(sigreg_loss, double, u, t_max, knots)
    assert ours.dtype == torch.float32 and abs(ours.item() - wanted.item()) <= 2e-6 * max(wanted.item(), 0.1)
    close(*(torch.autograd.grad(-2.5 * x, y)[0] for x, y in ((ours, z), (wanted, double))), 1e-5)


@pytest.mark.parametrize("layout", ["columns", "gaps", "bf16"])
def test_sigreg_layouts_and_dtypes(layout):
    z, u = layouts(35, 6).get(layout, layouts(35, 6)["rows"]), normalize(torch.randn(9, 6), dim=1).T
    z = (z.bfloat16() if layout == "bf16" else z).detach().requires_grad_()
    double = z.detach().double().requires_grad_()
    ours, wanted = sigreg_loss(z, u), in_float64(sigreg_loss, double, u)
    assert abs(ours.item() - wanted.item()) <= 2e-6
    ours.backward()
    wanted.backward()
    assert z.grad.dtype == z.dtype
    close(z.grad, double.grad, BF16 if layout == "bf16" else 1e-5)


def rollout_arguments(E, S, H, D, A=2):
    cell, norm = torch.nn.GRUCell(A, D).requires_grad_(False), torch.nn.LayerNorm(D).requires_grad_(False)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    weights = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh, norm.weight, norm.bias)
    return torch.randn(E, D), torch.randn(E, H, S, A).transpose(1, 2), torch.randn(E, D), *weights  # actions with gaps


def test_whole_graphs_compile():
    def losses(z, u, *rollout):
        v, c = variance_covariance_loss(z)
        return v + c + sigreg_loss(z, u), gru_rollout_cost(*rollout)

    z, u, rollout = torch.randn(9, 5, requires_grad=True), torch.randn(5, 3), rollout_arguments(1, 2, 2, 5)
    results = [f(z, u, *rollout) for f in (losses, torch.compile(losses, fullgraph=True, backend="aot_eager"))]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss, _ in results))


# edges: 16 rows of a program, 64 columns, 32 along the inner axis
@pytest.mark.parametrize("E,S,H,D", [(1, 1, 1, 3), (3, 5, 7, 16), (1, 17, 3, 65), (2, 8, 2, 63), (1, 17, 3, 261)])
@pytest.mark.parametrize("objective", ["sum", "last"])
def test_rollout(E, S, H, D, objective):
    arguments = rollout_arguments(E, S, H, D)
    ours = gru_rollout_cost(*arguments, objective)
    assert ours.dtype == torch.float32 and ours.shape == (E, S)
    close(ours, in_float64(gru_rollout_cost, *arguments, objective), 1e-5)


def test_rollout_of_more_features_than_are_settled_at_once():
    arguments = rollout_arguments(3, 6, 3, 1030, A=3)  # 4 rows at a time
    close(gru_rollout_cost(*arguments), in_float64(gru_rollout_cost, *arguments), 1e-5)


def test_rollout_of_many_rows_takes_the_other_path():
    arguments = rollout_arguments(5, 205, 1, 8)
    with pytest.raises(RuntimeError, match="1024 plans"):
        gru_rollout_cost(*arguments)


@pytest.mark.parametrize("D", [40, 260])
def test_rollout_precision_and_undefined_input(D):
    state, *rest = rollout_arguments(2, 3, 2, D)
    with torch.autocast("cpu", torch.bfloat16):
        ours = gru_rollout_cost(state, *rest)
    wanted = in_float64(gru_rollout_cost, state, *rest)
    assert not torch.equal(ours, gru_rollout_cost(state, *rest))  # the products are in bf16, the sums are not
    close(ours, wanted, 0.01)
    halves = [x.bfloat16() for x in (state, *rest)]
    close(gru_rollout_cost(*halves), in_float64(gru_rollout_cost, *halves), 0.01)
    state[1, 2] = torch.nan
    ours = gru_rollout_cost(state, *rest, objective="last")
    assert ours[1].isnan().all() and not ours[0].isnan().any()
    assert gru_rollout_cost(state[:0], rest[0][:0], rest[1][:0], *rest[2:]).shape == (0, 3)
    assert torch.equal(gru_rollout_cost(state, rest[0][:, :, :0], *rest[1:]), torch.zeros(2, 3))
