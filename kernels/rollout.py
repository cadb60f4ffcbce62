"""Cost of many action sequences under a GRU world model, without storing the trajectories.

    h_0 = state;   h_t = LayerNorm(GRUCell(a_t, h_{t-1}));   cost = sum_t mean_d (h_t - goal)^2   (or the last t only)

Cost: 6 E S H D^2 FLOPs. The rollout is H dependent products of [E S, D] x [D, 3D]; the products with the actions (A is
2 here) and the element-wise part are what a loop over `nn.GRUCell` wastes its time on, so both are written out.
"""
import torch
from torch import Tensor
from torch.nn.functional import layer_norm


def gru_rollout_cost(
    state: Tensor,  # [E, D] latents to start from
    actions: Tensor,  # [E, S, H, A] candidate action sequences
    goal: Tensor,  # [E, D] latents to reach
    w_ih: Tensor,  # [3D, A] nn.GRUCell layout: reset, update, new
    w_hh: Tensor,  # [3D, D]
    b_ih: Tensor,  # [3D]
    b_hh: Tensor,  # [3D]
    ln_weight: Tensor,  # [D]
    ln_bias: Tensor,  # [D]
    objective: str = "sum",
) -> Tensor:
    """-> cost [E, S] in float32 (float64 for float64 input): summed over the horizon ("sum") or of its end ("last")."""
    if objective not in ("sum", "last"):
        raise ValueError(f"objective must be 'sum' or 'last', got {objective!r}")
    E, S, H, A = actions.shape
    D = state.shape[-1]
    h = state.repeat_interleave(S, 0)  # [E*S, D]
    goal = goal.repeat_interleave(S, 0)
    actions = actions.permute(2, 0, 1, 3).reshape(H, E * S, A).contiguous()
    w_hh, w_ih = w_hh.t(), w_ih.t()
    b_input = b_ih.clone()
    b_input[: 2 * D] += b_hh[: 2 * D]  # reset and update gates see one sum of biases; only the new gate splits them
    cost = torch.zeros(E * S, dtype=torch.promote_types(state.dtype, torch.float32), device=state.device)
    for t in range(H):
        x = torch.addmm(b_input, actions[t], w_ih)  # [E*S, 3D]
        hidden = h @ w_hh
        r, u = torch.sigmoid(x[:, : 2 * D].add_(hidden[:, : 2 * D])).chunk(2, 1)
        new = torch.tanh(torch.addcmul(x[:, 2 * D :], r, hidden[:, 2 * D :].add_(b_hh[2 * D :])))
        h = layer_norm(torch.lerp(new, h, u), (D,), ln_weight, ln_bias)
        if objective == "sum" or t == H - 1:
            cost += (h - goal).to(cost.dtype).square().mean(1)
    return cost.view(E, S)
