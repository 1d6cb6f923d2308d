#include <algorithm>

#include "cuda/ipm.h"
#include "cuda/ipm/host_kernel.cuh"
#include "cuda/launch.cuh"
#include "cuda/solver.h"

namespace lplb::cuda {
namespace {

__global__ void EmptyKernel() {}

bool IsAnywhere(const Problem& p) { return p.n_columns == 0; }

IpmChoice Choose(const Problem& p, const IpmOptions& options) {
  if (IsAnywhere(p)) {
    if (options.cusolverdx) return {};
    if (p.ep_size <= 16) return IpmOfHosts16(options);
    if (p.ep_size <= 32) return IpmOfHosts32(options);
    if (p.ep_size <= 64) return IpmOfHosts64(options);
    return IpmOfHosts128(options);
  }
#ifdef LPLB_MATHDX
  if (options.cusolverdx) return IpmWithCuSolverDx(p, options);
#endif
  if (p.group_size <= 8) return IpmOf8(p, options);
  if (p.group_size <= 16) return IpmOf16(p, options);
  if (p.group_size <= 32) return IpmOf32(p, options);
  if (p.group_size <= 64) return IpmOf64(p, options);
  return IpmOf128(p, options);
}

// Dynamic shared memory per block.
int64_t DynamicBytes(const Problem& p, const IpmChoice& choice) {
  return choice.bytes + (IsAnywhere(p) ? HostMemory::Bytes(p) : IpmMemory::Bytes(p));
}

}  // namespace

bool HasCuSolverDx() {
#ifdef LPLB_MATHDX
  return true;
#else
  return false;
#endif
}

int64_t IpmSharedBytes(const Problem& problem, const IpmOptions& options) {
  constexpr int64_t kStatic = 1024;  // The most static memory of any kernel.
  const IpmChoice choice = Choose(problem, options);
  return choice.kernel == nullptr ? 0 : DynamicBytes(problem, choice) + kStatic;
}

cudaError_t LaunchIpm(const Problem& problem, const Sources& sources, const IpmOptions& options,
                      int64_t batch, const IpmOperands& in, const SolveResults& out,
                      cudaStream_t stream) {
  if (batch == 0) return cudaSuccess;
  const IpmChoice choice = Choose(problem, options);
  LaunchShape launch = {};
  launch.grid = dim3(static_cast<unsigned>(batch), problem.n_groups);
  launch.threads = choice.most_threads;
  if (!IsAnywhere(problem)) {
    // One thread per expert, and, where there is room, at least two warps for the work that needs
    // no plan.
    const int32_t experts = problem.group_size << problem.tile_log2;
    launch.threads =
        std::min(std::max((experts + 31) / 32 * 32 + 32, choice.threads + 64), choice.most_threads);
  }
  launch.shared_bytes = DynamicBytes(problem, choice);
  return Launch(choice.kernel, launch, stream, problem, sources, options, in, out);
}

cudaError_t LaunchEmpty(cudaStream_t stream) { return Launch(EmptyKernel, {dim3(1), 32}, stream); }

}  // namespace lplb::cuda
