// Weights of experts and their gradients on their way to other ranks by copy engines, which need no
// SMs. Pointers, sizes and a stream in, cudaError_t out.
//
// A flight is what all ranks send one another at once. Ranks number their flights alike, and give
// each the same place in every rank's hangar, memory that the others map. A rank raises its word of
// `arrived` in a hangar after the last byte of its flight there; once a rank has taken what came,
// it raises its word of `freed` in all hangars. A rank sends to a place only once all its receivers
// have freed the last flight that overlapped it.
//
// Sending and waiting for free places is on a stream beside XLA's. XLA's stream waits only where a
// flight is taken. A place is freed by a take, which waits for no later flight, so no ranks wait
// for one another in a circle.
#ifndef LPLB_CUDA_FLIGHT_H_
#define LPLB_CUDA_FLIGHT_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/sync.h"

namespace lplb::cuda {

// At the beginning of a hangar: the words of all ranks, then those of their receivers; and which
// ranks have failed. They may have written to this hangar without waiting for a free place.
struct HangarHeader {
  static constexpr int32_t kMostRanks = 512;

  uint32_t arrived[kMostRanks];
  uint32_t freed[kMostRanks];
  uint32_t spoiled[kMostRanks];
};

// Ranks, as a kernel's argument.
struct FlightRanks {
  static constexpr int32_t kMost = 32;

  int32_t n;
  int32_t of[kMost];
};

struct Hangars {
  Peers peers;
  char* const* all;  // [peers.size], in device memory
  char* own;
};

// Waits until `ranks` have raised their words of `arrived`, or of `freed`, to at least `flight`.
// Bounded; a failure is reported and sticky, as in load sync.
cudaError_t LaunchAwaitArrived(const Hangars& hangars, const FlightRanks& ranks, uint32_t flight,
                               cudaStream_t stream);
cudaError_t LaunchAwaitFreed(const Hangars& hangars, const FlightRanks& ranks, uint32_t flight,
                             cudaStream_t stream);

// Raises this rank's word of `arrived` in the hangars of `ranks`, or of `freed` in all; after a
// failure that of `spoiled` instead.
cudaError_t LaunchRaiseArrived(const Hangars& hangars, const FlightRanks& ranks, uint32_t flight,
                               cudaStream_t stream);
cudaError_t LaunchRaiseFreed(const Hangars& hangars, uint32_t flight, cudaStream_t stream);

// Writes a flight's number where XLA carries it from its start to its end.
cudaError_t LaunchNumber(uint32_t flight, float* number, cudaStream_t stream);

// Copies what came; after a failure of this rank or of one that may have overwritten it, or if
// `number` is another flight's, sets all bits, which is NaN in any type of floats.
cudaError_t LaunchTake(const Hangars& hangars, uint32_t flight, const float* number,
                       const void* from, void* to, int64_t bytes, cudaStream_t stream);

// Like PreloadSync.
cudaError_t PreloadFlights();

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_FLIGHT_H_
