// Where the rows of a batch stand on their ranks, and which tokens go to which rank: what an
// exchange takes as its Routing. Pointers, sizes and a stream in, cudaError_t out.
#ifndef LPLB_CUDA_EXCHANGE_PLAN_H_
#define LPLB_CUDA_EXCHANGE_PLAN_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/exchange.h"
#include "cuda/sync.h"

namespace lplb::cuda {

// Rows stand group by group, and in a group source by source; a group has the rows of one slot.
// What finds no room on its rank comes last there.
struct PlanArguments {
  const int32_t* slot;      // [n_tokens, top_k], slots of all ranks; −1 for none
  const int32_t* position;  // [n_tokens, top_k], among this rank's rows of the slot
  const int32_t* counts;    // rows for a slot: [n_ranks, n_ranks · n_slots], from every source; or
                            // [n_ranks · n_slots], from this one, where they are exchanged, too
  const int32_t* groups;    // [n_ranks, n_groups], of a group its slot; n_slots for none
  const int32_t* rank;      // []
  int32_t* row;             // these three: see Routing
  int32_t* order;
  int32_t* lists;
  int32_t* group_sizes;  // [n_groups], rows of this rank's groups that have room
  int32_t* slot_loads;   // [n_ranks · n_slots], rows of all sources, also those without room
  int32_t* overflow;     // [], rows of all ranks without room
  int32_t* workspace;    // [n_tiles, n_ranks]
  int32_t n_tiles;       // Blocks that share the tokens; a single one needs no second kernel.
  int32_t n_ranks;
  int32_t n_slots;  // of a rank
  int32_t n_groups;
  int32_t n_tokens;
  int32_t top_k;  // at most kMostChoices
  int32_t capacity;
};

// Of a block's shared memory.
int64_t PlanSharedBytes(int64_t n_ranks, int64_t n_slots);

cudaError_t LaunchPlan(const PlanArguments& arguments, cudaStream_t stream);
// The same, and sync_loads of the counts in it. After a failure nothing has a row.
cudaError_t LaunchSyncedPlan(const Peers& peers, const PlanArguments& arguments,
                             cudaStream_t stream);

// As PreloadSync.
cudaError_t PreloadPlan();

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_EXCHANGE_PLAN_H_
