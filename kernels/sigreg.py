"""SIGReg: latents pushed towards an isotropic Gaussian (LeJEPA, Balestriero & LeCun 2025, arXiv 2511.08544).

    p_nm     = <z_n, u_m>
    phi_m(t) = mean_n exp(i t p_nm)                           characteristic function of the latents along direction u_m
    loss     = mean_m  integral exp(-t^2/2) |phi_m(t) - exp(-t^2/2)|^2 dt                   the statistic of Epps-Pulley

with the trapezoid rule over [-t_max, t_max]. Cost: 2 N D M FLOPs for the projections, then a sine and a cosine for each
of N M knots / 2 angles: the integrand is even in t, so only the T = ceil(knots / 2) knots t >= 0 are computed.

Triton: the angles are t_k p with evenly spaced t_k, so one sine and cosine of p dt / 2 gives all, each knot turning the
last one by p dt. Three launches: projection, angles and their sums over a part of the rows at once -> sums over
the parts, the integral, and its slope by every sum -> backward, which projects and turns again. 2 T M floats a part (at
most 64 parts) are stored, nothing of size N M. The backward projects anew for every block of the gradient's columns,
2 N D M FLOPs each, rather than write and read N M angles. Projections are tf32x3 (error near float32's): plain tf32
would blur the angles by 1e-3. Sums run in a fixed order. Launch constants are untuned: no GPU at hand. On 2 CPU cores
256 x 128 with 256 directions take 1.7 ms forward and backward; as autograd has it 2.9.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import INTERPRETED, block_of, jit, on_its_device, takes_triton, tl, triton

# Of a program: small, so that a few hundred rows make programs enough. Untuned: no GPU at hand.
BLOCKS = dict(BLOCK_N=32, BLOCK_M=32, BLOCK_K=32)
BLOCK_D = 32


# ---------------------------------------------------------------------------------------------------------- PyTorch
def _knots(t_max: float, knots: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> the T knots t >= 0, the normal density's characteristic function there, the weights of the integral."""
    t = torch.linspace(-t_max, t_max, knots, dtype=like.dtype, device=like.device)[knots // 2 :]
    weight = torch.full_like(t, 2 * 2 * t_max / (knots - 1))  # dt, for t and -t
    weight[-1] /= 2  # the trapezoid's ends count half
    if knots % 2:
        weight[0] /= 2  # t = 0 is its own mirror image
    gauss = torch.exp(-t.square() / 2)
    return t, gauss, weight * gauss


def _formula(z: Tensor, directions: Tensor, t_max: float, knots: int) -> tuple[Tensor, ...]:
    """-> loss, and the functions' real and imaginary part less the normal density's [M, T]."""
    with torch.autocast(z.device.type, enabled=False):  # statistics in full precision, whatever the networks use
        z = z if z.dtype == torch.float64 else z.float()
        t, gauss, weight = _knots(t_max, knots, z)
        angle = (z @ directions.to(z.dtype)).unsqueeze(-1) * t  # [N, M, T]
        real, imaginary = angle.cos().mean(0) - gauss, angle.sin().mean(0)  # [M, T]
        return ((real.square() + imaginary.square()) @ weight).mean(), real, imaginary


def _slopes(real: Tensor, imaginary: Tensor, t_max: float, knots: int, N: int) -> Tensor:
    """[2, T, M]: what sin(t p) and cos(t p) are multiplied with in d loss / d p."""
    t, _, weight = _knots(t_max, knots, real)
    scale = 2 * weight * t / (N * len(real))
    return torch.stack((-scale * real, scale * imaginary)).mT.contiguous()


def _gradient(grad: Tensor, z: Tensor, directions: Tensor, slopes: Tensor, t_max: float, knots: int) -> Tensor:
    """What autograd makes of _formula, written out: for the op on a CPU."""
    with torch.autocast(z.device.type, enabled=False):
        u = directions.to(slopes.dtype)
        t, _, _ = _knots(t_max, knots, slopes)
        angle = (z.to(u.dtype) @ u).unsqueeze(-1) * t
        slope = (angle.sin() * slopes[0].T + angle.cos() * slopes[1].T).sum(-1)  # [N, M]
        return (grad * slope @ u.T).to(z.dtype)


# ----------------------------------------------------------------------------------------------------------- Triton
@jit
def turns(
    z,  # [N, D]
    u,  # [D, M]
    n,  # [BLOCK_N] rows
    m,  # [BLOCK_M] directions
    N, D, M, stride_n, stride_d, stride_u, stride_m, half_step,
    KNOTS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """cos and sin [BLOCK_N, BLOCK_M] of the first angle t_0 p, and of the step dt p from each to the next."""
    p = tl.zeros([n.shape[0], m.shape[0]], tl.float32)
    for k0 in range(0, D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        left, right = block_of(z, n, k, N, D, stride_n, stride_d), block_of(u, k, m, D, M, stride_u, stride_m)
        p = tl.dot(left, right, p, input_precision="tf32x3")
    half = p * half_step
    x, y = tl.cos(half), tl.sin(half)
    step_x, step_y = x * x - y * y, 2 * x * y
    if KNOTS % 2:  # t_0 is 0, else dt / 2
        x, y = x * 0 + 1, y * 0
    return x, y, step_x, step_y


@jit
def sums_kernel(
    z,  # [N, D]
    u,  # [D, M]
    sums,  # [parts, 2, T, M] out: cosines and sines added up over a part of the rows
    N, D, M, stride_n, stride_d, stride_u, stride_m, half_step,
    rows,  # in a part
    KNOTS: tl.constexpr, T: tl.constexpr,
    T_BLOCK: tl.constexpr,  # T, rounded up to a power of 2
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    knot = tl.arange(0, T_BLOCK)[:, None]
    real, imaginary = tl.zeros([T_BLOCK, BLOCK_M], tl.float32), tl.zeros([T_BLOCK, BLOCK_M], tl.float32)
    last = tl.minimum((part + 1) * rows, N)
    for n0 in range(part * rows, last, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        inside = (n < last)[:, None]
        x, y, step_x, step_y = turns(
            z, u, n, m, N, D, M, stride_n, stride_d, stride_u, stride_m, half_step, KNOTS, BLOCK_K
        )
        for k in tl.static_range(T):
            real += tl.where(knot == k, tl.sum(tl.where(inside, x, 0.0), 0)[None, :], 0.0)
            imaginary += tl.where(knot == k, tl.sum(tl.where(inside, y, 0.0), 0)[None, :], 0.0)
            x, y = x * step_x - y * step_y, x * step_y + y * step_x
    at = (part * 2 * T + knot) * M + m[None, :]
    inside = (knot < T) & (m < M)[None, :]
    tl.store(sums + at, real, mask=inside)
    tl.store(sums + at + T * M, imaginary, mask=inside)


@jit
def integral_kernel(
    sums,  # [parts, 2, T, M]
    slopes,  # [2, T, M] out: what sin(t p) and cos(t p) are multiplied with in d loss / d p
    losses,  # [blocks of directions] out
    parts, N, M, half_step,
    KNOTS: tl.constexpr, T: tl.constexpr, T_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,  # parts, rounded up to a power of 2
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    knot, part = tl.arange(0, T_BLOCK)[:, None], tl.arange(0, PARTS)[:, None, None]
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    inside, at = (knot < T) & (m < M), knot * M + m
    every = sums + part * 2 * T * M + at[None, :, :]
    counted = (part < parts) & inside[None, :, :]
    t = half_step * (2 * knot + 1 - KNOTS % 2)
    gauss = tl.exp(-t * t / 2)
    real = tl.sum(tl.load(every, mask=counted, other=0.0), 0) / N - gauss
    imaginary = tl.sum(tl.load(every + T * M, mask=counted, other=0.0), 0) / N
    weight = 4 * half_step * gauss  # dt, for t and -t
    weight = tl.where(knot == T - 1, weight / 2, weight)  # the trapezoid's ends count half
    if KNOTS % 2:
        weight = tl.where(knot == 0, weight / 2, weight)  # t = 0 is its own mirror image
    weight = tl.where(inside, weight, 0.0) / M
    tl.store(losses + tl.program_id(0), tl.sum(tl.where(inside, weight * (real * real + imaginary * imaginary), 0.0)))
    tl.store(slopes + at, -2 * weight * t * real / N, mask=inside)
    tl.store(slopes + at + T * M, 2 * weight * t * imaginary / N, mask=inside)


@jit
def gradient_kernel(
    grad_loss,  # []
    z,  # [N, D]
    u,  # [D, M]
    slopes,  # [2, T, M]
    grad,  # [N, D] out
    N, D, M, stride_n, stride_d, stride_u, stride_m, half_step,
    KNOTS: tl.constexpr, T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n, d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for m0 in range(0, M, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        x, y, step_x, step_y = turns(
            z, u, n, m, N, D, M, stride_n, stride_d, stride_u, stride_m, half_step, KNOTS, BLOCK_K
        )
        slope = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)  # d loss / d p
        for k in tl.static_range(T):
            sine = tl.load(slopes + k * M + m, mask=m < M, other=0.0)[None, :]
            cosine = tl.load(slopes + (T + k) * M + m, mask=m < M, other=0.0)[None, :]
            slope += y * sine + x * cosine
            x, y = x * step_x - y * step_y, x * step_y + y * step_x
        back = tl.trans(block_of(u, d, m, D, M, stride_u, stride_m))
        total = tl.dot(slope, back, total, input_precision="tf32x3")
    total = total * tl.load(grad_loss)
    at = n.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(grad + at, total.to(grad.dtype.element_ty), mask=(n < N)[:, None] & (d < D)[None, :])


# --------------------------------------------------------------------------------------------------------------- op
@torch.library.custom_op("nanojepa::sigreg", mutates_args=())
@on_its_device
def op(z: Tensor, directions: Tensor, t_max: float, knots: int) -> tuple[Tensor, Tensor]:
    """-> loss, slopes [2, T, M] for the backward."""
    (N, D), M, T = z.shape, directions.shape[1], (knots + 1) // 2
    if not (z.is_cuda or INTERPRETED):
        loss, real, imaginary = _formula(z, directions, t_max, knots)
        return loss, _slopes(real, imaginary, t_max, knots, N)
    rows = BLOCKS["BLOCK_N"] * triton.cdiv(N, BLOCKS["BLOCK_N"] * 64)  # at most 64 parts
    parts = triton.cdiv(N, rows)
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=z.device)
    sums, slopes, losses = new(parts, 2, T, M), new(2, T, M), new(triton.cdiv(M, 16))
    knotted = dict(KNOTS=knots, T=T, T_BLOCK=triton.next_power_of_2(T))
    sums_kernel[parts, triton.cdiv(M, BLOCKS["BLOCK_M"])](
        z, directions, sums, N, D, M, *z.stride(), *directions.stride(), t_max / (knots - 1), rows,
        **knotted, **BLOCKS,
    )  # fmt: skip
    integral_kernel[triton.cdiv(M, 16),](
        sums, slopes, losses, parts, N, M, t_max / (knots - 1),
        **knotted, PARTS=triton.next_power_of_2(parts), BLOCK_M=16,
    )  # fmt: skip
    return losses.sum(), slopes


@torch.library.custom_op("nanojepa::sigreg_backward", mutates_args=())
@on_its_device
def backward_op(grad_loss: Tensor, z: Tensor, directions: Tensor, slopes: Tensor, t_max: float, knots: int) -> Tensor:
    if not (z.is_cuda or INTERPRETED):
        return _gradient(grad_loss, z, directions, slopes, t_max, knots)
    (N, D), M = z.shape, directions.shape[1]
    grad = torch.empty_like(z, memory_format=torch.contiguous_format)
    gradient_kernel[triton.cdiv(N, BLOCKS["BLOCK_N"]), triton.cdiv(D, BLOCK_D)](
        grad_loss, z, directions, slopes, grad, N, D, M, *z.stride(), *directions.stride(), t_max / (knots - 1),
        KNOTS=knots, T=(knots + 1) // 2, BLOCK_D=BLOCK_D, **BLOCKS,
    )  # fmt: skip
    return grad


@op.register_fake
def _(z, directions, t_max, knots):
    new = lambda *shape: z.new_empty(shape, dtype=torch.promote_types(z.dtype, torch.float32))
    return new(), new(2, (knots + 1) // 2, directions.shape[1])


@backward_op.register_fake
def _(grad_loss, z, directions, slopes, t_max, knots):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.t_max, ctx.knots = inputs[2:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, _):
    if grad_loss is None:
        return None, None, None, None
    return backward_op(grad_loss, *ctx.saved_tensors, ctx.t_max, ctx.knots), None, None, None


op.register_autograd(_backward, setup_context=_setup_context)


def sigreg_loss(z: Tensor, directions: Tensor, t_max: float = 3.0, knots: int = 10) -> Tensor:
    """z [N, D], directions [D, M] with unit columns -> 0-d loss in float32 (float64 for float64 input).

    Raises ValueError for other shapes, fewer than 2 knots, or directions that want a gradient: they are constants here.
    NaN in z gives NaN.
    """
    if z.ndim != 2 or directions.ndim != 2 or z.shape[1] != directions.shape[0] or 0 in (*z.shape, *directions.shape):
        shapes = f"{tuple(z.shape)} and {tuple(directions.shape)}"
        raise ValueError(f"sigreg_loss needs z [N, D] and directions [D, M], got {shapes}")
    if knots < 2 or not t_max > 0:
        raise ValueError(f"sigreg_loss needs knots >= 2 and t_max > 0, got {knots} and {t_max}")
    if directions.requires_grad:
        raise ValueError("sigreg_loss gives no gradient to directions: pass directions.detach()")
    return (op if takes_triton(z, directions) else _formula)(z, directions, t_max, knots)[0]
