// Where the rows of a batch are placed on their ranks, and which tokens go to which rank: the
// Routing of an exchange. Pointers, sizes and a stream in, cudaError_t out.
#ifndef LPLB_CUDA_EXCHANGE_PLAN_H_
#define LPLB_CUDA_EXCHANGE_PLAN_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/exchange.h"
#include "cuda/sync.h"

namespace lplb::cuda {

// Rows are ordered by group, then by source. A group holds the rows of one slot. The rows that
// exceed a rank's capacity are its last.
struct PlanArguments {
  const int32_t* slot;      // [n_tokens, top_k], slots of all ranks; −1 for none
  const int32_t* position;  // [n_tokens, top_k], among this rank's rows of the slot
  const int32_t* counts;    // rows per slot: [n_ranks, n_ranks · n_slots] from every source, or
                            // [n_ranks · n_slots] from this one if the kernel exchanges them
  const int32_t* groups;    // [n_ranks, n_groups], each group's slot; n_slots for none
  const int32_t* rank;      // []
  int32_t* row;             // these three: see Routing
  int32_t* order;
  int32_t* lists;
  int32_t* group_sizes;  // [n_groups], rows of this rank's groups that fit
  int32_t* slot_loads;   // [n_ranks · n_slots], rows from all sources, also those that do not fit
  int32_t* overflow;     // [], rows of all ranks that do not fit
  int32_t* workspace;    // [n_tiles, n_ranks]
  int32_t n_tiles;       // Blocks that share the tokens; a single one needs no second kernel.
  int32_t n_ranks;
  int32_t n_slots;  // per rank
  int32_t n_groups;
  int32_t n_tokens;
  int32_t top_k;  // at most kMostChoices
  int32_t capacity;
};

// Shared memory per block.
int64_t PlanSharedBytes(int64_t n_ranks, int64_t n_slots);

cudaError_t LaunchPlan(const PlanArguments& arguments, cudaStream_t stream);
// The same, including sync_loads of the counts. After a failure nothing has a row.
cudaError_t LaunchSyncedPlan(const Peers& peers, const PlanArguments& arguments,
                             cudaStream_t stream);

// Like PreloadSync.
cudaError_t PreloadPlan();

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_EXCHANGE_PLAN_H_
