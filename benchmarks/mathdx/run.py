"""Times what build.py built, on a GPU: python benchmarks/mathdx/run.py factor.cubin

One step's linear algebra, that is the matrix into place, one factor and three solves; µs, and the
largest error of the solution relative to float64, by threads of the block. Beside it cuBLASDx: the
products that the eliminated blocks of eight ranks would take, n / 8 times n × n × 8, and one
product n × n × n.
"""

import sys

import cupy  # pyright: ignore[reportMissingImports]  where GPUs are
import numpy as np

THREADS = {8: [32], 16: [32, 64], 32: [32, 64, 128], 64: [64, 128, 256], 128: [128, 256, 512]}
OURS = {8: 32, 16: 32, 32: 128, 64: 256, 128: 512}
REPEAT = 100


def main() -> None:
    module = cupy.RawModule(path=sys.argv[1])
    rng = np.random.default_rng(0)
    print("| ranks | threads | POTRF + 3 POTRS, µs | error | POSV + 2 POTRS, µs | error |", end=" ")
    print("products n × n × 8, µs | n × n × n, µs | our table, µs | error |\n|" + "---|" * 10)

    def time(name, threads, operands, shared):
        kernel = module.get_function(name)
        if shared > 48 << 10:
            kernel.max_dynamic_shared_size_bytes = shared
        times = []
        for repeat in (1, REPEAT + 1) * 6:
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            begin.record()
            kernel((1,), (threads,), (*operands, np.int32(repeat)), shared_mem=shared)
            end.record()
            end.synchronize()
            times.append(cupy.cuda.get_elapsed_time(begin, end) * 1e3)
        return (np.median(times[3::2]) - np.median(times[2::2])) / REPEAT

    for n, all_threads in THREADS.items():
        # A ring and a random matching: as sparse as a topology. The excess makes it regular.
        weights = np.zeros((n, n), np.float32)
        for to in (np.roll(np.arange(n), 1), rng.permutation(n)):
            weights[np.arange(n), to] += rng.lognormal(0, 2, n)
        weights += weights.T.copy()
        np.fill_diagonal(weights, 0)
        excess = rng.lognormal(-2, 1, n).astype(np.float32)
        q = rng.normal(size=n).astype(np.float32)
        exact = np.diag(excess + weights.sum(axis=1, dtype=np.float64)) - weights
        best = np.linalg.solve(exact, q.astype(np.float64))
        matrix, excess, q = (cupy.asarray(a, cupy.float32) for a in (exact, excess, q))
        out = cupy.zeros(n, cupy.float32)

        def error(out=out, best=best):
            return f"{np.abs(out.get() - best).max() / np.abs(best).max():.0e}"

        ours = [f"{time(f'ours_{n}', OURS[n], (matrix, excess, q, out), 0):.2f}", error()]
        for threads in all_threads:
            row = [str(n), str(threads)]
            shared = 4 * (2 * n * n + 2 * n)
            for stem in ("potrf", "posv"):
                taken = time(f"{stem}_kernel_{n}_{threads}", threads, (matrix, q, out), shared)
                row += [f"{taken:.2f}", error()]
            for stem, k, times in (("gemm", 8, n // 8), ("gemm_full", n, 1)):
                if n == 8 and stem == "gemm_full":
                    row.append("the same")
                    continue
                shared = 4 * (2 * n * k + n * n)
                name = f"{stem}_kernel_{n}_{threads}"
                row.append(f"{times * time(name, threads, (matrix, q, out), shared):.2f}")
            print("| " + " | ".join(row + ours) + " |", flush=True)
            ours = ["", ""]


if __name__ == "__main__":
    main()
