"""Compile the kernels for a GPU that need not be there, as they are launched at the scripts' sizes: triton_aot.py 80|90

One JSON line for each compiled kernel: its name, size of the input, shared memory and stack (spilled registers) in bytes, matrix
instructions.
"""

import json
import re
import subprocess
import sys
import tempfile

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
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    stack = int(re.search(r"STACK:(\d+)", usage)[1])
    matrix = sorted({word for word in ("wgmma.mma_async", "mma.sync") if word in compiled.asm["ptx"]})
    facts = dict(
        shared=compiled.metadata.shared, stack=stack, matrix=matrix, products="tt.dot " in compiled.asm["ttir"]
    )
    print(json.dumps(dict(kernel=f"{kernel.__module__}.{kernel.__name__}", of=label, **facts)), flush=True)


JITFunction.run = compile_instead
for module in (rollout, sigreg, variance_covariance):
    module.INTERPRETED = True  # take tensors on the CPU to the launch
float32 = torch.float32
for N, D, dtype in (  # images, paper and gpu; world model; video, gpu and paper; and a call by somebody else
    (256, 2048, float32), (256, 512, float32), (6528, 512, float32), (40960, 64, float32), (2621440, 64, float32),
    (6528, 512, torch.bfloat16),
):  # fmt: skip
    label = f"variance_covariance {N} x {D} {dtype}"
    z = torch.zeros(N, D, dtype=dtype, requires_grad=True)
    sum(variance_covariance.op(z, 1.0, 1e-4)[:2]).backward()
for N, D in ((256, 128), (4096, 128)):
    label = f"sigreg {N} x {D}"
    z = torch.zeros(N, D, requires_grad=True)
    sigreg.op(z, torch.zeros(D, 256), 3.0, 10)[0].backward()
for D, dtype in ((512, float32), (512, torch.bfloat16), (128, float32)):
    label = f"rollout 1 x 200 x {D} {dtype}"
    vectors = [torch.zeros(n) for n in (3 * D, 3 * D, D, D)]
    state, w_hh = torch.zeros(1, D), torch.zeros(3 * D, D, dtype=dtype)
    rollout.op(state, torch.zeros(1, 200, 9, 2), state, torch.zeros(3 * D, 2), w_hh, *vectors, "sum")
