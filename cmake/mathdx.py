"""Has libmathdx generate NVIDIA's device functions as LTO-IR. Needs no GPU, but, from PyPI,

    pip install nvidia-libmathdx-cu13 'nvidia-cuda-nvrtc==13.0.*' 'nvidia-nvjitlink==13.0.*'

As a program it writes what the library's own kernels are linked with: python mathdx.py FOLDER
"""

import ctypes
import pathlib
import sys

# Values of libmathdx's enumerations, from libcommondx.h, libcusolverdx.h and libcublasdx.h.
SYMBOL_NAME = 0
REAL, FLOAT32, BLOCK, SHARED_MEMORY, ROW_MAJOR, LOWER = 0, 5, 1, 0, 1, 1
SM = 900
POTRF, POTRS, POSV = 2, 3, 11
SUGGESTED_BLOCK_DIM = 5  # cuSolverDx

# Threads of a block, by ranks; as in cuda/mathdx/ipm_cusolverdx.cu.
THREADS = {8: 32, 16: 64, 32: 128, 64: 128, 128: 256}


class MathDx:
    """libmathdx, loaded with the runtime compiler that it uses."""

    def __init__(self):
        try:
            import nvidia.cu13
        except ImportError as error:
            raise SystemExit(f"{error}; MathDx needs the packages that {__file__} names") from error
        folder = pathlib.Path(nvidia.cu13.__path__[0]) / "lib"
        for name in ("nvrtc-builtins", "nvrtc", "mathdx"):
            found = sorted(folder.glob(f"lib{name}.so*"))
            if not found:
                raise SystemExit(f"no lib{name}.so in {folder}: install what {__file__} names")
            self._library = ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)

    def cholesky(self, function: int, n: int, threads: int, name: str) -> "Function":
        """POTRF `(matrix, info)`, POTRS `(matrix, rhs)` or POSV `(matrix, rhs, info)`, n × n."""
        return Function(
            self._library,
            "cusolverdx",
            name,
            # Size, type, precision, SM, execution, block, API, function, arrangement, fill mode.
            {0: [n, n, 1], 1: [REAL], 2: [FLOAT32], 3: [SM], 4: [BLOCK], 5: [threads, 1, 1]}
            | {6: [SHARED_MEMORY], 7: [function], 8: [ROW_MAJOR, ROW_MAJOR], 9: [LOWER]},
        )

    def product(self, m: int, n: int, k: int, threads: int, name: str) -> "Function":
        """`(alpha, a, b, beta, c)`: c = alpha a b + beta c, of m × k and k × n."""
        return Function(
            self._library,
            "cublasdx",
            name,
            # Function, size, type, precisions, SM, execution, block; 9: API, 10: arrangements.
            {0: [0], 1: [m, n, k], 2: [REAL], 3: [FLOAT32] * 3, 4: [SM], 5: [BLOCK]}
            | {6: [threads, 1, 1], 9: [SHARED_MEMORY], 10: [ROW_MAJOR] * 3},
        )


class Function:
    """A device function: `extern "C" __device__ void name(...)`."""

    def __init__(
        self, library: ctypes.CDLL, prefix: str, name: str, operators: dict[int, list[int]]
    ):
        self._library, self._prefix = library, prefix
        self._handle = ctypes.c_longlong()
        self._call("CreateDescriptor", ctypes.byref(self._handle))
        for kind, values in operators.items():
            array = (ctypes.c_longlong * len(values))(*values)
            if len(values) == 1:
                self._call("SetOperatorInt64", self._handle, kind, array[0])
            else:
                self._call("SetOperatorInt64s", self._handle, kind, len(values), array)
        self._call("SetOptionStr", self._handle, SYMBOL_NAME, name.encode())

    def ltoir(self) -> bytes:
        return self._fetch("GetLTOIR")

    def universal_fatbin(self) -> bytes:
        """The fat binary of what all cuSolverDx functions call."""
        return self._fetch("GetUniversalFATBIN")

    def suggested_threads(self) -> int:
        """Of a block, for a cuSolverDx function."""
        dim = (ctypes.c_longlong * 3)()
        self._call("GetTraitInt64s", self._handle, SUGGESTED_BLOCK_DIM, 3, dim)
        return dim[0]

    def _call(self, name: str, *arguments) -> None:
        status = getattr(self._library, self._prefix + name)(*arguments)
        if status != 0:
            raise RuntimeError(f"libmathdx: {self._prefix}{name} gave status {status}")

    def _fetch(self, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(what + "Size", self._handle, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(what, self._handle, size, buffer)
        return buffer.raw


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    mathdx = MathDx()
    for n, threads in THREADS.items():
        for function, stem in ((POTRF, "potrf"), (POTRS, "potrs")):
            generated = mathdx.cholesky(function, n, threads, f"lplb_{stem}_{n}")
            (folder / f"{stem}_{n}.ltoir").write_bytes(generated.ltoir())
    (folder / "cusolverdx.fatbin").write_bytes(generated.universal_fatbin())


if __name__ == "__main__":
    main()
