// What assign and rebalance launch: pointers, sizes and a stream in, cudaError_t out.
#ifndef LPLB_CUDA_ROUTE_H_
#define LPLB_CUDA_ROUTE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/problem.h"
#include "cuda/sync.h"

namespace lplb::cuda {

constexpr int32_t kMaxExperts = 2048;
constexpr int32_t kMaxSlots = 0xfffe;   // Tables store slots in 16 bits.
constexpr int32_t kRouteThreads = 512;  // per block, at most: threads that hold tokens

// Words of a tile's part of the workspace: its tokens per expert, and for each of its warps the
// tokens of the warps before it.
constexpr int64_t WorkspaceWords(int32_t n_logical) {
  return (kRouteThreads / 32 + 1) * (int64_t{n_logical} + 1);
}

enum class IndexType : int32_t { kInt32, kInt64, kUint8, kUint16 };

LPLB_HOST_DEVICE int32_t IndexBytes(IndexType type) {
  return type == IndexType::kInt32    ? 4
         : type == IndexType::kInt64  ? 8
         : type == IndexType::kUint16 ? 2
                                      : 1;
}

struct TokenBuffers {
  const void* indices;  // [batch, n_tokens]
  int64_t n_tokens;
  IndexType type;
  int32_t* physical;     // [batch, n_tokens]
  int32_t* position;     // [batch, n_tokens], or null
  int32_t* slot_counts;  // [batch, n_physical], or null
};

// Copies chosen for the batch, unless fan_out is 0.
struct BatchCopies {
  int32_t fan_out;  // copies of its experts that a rank may send
  int32_t width;    // places per expert in out.log2phy
  CopiesResults out;
};

// A kernel waits some 150 cycles for every 64 bytes of its arguments that it comes to. So what is
// needed first comes first: up to the problem's sizes.
struct RouteArguments {
  SolveOperands solve_in;  // of rebalance; loads unused
  int32_t rounds;          // tokens per thread of a cluster; set by the launcher
  int32_t cluster;         // blocks, a power of two; set by the launcher
  TokenBuffers tokens;
  Problem problem;
  Sources sources;
  AssignOperands given;    // of assign; with peers, its rank
  SolveResults solve_out;  // of rebalance
  BatchCopies copies;      // of a rebalance without a topology
  Peers peers;             // of a rebalance with other ranks
  int32_t* workspace;      // [batch, n_tiles, workspace_words ≥ WorkspaceWords]
  int64_t batch;
  int64_t workspace_words;
  int64_t tokens_per_warp;  // set by the launcher
  int32_t n_tiles;
  bool proportional;
  Costs costs;  // of a rebalance without a topology; without base_load, tokens are balanced
};

// Where the quotas come from.
enum class Quotas {
  kGiven,
  kSolved,  // for the tokens of this batch
  kSynced,  // for the tokens of all ranks
};

// Assigns every token a slot from given quotas. Here and below, ChooseShape must have found a shape
// for the current device.
cudaError_t LaunchAssign(const RouteArguments& arguments, cudaStream_t stream);

// Counts, chooses copies if asked to, solves and assigns.
cudaError_t LaunchRebalance(const RouteArguments& arguments, cudaStream_t stream);

// Counts, shares the counts with arguments.peers, then proceeds like LaunchRebalance. A batch of
// one.
cudaError_t LaunchSyncedRebalance(const RouteArguments& arguments, cudaStream_t stream);

// Loads the kernels of LaunchSyncedRebalance, see PreloadSync.
cudaError_t PreloadSyncedRebalance();

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_ROUTE_H_
