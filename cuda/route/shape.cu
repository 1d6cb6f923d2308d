#include <algorithm>

#include "cuda/route/shape.h"
#include "cuda/route/tables.cuh"

namespace lplb::cuda {
namespace {

// At least one round, so that a batch without tokens gets its split too.
RouteShape ClusterOf(int32_t cluster, int32_t threads, int64_t n_tokens) {
  const int64_t at_once = int64_t{cluster} * threads;
  const int64_t rounds = std::max<int64_t>((n_tokens + at_once - 1) / at_once, 1);
  return {cluster, threads, static_cast<int32_t>(rounds), 0};
}

// The fastest cluster of at most this many blocks and threads, or an empty shape if they do not
// suffice.
RouteShape FastestCluster(int32_t max_cluster, int32_t max_threads, int64_t n_tokens) {
  // Blocks of 256 threads as long as eight rounds suffice. A cluster of 16 takes longer to start,
  // so it is used only where a cluster of 8 would need more than four rounds. At least two blocks,
  // because blocks send to others.
  const int32_t small = std::min(256, max_threads);
  if (n_tokens <= int64_t{max_cluster} * small * 8) {
    const int32_t most = std::min(max_cluster, n_tokens <= 8 * small * 4 ? 8 : 16);
    int32_t cluster = 2;
    while (cluster < most && cluster * small < n_tokens) cluster *= 2;
    return ClusterOf(cluster, small, n_tokens);
  }
  const RouteShape largest = ClusterOf(max_cluster, max_threads, n_tokens);
  return largest.rounds <= kMaxRounds ? largest : RouteShape{};
}

int32_t MaxThreads(const Problem& p) {
  return p.n_logical <= 1024 ? kRouteThreads : kRouteThreads / 2;
}

int32_t MaxCluster(const Problem& p, const Device& device) {
  const int32_t useful = p.n_logical <= 512 ? 16 : p.n_logical <= 1024 ? 8 : 4;
  int32_t cluster = 1;
  while (2 * cluster <= std::min(useful, device.largest_cluster)) cluster *= 2;
  return cluster;
}

// ScanWarps takes a tile's warps in two halves. BlockWaves needs a thread for every rank.
// GraphWaves uses at most 256 threads.
int32_t MinThreads(const Problem& p) {
  if (p.node_size > 0) return 256;
  int32_t threads = 64;
  while (threads < p.group_size) threads *= 2;
  return threads;
}

}  // namespace

// If shared memory does not suffice for the fastest shape, blocks with fewer warps are tried first:
// the warps' tables take most of it.
RouteShape ChooseShape(const Problem& problem, Quotas quotas, bool chooses, int64_t n_tokens,
                       const Device& device) {
  const auto fits = [&](RouteShape& shape) {
    shape.shared_bytes =
        RouteMemory::Bytes(problem, shape.threads / 32, shape.cluster, quotas, chooses);
    return shape.threads > 0 && shape.shared_bytes <= device.shared_bytes;
  };
  const int32_t min_threads = MinThreads(problem);
  for (int32_t cluster = MaxCluster(problem, device); cluster >= 2; cluster /= 2) {
    for (int32_t threads = MaxThreads(problem); threads >= min_threads; threads /= 2) {
      RouteShape shape = FastestCluster(cluster, threads, n_tokens);
      if (fits(shape)) return shape;
    }
  }
  for (int32_t threads = MaxThreads(problem); threads >= min_threads; threads /= 2) {
    RouteShape shape = {0, threads, 0, 0};
    if (fits(shape)) return shape;
  }
  return {};
}

int32_t LeastSharedBytes(const Problem& problem, Quotas quotas, bool chooses) {
  return RouteMemory::Bytes(problem, MinThreads(problem) / 32, 0, quotas, chooses);
}

}  // namespace lplb::cuda
