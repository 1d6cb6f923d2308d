// Rows of experts on every rank, and the copies that ranks send one another: the Routing of an
// exchange whose tokens are experts. See lplb_jax/reference/journeys.py. Pointers, sizes and a
// stream in, cudaError_t out.
#ifndef LPLB_CUDA_JOURNEYS_H_
#define LPLB_CUDA_JOURNEYS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/problem.h"

namespace lplb::cuda {

struct ExpertSizes {
  int32_t n_ranks;
  int32_t n_slots;  // per rank
  int32_t n_logical;
  int32_t n_local;  // own experts of a rank
  int32_t n_rows;   // of a rank: n_local and room for copies

  LPLB_HOST_DEVICE int32_t room() const { return n_rows - n_local; }
};

struct SlotsByRowArguments {
  ExpertSizes sizes;
  const int32_t* phy2log;  // [n_ranks · n_slots]
  const int32_t* log2phy;  // [n_logical, max_replicas]
  int32_t* slots;          // [n_ranks, n_rows]; n_slots for none
  int32_t max_replicas;
};

struct JourneysArguments {
  ExpertSizes sizes;
  const int32_t* phy2log;     // [n_ranks · n_slots]
  const int32_t* slots;       // [n_ranks, n_rows]
  const int32_t* slot_loads;  // [n_ranks · n_slots]
  const int32_t* me;          // []
  int32_t most;               // copies of an expert
  int32_t n_received;         // copies of a home's experts
  int32_t n_sent;             // rows that a home sends, at most
  int32_t* rank;              // these three: [n_rows, most]
  int32_t* copy;
  int32_t* order;
  int32_t* sent;      // [n_sent]
  int32_t* nth;       // [n_rows]
  int32_t* received;  // [room, most]
  int32_t* lists;     // [kLists, n_ranks]
  int32_t* from;      // [n_ranks], copies received from every rank
};

// Each copy is compared with all before it.
constexpr int32_t kMostCopies = 4096;   // of all ranks
constexpr int32_t kMostExperts = 8192;  // n_logical

cudaError_t LaunchSlotsByRow(const SlotsByRowArguments& arguments, cudaStream_t stream);
cudaError_t LaunchJourneys(const JourneysArguments& arguments, cudaStream_t stream);

// Like PreloadSync.
cudaError_t PreloadJourneys();

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_JOURNEYS_H_
