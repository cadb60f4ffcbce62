"""The shared losses and rollouts against their definitions in float64."""
import pytest
import torch

from kernels import gru_rollout_cost, sigreg_loss, variance_covariance_loss


def definition(z, margin=1.0, eps=1e-4):
    """Feature by feature, from the formulas of the paper."""
    N, D = z.shape
    variance = torch.stack([torch.clamp(margin - torch.sqrt(z[:, d].var() + eps), min=0) for d in range(D)]).mean()
    C = torch.cov(z.T)
    return variance, sum(C[i, j] ** 2 for i in range(D) for j in range(D) if i != j) / (D * (D - 1))


@pytest.mark.parametrize("shape", [(2, 2), (5, 13), (13, 5), (7, 7), (31, 16)])
def test_variance_covariance_equals_its_definition(shape):
    z = (torch.randn(shape, dtype=torch.float64) * torch.linspace(0.1, 2, shape[1]) + 3).requires_grad_()
    ours, wanted = variance_covariance_loss(z), definition(z)
    torch.testing.assert_close(ours, wanted)
    for weights in ((1.0, 0.0), (0.0, 1.0), (-0.3, 2.5)):  # the gradient of each, and of a mixture
        grads = [torch.autograd.grad(weights[0] * v + weights[1] * c, z, retain_graph=True)[0] for v, c in (ours, wanted)]
        torch.testing.assert_close(*grads)


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
    assert all(loss.isnan() for loss in variance_covariance_loss(z))
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
    at = {name: sigreg_loss(x, u).item() for name, x in dict(gauss=z, wide=2 * z, off=z + 1, flat=z * (torch.arange(8) > 0), point=0 * z).items()}
    assert at["gauss"] < 0.002 and all(v > 5 * at["gauss"] for name, v in at.items() if name != "gauss") and at["point"] > at["wide"]


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
