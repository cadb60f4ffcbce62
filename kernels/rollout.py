"""Cost of many action sequences under a GRU world model, without storing the trajectories.

    h_0 = state;   h_t = LayerNorm(GRUCell(a_t, h_{t-1}));   cost = sum_t mean_d (h_t - goal)^2   (or the last t only)

Cost: 6 E S H D^2 FLOPs, as H dependent products of [E S, D] x [D, 3D]. The products with the actions (A is 2 here),
the gates and LayerNorm are written out, in float32 under autocast too. On 2 CPU cores 200 rows, 90 steps, D 512 take
164 ms in float32, a loop over `nn.GRUCell` and LayerNorm 173; with bf16 products 118, the loop 112 in bf16 throughout
and with 4 times the error.

Triton, for at most 1,024 rows: one kernel, launched H + 1 times, with the next step's states in memory in between. A
program settles its 16 rows (LayerNorm of all D features, distance to the goal), then computes 64 of the next state's
columns, all three gates of a column together, so that the [E S, 3D] products never leave the registers. The programs
of the same rows settle them each for itself. A planner captures the launches in a CUDA graph, as `CudaGraphs` in
kernels/graphs.py does; launched one by one they take the CPU longer than the GPU.

Counted, not measured (no GPU at hand), a step at D 512 on an H100, float32, as the published planner computes:
200 rows (1 episode): 104 programs read 41 MB of weights from the L2 cache, about 15 us. A loop of library calls in a
    CUDA graph has 4 kernels a step if it is compiled and 18 if not, of 3-5 us each: 1.5 and 4 times as long.
4,000 rows (20 episodes): the programs of this kernel would read 0.8 GB, about 150 us; cuBLAS computes the same 6.3
    GFLOP in 126 us at 50 TFLOP/s. Larger programs read less, but spill registers in float32 (80-900 bytes a thread on
    sm_80, compiled ahead of time), and in bf16 cuBLAS is as fast. So many rows take the PyTorch path.
Neither path stores a trajectory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from kernels.dispatch import INTERPRETED, jit, on_its_device, operand_type, takes_triton, tl, triton

CACHED_ROWS = 256  # fit a CPU's caches: 4 episodes of 200 rows, D 512, 90 steps: 0.51 s; 512 rows 0.59, all 0.77
# of the Triton kernel, untuned: no GPU at hand
MOST_ROWS = 1024  # plans of all episodes
ROWS, COLS = 16, 64  # of a program: many small ones, so that every multiprocessor has one


# ---------------------------------------------------------------------------------------------------------- PyTorch
def _formula(state, actions, goal, w_ih, w_hh, b_ih, b_hh, ln_weight, ln_bias, objective: str) -> Tensor:
    """The products with w_hh are in its dtype, everything else in that of the state."""
    E, S, H, A = actions.shape
    kind = state.device.type
    if kind == "cpu" and E > 1 and E * S > CACHED_ROWS:  # a few episodes at a time: their states stay in the caches
        parts = zip(*(x.split(max(1, CACHED_ROWS // S)) for x in (state, actions, goal)))
        weights = (w_ih, w_hh, b_ih, b_hh, ln_weight, ln_bias)
        return torch.cat([_formula(*part, *weights, objective) for part in parts])
    D = state.shape[-1]
    h = state.repeat_interleave(S, 0)  # [E*S, D]
    goal = goal.repeat_interleave(S, 0)
    actions = actions.permute(2, 0, 1, 3).reshape(H, E * S, A).contiguous()
    (w_r, w_u, w_n), (v_r, v_u, v_n) = ((w.t() for w in x.chunk(3)) for x in (w_ih, w_hh))  # [A, D], [D, D] each
    (b_r, b_u, _), (_, _, b_n), (_, _, c_n) = (b.chunk(3) for b in (b_ih + b_hh, b_ih, b_hh))
    cost = torch.zeros(E * S, dtype=torch.promote_types(state.dtype, torch.float32), device=state.device)
    with torch.autocast(kind, enabled=False):
        for t in range(H):
            o = h.to(w_hh.dtype)  # gate by gate: 139 ms for 200 rows, 90 steps, D 512, against 195 with one product
            r = torch.addmm(b_r, actions[t], w_r).add_(o @ v_r).sigmoid_()
            u = torch.addmm(b_u, actions[t], w_u).add_(o @ v_u).sigmoid_()
            new = torch.addmm(b_n, actions[t], w_n).addcmul_(r, o @ v_n + c_n).tanh_()
            h = layer_norm(torch.lerp(new, h, u), (D,), ln_weight, ln_bias)
            if objective == "sum" or t == H - 1:
                cost += (h - goal).to(cost.dtype).square().mean(1)
    return cost.view(E, S)


# ----------------------------------------------------------------------------------------------------------- Triton
@jit
def from_action(
    gate: tl.constexpr, c, row, action, w_ih, b_ih, b_hh, rows, A, D, stride_a, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Columns c of a gate, as far as they come from the actions and the biases outside the reset gate's reach."""
    b = tl.load(b_ih + gate * D + c, mask=c < D, other=0.0).to(tl.float32)
    if gate < 2:
        b += tl.load(b_hh + gate * D + c, mask=c < D, other=0.0).to(tl.float32)
    x = tl.zeros([ROWS, COLS], tl.float32) + b[None, :]
    for k in range(A):
        a = tl.load(action + k * stride_a, mask=row < rows, other=0.0).to(tl.float32)
        w = tl.load(w_ih + (gate * D + c) * A + k, mask=c < D, other=0.0).to(tl.float32)
        x += a[:, None] * w[None, :]
    return x


