// assign: tokens to slots, from given quotas; and how its kernels and rebalance's are launched.
#include <algorithm>

#include "cuda/route.cuh"

namespace lplb::cuda {
namespace {

constexpr int32_t kMaxSharedBytes = 227 << 10;
constexpr int32_t kMaxClusterBlocks = 16;
constexpr int64_t kMaxTokensPerBlock = (1 << 16) - 1;

int32_t ThreadsFor(const Problem& problem) { return problem.n_logical <= 1024 ? 1024 : 256; }

bool HasClusters() {
  int device = 0;
  int major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major >= 9;
}

}  // namespace

RouteShape ChooseShape(const RouteArguments& arguments) {
  const int64_t n_tokens = arguments.tokens.n_tokens;
  const int32_t threads = ThreadsFor(arguments.problem);
  if (!HasClusters() || n_tokens > kMaxClusterBlocks * kMaxRounds * threads) {
    return {0, threads, 0};
  }
  int32_t cluster = 1;
  while (cluster < kMaxClusterBlocks && cluster * threads < n_tokens) cluster *= 2;
  const int64_t rounds = (n_tokens + cluster * threads - 1) / (cluster * threads);
  return {cluster, threads, static_cast<int32_t>(std::max<int64_t>(rounds, 1))};
}

cudaError_t AllowSharedMemory(const void* kernel, int32_t bytes, bool large_cluster) {
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && large_cluster) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  return error;
}

bool FitsRoute(const RouteArguments& arguments, bool solves) {
  const Problem& p = arguments.problem;
  const int32_t n_warps = ThreadsFor(p) / 32;
  return p.n_logical <= kMaxExperts &&
         RouteMemory::Words(p, n_warps, solves) * 4 <= kMaxSharedBytes &&
         arguments.n_tiles * (kMaxTokensPerBlock - 32 * n_warps) >= arguments.tokens.n_tokens &&
         arguments.workspace_words >=
             n_warps * RouteMemory::Row(p.n_logical, n_warps) + p.n_logical + 1;
}

cudaError_t LaunchAssign(const RouteArguments& arguments, cudaStream_t stream) {
  if (arguments.batch == 0 || arguments.tokens.n_tokens == 0) return cudaSuccess;
  return LaunchRoute<0, 0, false>(arguments, stream);
}

}  // namespace lplb::cuda
