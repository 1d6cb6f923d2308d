#include <algorithm>

#include "cuda/ipm.cuh"
#include "cuda/ipm.h"
#include "cuda/solver.h"

namespace lplb::cuda {
namespace {

__global__ void EmptyKernel() {}

constexpr int64_t kMostSharedBytes = 160 << 10;  // Every supported chip has a little more.

IpmChoice Choose(const Problem& p, const IpmOptions& options) {
#ifdef LPLB_MATHDX
  if (options.cusolverdx) return IpmWithCuSolverDx(p, options);
#endif
  if (p.group_size <= 8) return IpmOf8(p, options);
  if (p.group_size <= 16) return IpmOf16(p, options);
  if (p.group_size <= 32) return IpmOf32(p, options);
  if (p.group_size <= 64) return IpmOf64(p, options);
  return IpmOf128(p, options);
}

}  // namespace

bool HasCuSolverDx() {
#ifdef LPLB_MATHDX
  return true;
#else
  return false;
#endif
}

bool IpmFitsOneBlock(const Problem& problem, const IpmOptions& options) {
  if (problem.group_size > kMaxGroupSize) return false;
  const IpmChoice choice = Choose(problem, options);
  return choice.kernel != nullptr &&
         IpmMemory::Bytes(problem) + choice.bytes + 1024 <= kMostSharedBytes;
}

cudaError_t LaunchIpm(const Problem& problem, const Sources& sources, const IpmOptions& options,
                      int64_t batch, const IpmOperands& in, const SolveResults& out,
                      cudaStream_t stream) {
  if (batch == 0) return cudaSuccess;
  const IpmChoice choice = Choose(problem, options);
  const int64_t bytes = choice.bytes + IpmMemory::Bytes(problem);
  if (bytes > (47 << 10)) {
    const cudaError_t error = cudaFuncSetAttribute(
        choice.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) return error;
  }
  // A thread per expert, and at least two warps for what needs no plan where there is room.
  const int32_t experts = problem.group_size << problem.tile_log2;
  const int32_t threads =
      std::min(std::max((experts + 31) / 32 * 32 + 32, choice.threads + 64), choice.most_threads);
  const dim3 grid(static_cast<unsigned>(batch), problem.n_groups);
  choice.kernel<<<grid, threads, bytes, stream>>>(problem, sources, options, in, out);
  return cudaGetLastError();
}

cudaError_t LaunchEmpty(cudaStream_t stream) {
  EmptyKernel<<<1, 32, 0, stream>>>();
  return cudaGetLastError();
}

}  // namespace lplb::cuda