@jit
def normalised(z, d, inside, weight, bias, D):
    """LayerNorm of rows z [SETTLED, WIDTH], whose columns d >= D are zero and stay it."""
    z = tl.where(inside, z - tl.sum(z, 1)[:, None] / D, 0.0)
    z = z / tl.sqrt(tl.sum(z * z, 1) / D + 1e-5)[:, None]
    z = z * tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    return z + tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]


@jit
def add_distance(z, r, d, inside, goal, cost, rows, S, D):
    """Adds to the cost of rows r their mean squared distance to the goal of their episode."""
    towards = (r // S).to(tl.int64)[:, None] * D + d[None, :]
    off = tl.where(inside, z - tl.load(goal + towards, mask=inside, other=0.0).to(tl.float32), 0.0)
    before = tl.load(cost + r, mask=r < rows, other=0.0)
    tl.store(cost + r, before + tl.sum(off * off, 1) / D, mask=r < rows)


# the horizon shrinks towards the end of an episode and must not compile anew
@jit(do_not_specialize=["t", "H", "stride_e", "stride_s", "stride_h", "stride_a"])
def rollout_kernel(
    actions,  # [E, S, H, A]
    goal,  # [E, D]
    w_ih,  # [3D, A]
    w_hh,  # [3D, D] in the dtype of the products
    b_ih,  # [3D]
    b_hh,  # [3D]
    ln_weight,  # [D]
    ln_bias,  # [D]
    source,  # [rows, D] float32: the state before its LayerNorm
    state,  # [rows, D] float32 out: the state
    operand,  # [shares, rows, D] out: the state in the dtype of the products, a copy for every share of the columns
    target,  # [rows, D] float32 out: the next state before its LayerNorm
    cost,  # [rows] float32, added to
    t,  # of the H + 1 states, the one to settle
    rows, S, H, A, D, stride_e, stride_s, stride_h, stride_a,
    SUM: tl.constexpr,  # cost of all states, not of the last
    DOT: tl.constexpr,  # dtype of the products
    WIDTH: tl.constexpr,  # D, rounded up to a power of 2
    SETTLED: tl.constexpr,  # rows settled at a time
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block, share = tl.program_id(0), tl.program_id(1)
    row, d = block * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    at_row = row.to(tl.int64)[:, None] * D
    of_share = (d >= share * COLS) & (d < (share + 1) * COLS)
    operand += share.to(tl.int64) * rows * D
    for r0 in range(0, ROWS, SETTLED):
        r = block * ROWS + r0 + tl.arange(0, SETTLED)
        inside, at = (r < rows)[:, None] & (d < D)[None, :], r.to(tl.int64)[:, None] * D + d[None, :]
        z = tl.load(source + at, mask=inside, other=0.0)
        if t > 0:
            z = normalised(z, d, inside, ln_weight, ln_bias, D)
            if (share == 0) & (SUM | (t == H)):
                add_distance(z, r, d, inside, goal, cost, rows, S, D)
        tl.store(operand + at, z.to(operand.dtype.element_ty), mask=inside)
        tl.store(state + at, z, mask=inside & of_share[None, :])
    tl.debug_barrier()  # the settled state is there for every thread of the program
    if t < H:
        e = (row // S).to(tl.int64)
        action = actions + e * stride_e + (row % S).to(tl.int64) * stride_s + t * stride_h  # [ROWS] pointers
        c = share * COLS + tl.arange(0, COLS)
        reset = from_action(0, c, row, action, w_ih, b_ih, b_hh, rows, A, D, stride_a, ROWS, COLS)
        update = from_action(1, c, row, action, w_ih, b_ih, b_hh, rows, A, D, stride_a, ROWS, COLS)
        b_new = tl.load(b_hh + 2 * D + c, mask=c < D, other=0.0).to(tl.float32)
        new = tl.zeros([ROWS, COLS], tl.float32) + b_new[None, :]
        for k0 in range(0, D, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            w, known = w_hh + c[None, :] * D + k[:, None], (c < D)[None, :] & (k < D)[:, None]
            there = (row < rows)[:, None] & (k < D)[None, :]
            h = tl.load(operand + at_row + k[None, :], mask=there, other=0.0).to(DOT)
            w_r = tl.load(w, mask=known, other=0.0).to(DOT)
            w_u = tl.load(w + D * D, mask=known, other=0.0).to(DOT)
            w_n = tl.load(w + 2 * D * D, mask=known, other=0.0).to(DOT)
            reset = tl.dot(h, w_r, reset, input_precision="tf32x3")
            update = tl.dot(h, w_u, update, input_precision="tf32x3")
            new = tl.dot(h, w_n, new, input_precision="tf32x3")
        x = from_action(2, c, row, action, w_ih, b_ih, b_hh, rows, A, D, stride_a, ROWS, COLS)
        new = x + tl.sigmoid(reset) * new
        new = 2 * tl.sigmoid(2 * new) - 1  # tanh
        there = (row < rows)[:, None] & (c < D)[None, :]
        now = tl.load(state + at_row + c[None, :], mask=there, other=0.0)
        tl.store(target + at_row + c[None, :], new + tl.sigmoid(update) * (now - new), mask=there)


# --------------------------------------------------------------------------------------------------------------- op
@torch.library.custom_op("nanojepa::gru_rollout_cost", mutates_args=())
@on_its_device
def op(
    state: Tensor, actions: Tensor, goal: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor,
    ln_weight: Tensor, ln_bias: Tensor, objective: str,
) -> Tensor:  # fmt: skip
    if not (state.is_cuda or INTERPRETED):
        return _formula(state, actions, goal, w_ih, w_hh, b_ih, b_hh, ln_weight, ln_bias, objective)
    (E, S, H, A), D = actions.shape, state.shape[1]
    rows = E * S
    cost = torch.zeros(rows, dtype=torch.float32, device=state.device)
    if rows * H == 0:
        return cost.view(E, S)
    shares, width = triton.cdiv(D, COLS), triton.next_power_of_2(D)
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=state.device)
    source, operand = new(rows, D), new(shares, rows, D, dtype=w_hh.dtype)
    source.view(E, S, D).copy_(state[:, None])
    settled, target = new(rows, D), new(rows, D)
    tensors = [x.contiguous() for x in (goal, w_ih, w_hh, b_ih, b_hh, ln_weight, ln_bias)]
    for t in range(H + 1):
        rollout_kernel[triton.cdiv(rows, ROWS), shares](
            actions, *tensors, source, settled, operand, target, cost,
            t, rows, S, H, A, D, *actions.stride(),
            SUM=objective == "sum", DOT=operand_type(w_hh.dtype),
            WIDTH=width, SETTLED=min(ROWS, max(1, 8192 // width)), ROWS=ROWS, COLS=COLS, BLOCK_K=128 // w_hh.itemsize,
            num_warps=4, num_stages=4,
        )  # fmt: skip
        source, target = target, source
    return cost.view(E, S)


@op.register_fake
def _(state, actions, goal, w_ih, w_hh, b_ih, b_hh, ln_weight, ln_bias, objective):
    return state.new_empty(actions.shape[:2], dtype=torch.promote_types(state.dtype, torch.float32))


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

    Computed in the dtype of the arguments, one for all; under autocast the products with w_hh, nearly all of the work,
    are in autocast's. Where an argument wants a gradient the PyTorch path gives it; the kernel has none. No rows give
    an empty cost, no steps a cost of 0; NaN in a row's state, actions or goal, or in a weight, gives NaN. Raises
    ValueError for another objective.
    """
    if objective not in ("sum", "last"):
        raise ValueError(f"objective must be 'sum' or 'last', got {objective!r}")
    kind = state.device.type
    if torch.is_autocast_enabled(kind) and state.dtype != torch.float64:
        w_hh = w_hh.to(torch.get_autocast_dtype(kind))
    arguments = (state, actions, goal, w_ih, w_hh, b_ih, b_hh, ln_weight, ln_bias)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in arguments)
    unless = "an argument wants a gradient, which the rollout's kernel does not give" if wanted else ""
    if actions.shape[0] * actions.shape[1] > MOST_ROWS:
        unless = f"with more than {MOST_ROWS} plans the rollout's PyTorch path is as fast"
    return (op if takes_triton(*arguments, unless=unless) else _formula)(*arguments, objective)
