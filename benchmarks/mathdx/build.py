"""Builds factor.cubin: cuSolverDx and cuBLASDx beside our factor, at 8 to 128 ranks. Needs no GPU.

    pip install nvidia-libmathdx-cu13 'nvidia-cuda-nvrtc==13.0.*' 'nvidia-nvjitlink==13.0.*'
    python benchmarks/mathdx/build.py factor.cubin

nvJitLink links the generated functions with the kernels of factor.cu, compiled by nvcc.
"""

import ctypes
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "cmake"))

import mathdx  # noqa: E402

NVJITLINK_LTOIR, NVJITLINK_FATBIN = 3, 4  # nvJitLinkInputType
# Threads of a block that are tried for each number of ranks; the suggested ones are among them.
THREADS = {8: [32], 16: [32, 64], 32: [32, 64, 128], 64: [64, 128, 256], 128: [128, 256, 512]}
CHOLESKY = {"potrf": mathdx.POTRF, "potrs": mathdx.POTRS, "posv": mathdx.POSV}


def link(inputs: list[tuple[int, bytes, str]]) -> bytes:
    import nvidia.cu13  # pyright: ignore[reportMissingImports] with the packages above

    folder = pathlib.Path(nvidia.cu13.__path__[0]) / "lib"
    jit = ctypes.CDLL(str(next(folder.glob("libnvJitLink.so*"))))
    handle = ctypes.c_void_p()
    options = [b"-arch=sm_90", b"-lto", b"-O3"]
    array = (ctypes.c_char_p * len(options))(*options)
    version = next(v for v in ("13_0", "13_1") if hasattr(jit, f"__nvJitLinkCreate_{v}"))

    def call(name, *arguments):
        status = getattr(jit, f"__nvJitLink{name}_{version}")(*arguments)
        if status:
            size = ctypes.c_size_t()
            getattr(jit, f"__nvJitLinkGetErrorLogSize_{version}")(handle, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value + 1)
            getattr(jit, f"__nvJitLinkGetErrorLog_{version}")(handle, log)
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
    generator = mathdx.MathDx()
    inputs, universal = [], b""
    for n, all_threads in THREADS.items():
        suggested = {}
        for threads in all_threads:
            for stem, function in CHOLESKY.items():
                name = f"{stem}_{n}_{threads}"
                code = generator.cholesky(function, n, threads, name)
                universal = code.universal_fatbin()
                suggested[stem] = code.suggested_threads()
                inputs.append((NVJITLINK_LTOIR, code.ltoir(), name))
            for k in (8, n):
                name = f"gemm{'' if k == 8 else '_full'}_{n}_{threads}"
                product = generator.product(n, n, k, threads, name)
                inputs.append((NVJITLINK_LTOIR, product.ltoir(), name))
                if n == 8:
                    break
        print(f"{n} ranks: threads tried {all_threads}, suggested {suggested}", flush=True)
    inputs.append((NVJITLINK_FATBIN, universal, "cusolverdx"))
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
