"""Compile the kernels for a GPU that need not be there, as they are launched at the scripts' sizes: triton_aot.py 80|90

One JSON line for each compiled kernel: its name, size of the input, shared memory in bytes, matrix instructions.
"""

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from kernels import rollout, sigreg, variance_covariance

TARGET = GPUTarget("cuda", int(sys.argv[1]), 32)
seen, label = set(), ""


def compile_instead(kernel, *args, grid, warmup, **kwargs):
    """What JITFunction.run does, up to the launch."""
    backend = make_backend(TARGET)
    kwargs |= dict(debug=False, instrumentation_mode="")
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    key = source.hash(), options.hash()
    if key in seen:
        return
    seen.add(key)
    compiled = triton.compile(source, target=TARGET, options=options.__dict__)
    matrix = sorted({word for word in ("wgmma.mma_async", "mma.sync") if word in compiled.asm["ptx"]})
    facts = dict(shared=compiled.metadata.shared, matrix=matrix, products="tt.dot " in compiled.asm["ttir"])
    print(json.dumps(dict(kernel=f"{kernel.__module__}.{kernel.__name__}", of=label, **facts)), flush=True)


JITFunction.run = compile_instead
for module in (rollout, sigreg, variance_covariance):
    module.INTERPRETED = True  # take tensors on the CPU to the launch
for N, D, dtype in ((256, 2048, torch.float32), (65536, 64, torch.bfloat16), (6528, 512, torch.float32)):
    label = f"variance_covariance {N} x {D} {dtype}"
    z = torch.zeros(N, D, dtype=dtype, requires_grad=True)
    sum(variance_covariance.op(z, 1.0, 1e-4)[:2]).backward()
for N, D in ((256, 128), (4096, 128)):
    label = f"sigreg {N} x {D}"
    z = torch.zeros(N, D, requires_grad=True)
    sigreg.op(z, torch.zeros(D, 256), 3.0, 10)[0].backward()
bf16, fp32 = torch.bfloat16, torch.float32
for E, S, D, dtype in (
    (1, 200, 512, bf16), (20, 200, 512, bf16), (60, 200, 512, bf16), (1000, 128, 512, bf16), (1, 200, 128, bf16),
    (1, 200, 512, fp32), (1000, 128, 512, fp32),
):  # fmt: skip
    label = f"rollout {E} x {S} x {D} {dtype}"
    vectors = [torch.zeros(n) for n in (3 * D, 3 * D, D, D)]
    state, w_hh = torch.zeros(E, D), torch.zeros(3 * D, D, dtype=dtype)
    rollout.op(state, torch.zeros(E, S, 9, 2), state, torch.zeros(3 * D, 2), w_hh, *vectors, "sum")
