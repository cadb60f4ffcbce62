"""Variance and covariance regularisation (VICReg, Bardes et al. 2022, arXiv 2105.04906, eqs. 1-4).

    v = mean_d relu(margin - sqrt(Var(z_d) + eps))            every feature keeps a standard deviation of `margin`
    c = sum_{i != j} Cov(z)_ij^2 / (D (D - 1))                features are decorrelated

Cost: 2 N D R FLOPs forward and backward each, R = min(N, D) (forward on a GPU: half of it, by symmetry), 2 N D values
read and N D written. With X the centred [N, D] matrix, ||X'X||_F = ||XX'||_F, so for N < D the sum of all squared
covariances comes from the N x N Gram matrix and the D x D covariance matrix is never made.

    dc/dX = 4 / (D (D - 1) (N - 1)^2) (XX'X - X diag(X'X))    XX'X = (XX')X for N < D, X(X'X) otherwise

The [R, R] product is kept for the backward, in float32: 16 KB at (65536, 64), 256 KB at (256, 2048), 1 MB at
(6528, 512), far below z itself. With it the backward is one product, without it two. Columns of dc/dX add up to zero,
so it is the gradient to z as well.

Triton: products of tiles (upper triangle only, the long axis split over programs) -> sums over the splits and their
squares -> the two losses; backward in one launch. Every sum runs in a fixed order through partial buffers (4 to 17
MB), so equal input gives equal output. Products are tf32x3, three tensor-core products with an error near float32's:
centred bf16 input no longer fits bf16, and plain tf32 would cost three digits. Launch constants are untuned: no GPU at
hand. On 2 CPU cores two views of (256, 2048) take 7 ms forward and backward; with D x D covariances 95.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import relu

from kernels.dispatch import INTERPRETED, block_of, jit, on_its_device, takes_triton, tl, triton

PROGRAMS = 264  # aim for two programs on each of a large GPU's 132 multiprocessors
BLOCK_K = 32  # values of the inner axis at a time


def _launch(R: int) -> tuple[int, int, int]:
    """R -> side of a tile of the product, warps, pipeline stages. Untuned: no GPU at hand."""
    return (64, 4, 3) if R <= 256 else (128, 8, 3)  # the gradient has the first: in the second it spills registers


# ---------------------------------------------------------------------------------------------------------- PyTorch
def _formula(z: Tensor, margin: float, eps: float) -> tuple[Tensor, ...]:
    """-> v, c, and what the backward reads: mean [D], variance [D], product [R, R]."""
    N, D = z.shape
    with torch.autocast(z.device.type, enabled=False):  # statistics in full precision, whatever the networks use
        z = z if z.dtype == torch.float64 else z.float()
        mean = z.mean(0)
        x = z - mean
        product = x @ x.T if N < D else x.T @ x  # the smaller of the two, same Frobenius norm
        variance = (x.square().sum(0) if N < D else product.diagonal()) / (N - 1)  # [D]
        off_diagonal = product.square().sum() / (N - 1) ** 2 - variance.square().sum()
        v = relu(margin - torch.sqrt(variance + eps)).mean()
        return v, off_diagonal / (D * (D - 1)), mean, variance, product


def _gradient(grad_v, grad_c, z, mean, variance, product, margin: float, eps: float) -> Tensor:
    """What autograd makes of _formula, written out: one product instead of two, and fewer passes over z."""
    N, D = z.shape
    with torch.autocast(z.device.type, enabled=False):
        x = z.to(mean.dtype) - mean
        std = torch.sqrt(variance + eps)
        scale = 4 * grad_c / (D * (D - 1) * (N - 1))
        own = scale * variance + torch.where(std < margin, grad_v / (D * (N - 1) * std), 0)  # [D]
        product = product * (scale / (N - 1))
        return (product @ x - x * own if N < D else x @ (product - torch.diag(own))).to(z.dtype)


# ----------------------------------------------------------------------------------------------------------- Triton
@jit
def centred(z, mean, n, d, N, D, stride_n, stride_d):
    """z[n, d] - mean[d] in float32, zero outside."""
    inside = (n < N)[:, None] & (d < D)[None, :]
    m = tl.load(mean + d, mask=d < D, other=0.0)
    return tl.where(inside, block_of(z, n, d, N, D, stride_n, stride_d) - m[None, :], 0.0)


@jit
def product_kernel(
    z,  # [N, D]
    mean,  # [D]
    tiles,  # [splits, pairs, TILE, TILE] out: partial products of tiles i <= j
    squares,  # [sides, D] out for N < D: sums of squares over the rows of a tile, for the variance
    N, D, stride_n, stride_d,
    depth,  # length of a split along the long axis
    GRAM: tl.constexpr,  # N < D
    TILE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i, j, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if j < i:  # the product is symmetric
        return
    a, b = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    product = tl.zeros([TILE, TILE], tl.float32)
    for k0 in range(split * depth, tl.minimum((split + 1) * depth, D if GRAM else N), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        if GRAM:
            left = centred(z, mean, a, k, N, D, stride_n, stride_d)
            right = tl.trans(centred(z, mean, b, k, N, D, stride_n, stride_d))
            if i == j:
                tl.store(squares + i * D + k, tl.sum(left * left, 0), mask=k < D)
        else:
            left = tl.trans(centred(z, mean, k, a, N, D, stride_n, stride_d))
            right = centred(z, mean, k, b, N, D, stride_n, stride_d)
        product = tl.dot(left, right, product, input_precision="tf32x3")
    sides = tl.num_programs(0)
    pairs, pair = sides * (sides + 1) // 2, i * sides - i * (i - 1) // 2 + j - i
    at = tl.arange(0, TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    tl.store(tiles + (split * pairs + pair).to(tl.int64) * TILE * TILE + at, product)


@jit
def reduce_kernel(
    tiles,  # [splits, pairs, TILE, TILE]
    product,  # [R, R] out
    norms,  # [pairs, TILE] out: sum of squares of a row of a tile and of its mirror image
    splits, R,
    GRAM: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, j, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if j < i:
        return
    sides = tl.num_programs(0)
    pairs, pair = sides * (sides + 1) // 2, i * sides - i * (i - 1) // 2 + j - i
    total = tl.zeros([TILE], tl.float32)
    for s0 in range(0, splits, BLOCK):
        s = s0 + tl.arange(0, BLOCK)
        at = ((s.to(tl.int64) * pairs + pair) * TILE + row)[:, None] * TILE + tl.arange(0, TILE)[None, :]
        total += tl.sum(tl.load(tiles + at, mask=(s < splits)[:, None], other=0.0), 0)
    r, c = i * TILE + row, j * TILE + tl.arange(0, TILE)
    inside = (r < R) & (c < R)
    tl.store(product + r * R + c, total, mask=inside)
    tl.store(product + c * R + r, total, mask=inside & (j > i))  # a tile on the diagonal is whole already
    if not GRAM:
        inside = inside & (c != r)  # for N < D finish_kernel subtracts the variances instead
    tl.store(norms + pair * TILE + row, tl.where(j > i, 2.0, 1.0) * tl.sum(tl.where(inside, total * total, 0.0)))


@jit
def finish_kernel(
    norms,  # [count]
    product,  # [R, R]
    squares,  # [sides, D]
    variance,  # [D] out
    v,  # [] out
    c,  # [] out
    count, sides, N, D, margin, eps,
    GRAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    total, hinge, own = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for o in range(0, count, BLOCK):
        at = o + tl.arange(0, BLOCK)
        total += tl.load(norms + at, mask=at < count, other=0.0)
    for d0 in range(0, D, BLOCK):
        d = d0 + tl.arange(0, BLOCK)
        if GRAM:
            var = tl.zeros([BLOCK], tl.float32)
            for i in range(sides):
                var += tl.load(squares + i * D + d, mask=d < D, other=0.0)
        else:
            var = tl.load(product + d * (D + 1), mask=d < D, other=0.0)
        var = var / (N - 1)
        tl.store(variance + d, var, mask=d < D)
        gap = margin - tl.sqrt(var + eps)
        hinge += tl.where((gap <= 0) | (d >= D), 0.0, gap)  # written so that NaN stays NaN
        if GRAM:
            own += var * var
    n, width = (N - 1).to(tl.float32), D.to(tl.float32)
    tl.store(v, tl.sum(hinge) / width)
    tl.store(c, (tl.sum(total) / (n * n) - tl.sum(own)) / (width * (width - 1)))


@jit
def gradient_kernel(
    grad_v,  # []
    grad_c,  # []
    z,  # [N, D]
    mean,  # [D]
    variance,  # [D]
    product,  # [R, R]
    grad,  # [N, D] out
    N, D, stride_n, stride_d, margin, eps,
    GRAM: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n, d = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.program_id(1) * TILE + tl.arange(0, TILE)
    pull = tl.zeros([TILE, TILE], tl.float32)  # XX'X
    for k0 in range(0, N if GRAM else D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        if GRAM:
            left, right = block_of(product, n, k, N, N, N, 1), centred(z, mean, k, d, N, D, stride_n, stride_d)
        else:
            left, right = centred(z, mean, n, k, N, D, stride_n, stride_d), block_of(product, k, d, D, D, D, 1)
        pull = tl.dot(left, right, pull, input_precision="tf32x3")
    x = centred(z, mean, n, d, N, D, stride_n, stride_d)
    var = tl.load(variance + d, mask=d < D, other=1.0)
    std, rows, width = tl.sqrt(var + eps), (N - 1).to(tl.float32), D.to(tl.float32)
    scale = 4 * tl.load(grad_c) / (width * (width - 1) * rows)
    own = scale * var + tl.where(std < margin, tl.load(grad_v) / (width * rows * std), 0.0)
    at = n.to(tl.int64)[:, None] * D + d[None, :]
    value = pull * (scale / rows) - x * own[None, :]
    tl.store(grad + at, value.to(grad.dtype.element_ty), mask=(n < N)[:, None] & (d < D)[None, :])


# --------------------------------------------------------------------------------------------------------------- op
@torch.library.custom_op("nanojepa::variance_covariance", mutates_args=())
@on_its_device
def op(z: Tensor, margin: float, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not (z.is_cuda or INTERPRETED):
        return _formula(z, margin, eps)
    N, D = z.shape
    gram, R, K = N < D, min(N, D), max(N, D)
    tile, warps, stages = _launch(R)
    sides = triton.cdiv(R, tile)
    pairs = sides * (sides + 1) // 2
    depth = BLOCK_K * triton.cdiv(K, BLOCK_K * max(1, PROGRAMS // pairs))
    splits = triton.cdiv(K, depth)
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=z.device)
    tiles, norms, squares = new(splits, pairs, tile, tile), new(pairs, tile), new(sides, D)
    mean, v, c, variance, product = z.mean(0, dtype=torch.float32), new(), new(), new(D), new(R, R)
    product_kernel[sides, sides, splits](
        z, mean, tiles, squares, N, D, *z.stride(), depth,
        GRAM=gram, TILE=tile, BLOCK_K=BLOCK_K, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    reduce_kernel[sides, sides, tile](tiles, product, norms, splits, R, GRAM=gram, TILE=tile, BLOCK=32)
    finish_kernel[1,](
        norms, product, squares, variance, v, c, pairs * tile, sides, N, D, margin, eps, GRAM=gram, BLOCK=1024
    )
    return v, c, mean, variance, product


@torch.library.custom_op("nanojepa::variance_covariance_backward", mutates_args=())
@on_its_device
def backward_op(
    grad_v: Tensor, grad_c: Tensor, z: Tensor, mean: Tensor, variance: Tensor, product: Tensor,
    margin: float, eps: float,
) -> Tensor:  # fmt: skip
    if not (z.is_cuda or INTERPRETED):
        return _gradient(grad_v, grad_c, z, mean, variance, product, margin, eps)
    N, D = z.shape
    tile, warps, stages = _launch(1)
    grad = torch.empty_like(z, memory_format=torch.contiguous_format)
    gradient_kernel[triton.cdiv(N, tile), triton.cdiv(D, tile)](
        grad_v, grad_c, z, mean, variance, product, grad, N, D, *z.stride(), margin, eps,
        GRAM=N < D, TILE=tile, BLOCK_K=BLOCK_K, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return grad


@op.register_fake
def _(z, margin, eps):
    (N, D), new = z.shape, lambda *shape: z.new_empty(shape, dtype=torch.promote_types(z.dtype, torch.float32))
    R = min(N, D)
    return new(), new(), new(D), new(D), new(R, R)


@backward_op.register_fake
def _(grad_v, grad_c, z, mean, variance, product, margin, eps):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], *output[2:])
    ctx.margin, ctx.eps = inputs[1:]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_v, grad_c, *_, gradient=backward_op):
    z, mean, *saved = ctx.saved_tensors
    grads = (mean.new_zeros(()) if g is None else g for g in (grad_v, grad_c))
    return gradient(*grads, z, mean, *saved, ctx.margin, ctx.eps), None, None


op.register_autograd(_backward, setup_context=_setup_context)


class _Plain(torch.autograd.Function):
    """The PyTorch path: as the op, but open to torch.compile."""

    forward, setup_context = staticmethod(_formula), staticmethod(_setup_context)

    @staticmethod
    @once_differentiable  # what forward saved is a constant here
    def backward(ctx, *grads):
        return _backward(ctx, *grads, gradient=_gradient)


def variance_covariance_loss(z: Tensor, margin: float = 1.0, eps: float = 1e-4) -> tuple[Tensor, Tensor]:
    """z [N, D] -> (variance loss, covariance loss), both 0-d, in float32 (float64 for float64 input).

    Unbiased variance and covariance; differentiable once. NaN in z gives NaN in both losses and in the gradient of its
    column at least. Raises ValueError unless z is a matrix with N >= 2 and D >= 2.
    """
    if z.ndim != 2 or z.shape[0] < 2 or z.shape[1] < 2:
        raise ValueError(f"variance_covariance_loss needs z of shape [N >= 2, D >= 2], got {tuple(z.shape)}")
    v, c, *_ = (op if takes_triton(z) else _Plain.apply)(z, margin, eps)
    return v, c
