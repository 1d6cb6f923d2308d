// Chooses copies for the batch at hand: lplb_jax/reference/batch_copies.py says which. The attempts
// for all targets run side by side, one warp each, on what they share: the homes. A step of an
// attempt is a chain of votes and reductions, and attempts that share a scheduler slow one another
// down: so the blocks of a cluster make a few each.
#ifndef LPLB_CUDA_BATCH_COPIES_CUH_
#define LPLB_CUDA_BATCH_COPIES_CUH_

#include <cstdint>

#include "cuda/problem.h"
#include "cuda/warp.cuh"
#include "cuda/waves.cuh"

namespace lplb::cuda {

// Shared memory of a block that makes n attempts side by side, in words of 32 bits.
struct CopiesMemory {
  int32_t* total;    // [n_logical], tokens
  int32_t* home;     // [n_logical], slots, as log2phy has them
  int32_t* expert;   // [n_physical], at home in the slot; −1 − n in a rank's n-th slot for copies
  int32_t* tokens;   // [n_physical], of that expert
  int32_t* load;     // [ep_size], without copies
  int32_t* n_free;   // [ep_size], slots for copies
  int32_t* hottest;  // [ep_size], which of a rank's slots has the most tokens
  int32_t* copies;   // [kNTargets], of every attempt; −1 where it failed
  int32_t* sums;     // [2], of the upper and the lower halves of the totals
  // Of every attempt:
  int32_t* left;     // [n_physical], tokens that are still at home
  int32_t* n_taken;  // [ep_size], copies on every rank
  uint16_t* taken;   // [ep_size, slots_per_rank], their experts, in the order of the slots

  LPLB_HOST_DEVICE static int32_t AttemptWords(const Problem& p) {
    return p.n_physical + p.ep_size + (p.n_physical + 1) / 2;
  }

  LPLB_HOST_DEVICE static int32_t Words(const Problem& p, int32_t n_attempts) {
    return 2 * (p.n_logical + p.n_physical) + 3 * p.ep_size + kNTargets + 2 +
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
    hottest = n_free + p.ep_size;
    copies = hottest + p.ep_size;
    sums = copies + kNTargets;
    left = sums + 2 + attempt * AttemptWords(p);
    n_taken = left + p.n_physical;
    taken = reinterpret_cast<uint16_t*>(n_taken + p.ep_size);
  }
};

// The first rank with `value`, which some rank has; lane l has those of ranks l, 32 + l, …
template <int kWords>
__device__ __forceinline__ int32_t FirstWith(const int32_t (&values)[kWords], int32_t value) {
  int32_t rank = kInt32Max;
#pragma unroll
  for (int w = kWords - 1; w >= 0; --w) {
    if (values[w] == value) rank = 32 * w + static_cast<int32_t>(threadIdx.x & 31);
  }
  return __reduce_min_sync(kFullWarp, rank);
}

// The slot with the most tokens, of a rank's n; of equals, the first. By one warp.
__device__ __forceinline__ int2 Hottest(const int32_t* tokens, int32_t n) {
  int32_t most = -1;
  int32_t slot = 0;
#pragma unroll 1
  for (int32_t k = threadIdx.x & 31; k < n; k += 32) {
    slot = tokens[k] > most ? k : slot;
    most = max(most, tokens[k]);
  }
  const int32_t of_all = __reduce_max_sync(kFullWarp, most);
  return {of_all, __reduce_min_sync(kFullWarp, most == of_all ? slot : kInt32Max)};
}

// Copies with which no rank has more than `target` tokens, by one warp. Returns their number, −1
// where the attempt failed. Every rank's hottest expert is known from the start: it has to be found
// again only where the rank is above the target still, which most are not.
template <int kWords>
__device__ inline int32_t Attempt(const Problem& p, const CopiesMemory& memory, int32_t target,
                                  int32_t fan_out) {
  const int32_t lane = threadIdx.x & 31;
#pragma unroll 4
  for (int32_t i = lane; i < p.n_physical; i += 32) memory.left[i] = memory.tokens[i];
  int32_t load[kWords];
  int32_t spare[kWords];    // slots for copies that are left
  int32_t sent[kWords];     // copies of the rank's experts
  int32_t tokens[kWords];   // left of the hottest expert
  int32_t hottest[kWords];  // its slot on the rank
  int64_t room = 0;  // of the ranks that can take copies, less what is above the target elsewhere
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const int32_t rank = 32 * w + lane;
    const bool live = rank < p.ep_size;
    load[w] = live ? memory.load[rank] : -1;
    spare[w] = live ? memory.n_free[rank] : 0;
    hottest[w] = live ? memory.hottest[rank] : 0;
    tokens[w] = live ? memory.tokens[rank * p.slots_per_rank + hottest[w]] : 0;
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
    if (ValueOf(sent, from) >= fan_out) return -1;
    const int32_t of_hottest = ValueOf(tokens, from);
    const int32_t slot = from * p.slots_per_rank + ValueOf(hottest, from);
    const int32_t moved = min(min(most - target, of_hottest), target - least);
    // What room the rank has left is lost with its last slot.
    if (ValueOf(spare, to) == 1) room -= target - least - moved;

#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if (from == 32 * w + lane) {
        ++sent[w];
        load[w] -= moved;
      }
      if (to == 32 * w + lane) {
        load[w] += moved;
        const int32_t nth = memory.n_free[to] - spare[w];
        memory.taken[to * p.slots_per_rank + nth] = static_cast<uint16_t>(memory.expert[slot]);
        --spare[w];
      }
    }
    if (most - moved == target) continue;
    if (lane == 0) memory.left[slot] = of_hottest - moved;
    __syncwarp();
    const int2 next = Hottest(memory.left + from * p.slots_per_rank, p.slots_per_rank);
    __syncwarp();
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if (from == 32 * w + lane) {
        tokens[w] = next.x;
        hottest[w] = next.y;
      }
    }
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
