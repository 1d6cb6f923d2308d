#include <algorithm>

#include "cuda/graph_solver.cuh"
#include "cuda/graph_solver.h"
#include "cuda/launch.cuh"

namespace lplb::cuda {
namespace {

constexpr int32_t kMaxThreads = 512;

template <int kWords>
__global__ void __launch_bounds__(kMaxThreads, 1)
    SolveGraphKernel(Problem p, Sources sources, SolveOperands first_in, SolveResults first_out,
                     StartFrom from) {
  extern __shared__ int2 total[];  // [n_logical], then the graph
  const int32_t element = blockIdx.x;
  const SolveOperands in = BatchElement(p, sources, first_in, element);
  const SolveResults out = BatchElement(p, first_out, element);
  const GraphMemory graph(p, kWords, reinterpret_cast<int32_t*>(total + p.n_logical));
  const PrefetchedGraph fetched = PrefetchGraph(p, blockDim.x, in.phy2log, in.log2phy);
  const PrefetchedTotals loads(p, in.loads);
  ClearGraph<Block>(p, NoBase(), graph.mask, graph);
  loads.Store(p, sources, total);
  int32_t status = 0;
  if (sources.row > p.n_logical) {
#pragma unroll 1
    for (int32_t s = threadIdx.x; s < sources.n_sources; s += blockDim.x) {
      if (in.loads[s * sources.row + p.n_logical] != 0) status |= kInvalidIndex;
    }
  }
  const SummedTotals totals = {total};
  const int32_t* given = from == StartFrom::kQuotas ? out.quota : nullptr;
  bool safe = true;
  BuildGraph<kWords, Block>(p, in.phy2log, in.log2phy, fetched, graph, [&](const BuiltSlot& slot) {
    safe &= StartSlot(slot, totals, given, graph, p.safe_load);
  });
  if (status != 0) atomicOr(graph.status, status);
  const Proof proof = SolveGraph<kWords, Block>(p, totals, graph, [&] { return safe; });
#pragma unroll 2
  for (int32_t i = threadIdx.x; i < p.n_physical; i += blockDim.x) {
    out.quota[i] = QuotaOf(totals, graph, i);
  }
  if (threadIdx.x == 0) {
    *out.max_load = proof.max_load;
    *out.lower_bound = proof.lower_bound;
    *out.status = *graph.status;
  }
}

}  // namespace

int64_t GraphSolverBytes(const Problem& problem) {
  return static_cast<int64_t>(problem.n_logical) * sizeof(int2) +
         static_cast<int64_t>(GraphMemory::Words(problem)) * sizeof(int32_t);
}

cudaError_t LaunchSolveGraph(const Problem& problem, const Sources& sources, int64_t batch,
                             const SolveOperands& in, const SolveResults& out, StartFrom start,
                             cudaStream_t stream) {
  if (batch == 0) return cudaSuccess;
  const int32_t most = std::max(problem.n_logical, problem.n_physical);
  LaunchShape launch = {};
  launch.grid = dim3(static_cast<unsigned>(batch));
  launch.threads = std::clamp((most + 31) / 32 * 32, 256, kMaxThreads);
  launch.shared_bytes = GraphSolverBytes(problem);
  return WithGraphWords(problem, [&](auto words) {
    return Launch(SolveGraphKernel<decltype(words)::value>, launch, stream, problem, sources, in,
                  out, start);
  });
}

}  // namespace lplb::cuda
