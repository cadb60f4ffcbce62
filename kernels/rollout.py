"""Cost of many action sequences under a GRU world model, without storing the trajectories.

    h_0 = state;   h_t = LayerNorm(GRUCell(a_t, h_{t-1}));   cost = sum_t mean_d (h_t - goal)^2   (or the last t only)

Cost: 6 E S H D^2 FLOPs. The rollout is H dependent products of [E S, D] x [D, 3D]; the products with the actions (A is
2 here) and the element-wise part are what a loop over `nn.GRUCell` wastes its time on, so both are written out.
"""
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

CACHED_ROWS = 256  # 4 episodes of 200 rows, D 512, 20 times 90 steps on 2 cores: 2.8 s an episode, 3.0 in one piece, 2.4-2.6 for one alone


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
    """-> cost [E, S] in float32 (float64 for float64 input): summed over the horizon ("sum") or of its end ("last").

    Computed in the dtype of the arguments, one for all; under autocast the products with w_hh, nearly all of the work, are in
    autocast's. Raises ValueError for another objective.
    """
    if objective not in ("sum", "last"):
        raise ValueError(f"objective must be 'sum' or 'last', got {objective!r}")
    E, S, H, A = actions.shape
    kind = state.device.type
    if kind == "cpu" and E > 1 and E * S > CACHED_ROWS:  # a few episodes at a time: their states stay in the caches
        parts = zip(*(x.split(max(1, CACHED_ROWS // S)) for x in (state, actions, goal)))
        weights = (w_ih, w_hh, b_ih, b_hh, ln_weight, ln_bias)
        return torch.cat([gru_rollout_cost(*part, *weights, objective) for part in parts])
    D = state.shape[-1]
    h = state.repeat_interleave(S, 0)  # [E*S, D]
    goal = goal.repeat_interleave(S, 0)
    actions = actions.permute(2, 0, 1, 3).reshape(H, E * S, A).contiguous()
    product = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else state.dtype
    w_hh, w_ih = w_hh.t().to(product), w_ih.t()
    b_input = b_ih.clone()
    b_input[: 2 * D] += b_hh[: 2 * D]  # reset and update gates see one sum of biases; only the new gate splits them
    cost = torch.zeros(E * S, dtype=torch.promote_types(state.dtype, torch.float32), device=state.device)
    with torch.autocast(kind, enabled=False):
        for t in range(H):
            x = torch.addmm(b_input, actions[t], w_ih)  # [E*S, 3D]
            hidden = (h.to(product) @ w_hh).to(h.dtype)
            r, u = torch.sigmoid(x[:, : 2 * D].add_(hidden[:, : 2 * D])).chunk(2, 1)
            new = torch.tanh(torch.addcmul(x[:, 2 * D :], r, hidden[:, 2 * D :].add_(b_hh[2 * D :])))
            h = layer_norm(torch.lerp(new, h, u), (D,), ln_weight, ln_bias)
            if objective == "sum" or t == H - 1:
                cost += (h - goal).to(cost.dtype).square().mean(1)
    return cost.view(E, S)
