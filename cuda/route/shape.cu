// How the kernels of assign and rebalance are launched.
#include <algorithm>

#include "cuda/route/shape.h"
#include "cuda/route/tables.cuh"

namespace lplb::cuda {
namespace {

constexpr int32_t kMaxSharedBytes = 227 << 10;

// Large tables leave room for fewer warps and blocks.
int32_t ThreadsFor(const Problem& problem) {
  return problem.n_logical <= 1024 ? kRouteThreads : kRouteThreads / 2;
}

int32_t MaxClusterFor(const Problem& problem) {
  return problem.n_logical <= 512 ? 16 : problem.n_logical <= 1024 ? 8 : 4;
}

// At least one, so that a batch without tokens gets its split too.
int32_t RoundsFor(int64_t n_tokens, int32_t threads) {
  return static_cast<int32_t>(std::max<int64_t>((n_tokens + threads - 1) / threads, 1));
}

}  // namespace

// Hopper and later.
bool HasClusters() {
  int device = 0;
  int major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major >= 9;
}

RouteShape ChooseShape(const RouteArguments& arguments) {
  const int64_t n_tokens = arguments.tokens.n_tokens;
  const int32_t threads = ThreadsFor(arguments.problem);
  const int32_t max_cluster = MaxClusterFor(arguments.problem);
  if (!HasClusters() || n_tokens > static_cast<int64_t>(max_cluster) * kMaxRounds * threads) {
    return {0, threads, 0};
  }
  // Blocks of 256 as long as eight rounds do, and a cluster of 16, which takes longer to start,
  // only where one of 8 would need more than four. Blocks send to others: there are two at least.
  constexpr int32_t kSmall = 256;
  if (n_tokens <= static_cast<int64_t>(max_cluster) * kSmall * 8) {
    const int32_t most = std::min(max_cluster, n_tokens <= 8 * kSmall * 4 ? 8 : 16);
    int32_t cluster = 2;
    while (cluster < most && cluster * kSmall < n_tokens) cluster *= 2;
    return {cluster, kSmall, RoundsFor(n_tokens, cluster * kSmall)};
  }
  return {max_cluster, threads, RoundsFor(n_tokens, max_cluster * threads)};
}

cudaError_t AllowSharedMemory(const void* kernel, int32_t bytes, bool large_cluster) {
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && large_cluster) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  return error;
}

bool FitsRoute(const RouteArguments& arguments, Quotas quotas) {
  const Problem& p = arguments.problem;
  const int32_t n_warps = ThreadsFor(p) / 32;
  return p.n_logical <= kMaxExperts && p.n_physical < 0xffff &&
         RouteMemory::Bytes(p, n_warps, MaxClusterFor(p), quotas) <= kMaxSharedBytes &&
         arguments.n_tiles >= 1 && arguments.workspace_words >= (n_warps + 1) * (p.n_logical + 1);
}

}  // namespace lplb::cuda
