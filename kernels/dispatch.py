"""Which path computes: Triton kernels on NVIDIA GPUs, plain PyTorch everywhere else."""

import contextlib
import functools
import os
import shutil
import warnings

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a platform without Triton: PyTorch does everything and no kernel is ever called
    triton = tl = None

INTERPRETED = triton is not None and triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: on the CPU
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what the kernels read; they add up in float32
_choice: bool | None = None


def jit(function=None, **options):
    if triton is None:
        return function or (lambda plain: plain)
    return triton.jit(function, **options)


@jit
def block_of(x, i, j, I, J, stride_i, stride_j):
    """x[i, j] in float32, zero outside; for rows i, columns j of x [I, J]."""
    at = i.to(tl.int64)[:, None] * stride_i + j[None, :] * stride_j
    return tl.load(x + at, mask=(i < I)[:, None] & (j < J)[None, :], other=0.0).to(tl.float32)


def on_its_device(op):
    """Triton launches on the current GPU; the op's tensors may be on another."""

    @functools.wraps(op)
    def wrapped(first, *rest):
        with torch.cuda.device_of(first) if first.is_cuda else contextlib.nullcontext():
            return op(first, *rest)

    return wrapped


def operand_type(dtype: torch.dtype):
    """Triton's dtype for a product's operands: float32 in the interpreter, whose dot takes bf16 for integers."""
    return tl.float32 if INTERPRETED else getattr(tl, str(dtype).removeprefix("torch."))


def use_triton(enabled: bool | None) -> None:
    """None (default): Triton where it can run, else PyTorch. False: PyTorch. True: Triton, or an error with the reason.

    Holds for the process. Raises RuntimeError for True without triton; a call whose tensors forbid it raises then.
    """
    global _choice
    if enabled and triton is None:
        raise RuntimeError("Triton kernels were asked for, but triton is not installed")
    _choice = enabled


@functools.cache
def _obstacle(kind: str, index: int | None, automatic: bool) -> str:
    """What keeps the kernels from running on this device, or "". Said once where Triton would have been chosen."""
    if kind != "cuda":
        return "" if kind == "cpu" and INTERPRETED else f"they run on CUDA devices and the tensors are on {kind}"
    reason = ""
    if triton is None:
        reason = "triton is not installed"
    elif torch.version.hip or torch.cuda.get_device_capability(index) < (8, 0):
        reason = "they need an NVIDIA GPU of compute capability 8.0 or higher"
    elif not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        reason = "Triton needs a C compiler to launch them, and there is none (apt install gcc)"
    if reason and automatic:
        warnings.warn(f"kernels: PyTorch instead of Triton on {kind}: {reason}", stacklevel=3)
    return reason


def obstacle(kind: str, index: int | None, automatic: bool) -> str:
    return _obstacle(kind, index, automatic)


# torch.compile calls it while tracing. This is torch.compiler.assume_constant_result without its second of imports.
obstacle._dynamo_marked_constant = True


def takes_triton(*tensors: Tensor, unless: str = "") -> bool:
    """Whether these arguments go to the Triton op. `unless`: the caller's own reason against it.

    Raises RuntimeError with the reason where use_triton(True) cannot be met.
    """
    device = tensors[0].device
    if _choice is False or (_choice is None and device.type != "cuda"):
        return False
    reason = unless
    if not all(x.dtype in DTYPES for x in tensors):
        reason = f"they compute in float32 and the tensors are {', '.join(sorted({str(x.dtype) for x in tensors}))}"
    elif not all(x.device == device for x in tensors):
        reason = "the tensors are on different devices"
    reason = reason or obstacle(device.type, device.index, _choice is None)
    if reason and _choice:
        raise RuntimeError(f"Triton kernels were asked for, but {reason}")
    return not reason
