"""Times what build.py built, on a GPU: python benchmarks/mathdx/run.py factor.cubin

One step's linear algebra, that is the matrix into place, one factor and three solves; µs, and the
largest error of the solution relative to float64.
"""

import sys

import cupy
import numpy as np

THREADS = {8: (32, 32), 16: (32, 32), 32: (32, 128), 64: (64, 256), 128: (128, 512)}
REPEAT = 100


def main() -> None:
    module = cupy.RawModule(path=sys.argv[1])
    rng = np.random.default_rng(0)
    print("| ranks | cuSolverDx POTRF + 3 POTRS, µs | error | our table, µs | error |")
    print("|---|---|---|---|---|")
    for n, threads in THREADS.items():
        # A ring and a random matching: as sparse as a topology. The excess makes it regular.
        weights = np.zeros((n, n), np.float32)
        for to in (np.roll(np.arange(n), 1), rng.permutation(n)):
            weights[np.arange(n), to] += rng.lognormal(0, 2, n)
        weights += weights.T.copy()
        np.fill_diagonal(weights, 0)
        excess = rng.lognormal(-2, 1, n).astype(np.float32)
        q = rng.normal(size=n).astype(np.float32)
        matrix = np.diag(excess + weights.sum(axis=1, dtype=np.float64)) - weights
        best = np.linalg.solve(matrix, q.astype(np.float64))
        operands = [cupy.asarray(a) for a in (weights, excess, q)]
        out = cupy.zeros(n, cupy.float32)
        row = [str(n)]
        for name, block in zip(("mathdx", "ours"), threads, strict=True):
            kernel = module.get_function(f"{name}_{n}")
            shared = 4 * (n * n + n) if name == "mathdx" else 0
            if shared > 48 << 10:
                kernel.max_dynamic_shared_size_bytes = shared
            times = []
            for repeat in (1, REPEAT + 1) * 6:
                begin, end = cupy.cuda.Event(), cupy.cuda.Event()
                begin.record()
                kernel((1,), (block,), (*operands, out, np.int32(repeat)), shared_mem=shared)
                end.record()
                end.synchronize()
                times.append(cupy.cuda.get_elapsed_time(begin, end) * 1e3)
            each = (np.median(times[3::2]) - np.median(times[2::2])) / REPEAT
            error = np.abs(out.get() - best).max() / np.abs(best).max()
            row += [f"{each:.2f}", f"{error:.0e}"]
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
