"""Builds libcuda.so.1, a GPU that computes nothing, into a folder: python tests/nullgpu/build.py FOLDER

driver.c holds the functions that fill something in. For every other function of CUDA's libraries that PyTorch links to,
a line that returns 0 is written here. Needs gcc and nm; the headers come with PyTorch's CUDA build.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
CUDA = re.compile(r"_{0,2}(cuda|cublas|cudnn|cusolver|cusparse|cufft|curand|nvrtc|nvJitLink|cu)[A-Z]\w*$")
# the driver's functions that Triton's and inductor's launchers look up by name
LOOKED_UP = "cuCtxSetCurrent cuModuleUnload cuFuncSetAttribute cuFuncSetCacheConfig cuCtxPushCurrent_v2 cuCtxSetLimit"
LOOKED_UP += " cuLibraryLoadData cuTensorMapEncodeTiled cuStreamWriteValue32 cuMemsetD32Async cuFuncGetModule"
LOOKED_UP += " cuMemAddressFree cuMemUnmap cuMemRelease cuMemSetAccess"


def obstacle() -> str:
    """What keeps this machine from building it, or ""."""
    if not (shutil.which("gcc") and shutil.which("nm")):
        return "gcc and nm are needed"
    return "" if headers() else "PyTorch's CUDA headers are not installed"


def headers() -> Path | None:
    found = Path(torch.__file__).parents[1].glob("nvidia/*/include/driver_types.h")
    return next((path.parent for path in found), None)


def build(folder: Path) -> Path:
    """-> the library, folder/libcuda.so.1."""
    source = (HERE / "driver.c").read_text()
    written = set(re.findall(r"\b(\w+)\(", source)) | set(re.findall(r"(?:NEW|LAUNCH|NO_WORKSPACE)\((\w+)", source))
    wanted = set(LOOKED_UP.split())
    for library in Path(torch.__file__).parent.glob("lib/*cuda*.so*"):
        symbols = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True).stdout
        wanted |= {line.split()[-1].split("@")[0] for line in symbols.splitlines()}
    rest = sorted(name for name in wanted - written if CUDA.match(name))
    lines = [f'__attribute__((visibility("default"))) int {name}() {{ return 0; }}' for name in rest]
    (folder / "crt").mkdir(parents=True, exist_ok=True)
    # the one header that does not come with PyTorch: what it defines for other compilers
    words = "__device_builtin__ __host__ __device__ CUDARTAPI __cudart_builtin__ __device_builtin_texture_type__"
    words += " __device_builtin_surface_type__"
    macros = [f"#define {word}" for word in words.split()]
    macros += [f"#define {name}(n) __attribute__((aligned(n)))" for name in ("__align__", "__builtin_align__")]
    (folder / "crt" / "host_defines.h").write_text("\n".join(macros) + "\n")
    (folder / "rest.c").write_text("\n".join(lines))
    out = folder / "libcuda.so.1"
    command = [
        "gcc",
        "-O1",
        "-w",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-fno-builtin",
        f"-I{folder}",
        f"-I{headers()}",
    ]
    command += ["-o", out, HERE / "driver.c", folder / "rest.c", "-Wl,-soname,libcuda.so.1", "-ldl", "-lpthread"]
    subprocess.run(command, check=True)
    return out


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
