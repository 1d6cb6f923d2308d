"""Builds factor.cubin: cuSolverDx's Cholesky beside our factor, at 8 to 128 ranks. Needs no GPU.

    pip install nvidia-libmathdx-cu13 nvidia-cuda-nvrtc==13.0.* nvidia-nvjitlink==13.0.*
    python benchmarks/mathdx/build.py factor.cubin

libmathdx generates cuSolverDx functions as LTO-IR under names of our choice, and the library they
call as a fat binary; nvJitLink links both with the kernel of factor.cu, compiled by nvcc.
"""

import ctypes
import pathlib
import subprocess
import sys
import tempfile

import nvidia.cu13

# Values of libmathdx's enumerations, from libcusolverdx.h and libcommondx.h.
SIZE, TYPE, PRECISION, SM, EXECUTION, BLOCK_DIM, API, FUNCTION, ARRANGEMENT, FILL_MODE = range(10)
SYMBOL_NAME = 0
REAL, FLOAT32, BLOCK, SHARED_MEMORY, ROW_MAJOR, LOWER = 0, 5, 1, 0, 1, 1
POTRF, POTRS = 2, 3
NVJITLINK_LTOIR, NVJITLINK_FATBIN = 3, 4  # nvJitLinkInputType

LIBRARIES = pathlib.Path(nvidia.cu13.__path__[0]) / "lib"
HERE = pathlib.Path(__file__).resolve().parent
THREADS = {8: 32, 16: 32, 32: 32, 64: 64, 128: 128}


def load(pattern: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(next(LIBRARIES.glob(pattern))), mode=ctypes.RTLD_GLOBAL)


def check(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"status {status}")


def generate(mathdx: ctypes.CDLL, n: int, function: int, name: str) -> tuple[bytes, bytes]:
    """LTO-IR of one function, and the fat binary of what it calls."""
    handle = ctypes.c_longlong()
    check(mathdx.cusolverdxCreateDescriptor(ctypes.byref(handle)))

    def operator(kind, *values):
        array = (ctypes.c_longlong * len(values))(*values)
        if len(values) == 1:
            check(mathdx.cusolverdxSetOperatorInt64(handle, kind, array[0]))
        else:
            check(mathdx.cusolverdxSetOperatorInt64s(handle, kind, len(values), array))

    operator(SIZE, n, n, 1)
    operator(TYPE, REAL)
    operator(PRECISION, FLOAT32)
    operator(SM, 900)
    operator(EXECUTION, BLOCK)
    operator(BLOCK_DIM, THREADS[n], 1, 1)
    operator(API, SHARED_MEMORY)
    operator(FUNCTION, function)
    operator(ARRANGEMENT, ROW_MAJOR, ROW_MAJOR)
    operator(FILL_MODE, LOWER)
    check(mathdx.cusolverdxSetOptionStr(handle, SYMBOL_NAME, name.encode()))
    return (
        fetch(handle, mathdx.cusolverdxGetLTOIRSize, mathdx.cusolverdxGetLTOIR),
        fetch(handle, mathdx.cusolverdxGetUniversalFATBINSize, mathdx.cusolverdxGetUniversalFATBIN),
    )


def fetch(handle, size_of, get) -> bytes:
    size = ctypes.c_size_t()
    check(size_of(handle, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    check(get(handle, size, buffer))
    return buffer.raw


def link(inputs: list[tuple[int, bytes, str]]) -> bytes:
    jit = load("libnvJitLink.so*")
    handle = ctypes.c_void_p()
    options = [b"-arch=sm_90", b"-lto", b"-O3"]
    array = (ctypes.c_char_p * len(options))(*options)
    version = next(f"__{v}" for v in ("13_0", "13_1") if hasattr(jit, f"__nvJitLinkCreate_{v}"))

    def call(name, *arguments):
        status = getattr(jit, f"__nvJitLink{name}_{version[2:]}")(*arguments)
        if status:
            size = ctypes.c_size_t()
            getattr(jit, f"__nvJitLinkGetErrorLogSize_{version[2:]}")(handle, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value + 1)
            getattr(jit, f"__nvJitLinkGetErrorLog_{version[2:]}")(handle, log)
            raise RuntimeError(f"nvJitLink {name}: {status}\n{log.value.decode()}")

    call("Create", ctypes.byref(handle), len(options), array)
    for kind, data, name in inputs:
        call("AddData", handle, kind, data, ctypes.c_size_t(len(data)), name.encode())
    call("Complete", handle)
    size = ctypes.c_size_t()
    call("GetLinkedCubinSize", handle, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    call("GetLinkedCubin", handle, cubin)
    return cubin.raw


def main() -> None:
    load("libnvrtc-builtins.so*")
    load("libnvrtc.so*")
    mathdx = load("libmathdx.so*")
    inputs = []
    fatbin = b""
    for n in THREADS:
        for function, stem in ((POTRF, "potrf"), (POTRS, "potrs")):
            code, fatbin = generate(mathdx, n, function, f"{stem}_{n}")
            inputs.append((NVJITLINK_LTOIR, code, f"{stem}_{n}"))
    inputs.append((NVJITLINK_FATBIN, fatbin, "cusolverdx"))
    with tempfile.TemporaryDirectory() as folder:
        ir = pathlib.Path(folder) / "factor.ltoir"
        subprocess.run(
            [
                *("nvcc", "-std=c++17", "-rdc=true", "-O3", "--expt-relaxed-constexpr", "-ltoir"),
                *("-gencode", "arch=compute_90,code=lto_90", f"-I{HERE.parent.parent}"),
                *("-o", str(ir), str(HERE / "factor.cu")),
            ],
            check=True,
        )
        inputs.append((NVJITLINK_LTOIR, ir.read_bytes(), "factor"))
    pathlib.Path(sys.argv[1]).write_bytes(link(inputs))


if __name__ == "__main__":
    main()
