// Chooses copies for the batch at hand: lplb_jax/reference/batch_copies.py says which. The attempts
// for all targets run side by side, one warp each, on what they share: the homes. A step of an
// attempt is a chain of votes and reductions, and attempts that share a scheduler slow one another
// down: so the blocks of a cluster make a few each.
#ifndef LPLB_CUDA_BATCH_COPIES_CUH_
#define LPLB_CUDA_BATCH_COPIES_CUH_

#include <cstdint>

#include "cuda/problem.h"
#include "cuda/warp.cuh"

namespace lplb::cuda {

// Shared memory of a block that makes n attempts side by side, in words of 32 bits.
struct CopiesMemory {
  int32_t* total;   // [n_logical], tokens
  int32_t* home;    // [n_logical], slots, as log2phy has them
  int32_t* expert;  // [n_physical], at home in the slot; −1 where a copy may go
  int32_t* tokens;  // [n_physical], of that expert
  int32_t* load;    // [ep_size], without copies
  int32_t* n_free;  // [ep_size], slots for copies
  int32_t* copies;  // [kNTargets], of every attempt; −1 where it failed
  int32_t* sums;    // [2], of the upper and the lower halves of the totals
  // Of every attempt:
  int32_t* left;     // [n_physical], tokens that are still at home
  int32_t* n_taken;  // [ep_size], copies on every rank
  uint16_t* taken;   // [ep_size, slots_per_rank], their experts, in the order of the slots

  LPLB_HOST_DEVICE static int32_t AttemptWords(const Problem& p) {
    return p.n_physical + p.ep_size + (p.n_physical + 1) / 2;
  }

  LPLB_HOST_DEVICE static int32_t Words(const Problem& p, int32_t n_attempts) {
    return 2 * (p.n_logical + p.n_physical + p.ep_size) + kNTargets + 2 +
           n_attempts * AttemptWords(p);
  }

  // With the memory of one of the attempts.
  __device__ CopiesMemory(const Problem& p, int32_t attempt, int32_t* memory) {
    total = memory;
    home = total + p.n_logical;
    expert = home + p.n_logical;
    tokens = expert + p.n_physical;
    load = tokens + p.n_physical;
    n_free = load + p.ep_size;
    copies = n_free + p.ep_size;
    sums = copies + kNTargets;
    left = sums + 2 + attempt * AttemptWords(p);
    n_taken = left + p.n_physical;
    taken = reinterpret_cast<uint16_t*>(n_taken + p.ep_size);
  }
};

// The first rank with `value`, which some rank has; lane l has those of ranks l, 32 + l, …
template <int kWords>
__device__ __forceinline__ int32_t FirstWith(const int32_t (&values)[kWords], int32_t value) {
  int32_t rank = 0;
#pragma unroll
  for (int w = kWords - 1; w >= 0; --w) {
    const uint32_t votes = __ballot_sync(kFullWarp, values[w] == value);
    rank = votes != 0 ? 32 * w + __ffs(votes) - 1 : rank;
  }
  return rank;
}

// Copies with which no rank has more than `target` tokens, by one warp. Returns their number, −1
// where the attempt failed.
template <int kWords>
__device__ inline int32_t Attempt(const Problem& p, const CopiesMemory& memory, int32_t target,
                                  int32_t fan_out) {
  const int32_t lane = threadIdx.x & 31;
#pragma unroll 4
  for (int32_t i = lane; i < p.n_physical; i += 32) memory.left[i] = memory.tokens[i];
  int32_t load[kWords];
  int32_t spare[kWords];  // slots for copies that are left
  int32_t sent[kWords];
  int64_t room = 0;  // of the ranks that can take copies, less what is above the target elsewhere
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const int32_t rank = 32 * w + lane;
    const bool live = rank < p.ep_size;
    load[w] = live ? memory.load[rank] : -1;
    spare[w] = live ? memory.n_free[rank] : 0;
    sent[w] = 0;
    if (live && (load[w] > target || spare[w] > 0)) room += target - load[w];
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) room += __shfl_xor_sync(kFullWarp, room, step);
  __syncwarp();

#pragma unroll 1
  for (int32_t n_copies = 0;; ++n_copies) {
    int32_t open[kWords];  // loads of the ranks that can take a copy
    int32_t most = load[0];
    int32_t least = kInt32Max;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      most = max(most, load[w]);
      open[w] = spare[w] > 0 && load[w] < target ? load[w] : kInt32Max;
      least = min(least, open[w]);
    }
    most = __reduce_max_sync(kFullWarp, most);
    least = __reduce_min_sync(kFullWarp, least);
    if (most <= target) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const int32_t rank = 32 * w + lane;
        if (rank < p.ep_size) memory.n_taken[rank] = memory.n_free[rank] - spare[w];
      }
      return n_copies;
    }
    if (room < 0 || least == kInt32Max) return -1;
    const int32_t from = FirstWith(load, most);
    const int32_t to = FirstWith(open, least);

    // The hottest of its experts.
    const int32_t* of_from = memory.left + from * p.slots_per_rank;
    int32_t hottest = -1;
    int32_t k_hottest = 0;
#pragma unroll 1
    for (int32_t k = lane; k < p.slots_per_rank; k += 32) {
      k_hottest = of_from[k] > hottest ? k : k_hottest;
      hottest = max(hottest, of_from[k]);
    }
    const int32_t tokens = __reduce_max_sync(kFullWarp, hottest);
    k_hottest = __reduce_min_sync(kFullWarp, hottest == tokens ? k_hottest : kInt32Max);
    const int32_t slot = from * p.slots_per_rank + k_hottest;
    const int32_t moved = min(min(most - target, tokens), target - least);

    bool too_many = false;
    bool full = false;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if (from == 32 * w + lane) {
        too_many = sent[w]++ >= fan_out;
        load[w] -= moved;
        memory.left[slot] = tokens - moved;
      }
      if (to == 32 * w + lane) {
        load[w] += moved;
        const int32_t nth = memory.n_free[to] - spare[w];
        memory.taken[to * p.slots_per_rank + nth] = static_cast<uint16_t>(memory.expert[slot]);
        full = --spare[w] == 0;
      }
    }
    if (__any_sync(kFullWarp, too_many)) return -1;
    if (__any_sync(kFullWarp, full)) room -= target - least - moved;
    __syncwarp();
  }
}

// The target of attempt `nth`, from 0 on.
__device__ __forceinline__ int32_t TargetOf(int32_t nth, int32_t mean, int32_t most) {
  return mean + CopyTargetPart(CopyTargetPart(most - mean, nth + 1), nth + 1);
}

// Which attempt is taken; a warp finds it, from all attempts' numbers of copies.
__device__ __forceinline__ int32_t ChooseAttempt(const int32_t* copies, int32_t mean,
                                                 int32_t most) {
  static_assert(kNTargets == 32, "a lane has an attempt");
  const int32_t lane = threadIdx.x & 31;
  const int32_t n = copies[lane];
  const int32_t target = TargetOf(lane, mean, most);
  const int32_t least = __reduce_min_sync(kFullWarp, n >= 0 ? target : most);
  const bool good_enough = n >= 0 && target - least <= mean >> kCopiesWorth;
  const int32_t fewest = __reduce_min_sync(kFullWarp, good_enough ? n : kInt32Max);
  return __ffs(__ballot_sync(kFullWarp, good_enough && n == fewest)) - 1;
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_BATCH_COPIES_CUH_
