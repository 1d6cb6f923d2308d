// Chooses copies for the batch at hand: lplb_jax/reference/batch_copies.py says which. The attempts
// for all targets run side by side, one warp each, on what they share: the homes. A step of an
// attempt is a chain of votes and reductions, and attempts that share a scheduler slow one another
// down: so the blocks of a cluster make a few each.
#ifndef LPLB_CUDA_BATCH_COPIES_CUH_
#define LPLB_CUDA_BATCH_COPIES_CUH_

#include <cstdint>

#include "cuda/graph_waves.cuh"
#include "cuda/problem.h"

namespace lplb::cuda {

// Shared memory of a block that makes n attempts side by side, in words of 32 bits, from an address
// on that is a multiple of 16 bytes.
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
  int32_t* n_taken;  // [ep_size], copies on every rank
  uint16_t* taken;   // [ep_size, slots_per_rank], their experts, in the order of the slots
  int32_t* left;     // [n_physical], tokens that are still at home

  LPLB_HOST_DEVICE static int32_t RoundUp(int32_t words) { return (words + 3) / 4 * 4; }

  // n_taken and taken, which travel together.
  LPLB_HOST_DEVICE static int32_t TakenWords(const Problem& p) {
    return RoundUp(p.ep_size + (p.n_physical + 1) / 2);
  }
  LPLB_HOST_DEVICE static int32_t AttemptWords(const Problem& p) {
    return TakenWords(p) + RoundUp(p.n_physical);
  }
  LPLB_HOST_DEVICE static int32_t SharedWords(const Problem& p) {
    return RoundUp(2 * (p.n_logical + p.n_physical) + 3 * p.ep_size + kNTargets + 2);
  }
  LPLB_HOST_DEVICE static int32_t Words(const Problem& p, int32_t n_attempts) {
    return SharedWords(p) + n_attempts * AttemptWords(p);
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
    n_taken = memory + SharedWords(p) + attempt * AttemptWords(p);
    taken = reinterpret_cast<uint16_t*>(n_taken + p.ep_size);
    left = n_taken + TakenWords(p);
  }
};

// How the attempts are dealt out over the blocks that share them.
struct AttemptShape {
  int32_t n_blocks;
  int32_t n_attempts;  // that a block makes side by side

  // Attempt number `nth` is made by this warp of this block, and, where there are fewer of them
  // than attempts, overwritten by another afterwards.
  LPLB_HOST_DEVICE int32_t WarpOf(int32_t nth) const { return nth % n_attempts; }
  LPLB_HOST_DEVICE int32_t BlockOf(int32_t nth) const { return nth / n_attempts % n_blocks; }
  LPLB_HOST_DEVICE bool IsOverwritten(int32_t nth) const {
    return nth + n_blocks * n_attempts < kNTargets;
  }
};

// Which slots are homes, and the others numbered: what needs no loads. A barrier must follow before
// other warps read it.
template <typename Threads>
__device__ __forceinline__ void FindHomes(const Problem& p, const int32_t* phy2log,
                                          const int32_t* log2phy, const PrefetchedGraph& fetched,
                                          const CopiesMemory& memory) {
  const int32_t thread = threadIdx.x;
  const int32_t n_threads = Threads::Size();
  const int32_t lane = thread & 31;
#pragma unroll 1
  for (int32_t i = thread; i < p.n_physical; i += n_threads) {
    memory.expert[i] = i == thread               ? fetched.expert[0]
                       : i == thread + n_threads ? fetched.expert[1]
                                                 : phy2log[i];
  }
#pragma unroll 1
  for (int32_t e = thread; e < p.n_logical; e += n_threads) {
    memory.home[e] = e == thread ? fetched.home : log2phy[e * p.max_replicas];
  }
  if (thread < 2) memory.sums[thread] = 0;
  Threads::Sync();
#pragma unroll 1
  for (int32_t rank = thread / 32; rank < p.ep_size; rank += n_threads / 32) {
    int32_t n_free = 0;
#pragma unroll 1
    for (int32_t begin = 0; begin < p.slots_per_rank; begin += 32) {
      const int32_t k = begin + lane;
      const int32_t slot = rank * p.slots_per_rank + k;
      const bool live = k < p.slots_per_rank;
      const int32_t expert = live ? memory.expert[slot] : -1;
      const bool known = expert >= 0 && expert < p.n_logical;
      const bool is_home = known && memory.home[expert] == slot;
      const uint32_t free = __ballot_sync(kFullWarp, live && !is_home);
      const int32_t nth = n_free + __popc(free & ((1u << lane) - 1));
      if (live && !is_home) memory.expert[slot] = -1 - nth;
      n_free += __popc(free);
    }
    if (lane == 0) memory.n_free[rank] = n_free;
  }
}

// The loads without copies; total_of(e) are an expert's tokens, 2³¹ where they are more. Where all
// together are too many for the solver, they count as none, and there are no copies. Behind
// FindHomes and a barrier; ends with one.
template <typename Threads, typename TotalOf>
__device__ __forceinline__ void LoadHomes(const Problem& p, const TotalOf& total_of,
                                          const CopiesMemory& memory) {
  const int32_t lane = threadIdx.x & 31;
  uint32_t high = 0;  // These sums of halves stay below 2³².
  uint32_t low = 0;
#pragma unroll 1
  for (int32_t e = threadIdx.x; e < p.n_logical; e += Threads::Size()) {
    const uint32_t total = total_of(e);
    high += total >> 16;
    low += total & 0xffff;
    memory.total[e] = static_cast<int32_t>(min(total, static_cast<uint32_t>(kInt32Max)));
  }
  high = __reduce_add_sync(kFullWarp, high);
  low = __reduce_add_sync(kFullWarp, low);
  if (lane < 2) atomicAdd(&memory.sums[lane], static_cast<int32_t>(lane == 0 ? high : low));
  Threads::Sync();
  const uint64_t sum = (static_cast<uint64_t>(static_cast<uint32_t>(memory.sums[0])) << 16) +
                       static_cast<uint32_t>(memory.sums[1]);
  const bool too_many = sum > static_cast<uint64_t>(kInt32Max);
#pragma unroll 1
  for (int32_t rank = threadIdx.x / 32; rank < p.ep_size; rank += Threads::Size() / 32) {
    uint32_t load = 0;
    int32_t most = -1;
    int32_t hottest = 0;
#pragma unroll 2
    for (int32_t k = lane; k < p.slots_per_rank; k += 32) {
      const int32_t slot = rank * p.slots_per_rank + k;
      const int32_t expert = memory.expert[slot];
      const int32_t tokens = expert >= 0 && !too_many ? memory.total[expert] : 0;
      memory.tokens[slot] = tokens;
      load += tokens;
      hottest = tokens > most ? k : hottest;
      most = max(most, tokens);
    }
    load = __reduce_add_sync(kFullWarp, load);
    const int32_t of_all = __reduce_max_sync(kFullWarp, most);
    hottest = __reduce_min_sync(kFullWarp, most == of_all ? hottest : kInt32Max);
    if (lane == 0) {
      memory.load[rank] = static_cast<int32_t>(load);
      memory.hottest[rank] = hottest;
    }
  }
  Threads::Sync();
}

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

// What the targets are made of; every warp finds it.
struct TargetRange {
  int32_t mean;
  int32_t most;

  // The target of attempt `nth`, from 0 on.
  __device__ __forceinline__ int32_t Target(int32_t nth) const {
    return mean + CopyTargetPart(CopyTargetPart(most - mean, nth + 1), nth + 1);
  }
};

template <int kWords>
__device__ __forceinline__ TargetRange TargetsOf(const Problem& p, const CopiesMemory& memory) {
  int32_t load[kWords];
  ValuesOfRanks<kWords>(p, memory.load, 0, load);
  int32_t most = 0;
#pragma unroll
  for (int w = 0; w < kWords; ++w) most = max(most, load[w]);
  return {WarpCeilMean(load, SmallDivisor(p.ep_size)), __reduce_max_sync(kFullWarp, most)};
}

// This block's attempts; report(nth, copies) is called by their warps. `words` is the memory.
template <int kWords, typename Report>
__device__ __forceinline__ void MakeAttempts(const Problem& p, int32_t* words,
                                             const AttemptShape& shape, int32_t block,
                                             const TargetRange& targets, int32_t fan_out,
                                             const Report& report) {
  const int32_t warp = threadIdx.x / 32;
  if (warp >= shape.n_attempts) return;
  const CopiesMemory memory(p, warp, words);
#pragma unroll 1
  for (int32_t i = block * shape.n_attempts + warp; i < kNTargets;
       i += shape.n_blocks * shape.n_attempts) {
    report(i, Attempt<kWords>(p, memory, targets.Target(i), fan_out));
    __syncwarp();
  }
}

// Which attempt is taken; a warp finds it, lane i from the copies of attempt i.
__device__ __forceinline__ int32_t ChooseAttempt(int32_t n_copies, const TargetRange& targets) {
  static_assert(kNTargets == 32, "a lane has an attempt");
  const int32_t target = targets.Target(threadIdx.x & 31);
  const bool succeeded = n_copies >= 0;
  const int32_t least = __reduce_min_sync(kFullWarp, succeeded ? target : targets.most);
  const bool good_enough = succeeded && target - least <= targets.mean >> kCopiesWorth;
  const int32_t fewest = __reduce_min_sync(kFullWarp, good_enough ? n_copies : kInt32Max);
  return __ffs(__ballot_sync(kFullWarp, good_enough && n_copies == fewest)) - 1;
}

// The expert in a slot, of a home or of the copies in `memory`; −1 where there is none.
__device__ __forceinline__ int32_t ChosenIn(const Problem& p, const CopiesMemory& memory,
                                            int32_t slot) {
  const int32_t expert = memory.expert[slot];
  if (expert >= 0) return expert;
  const int32_t nth = -1 - expert;
  const int32_t rank = p.by_slots.Quotient(slot);
  return nth < memory.n_taken[rank] ? memory.taken[rank * p.slots_per_rank + nth] : -1;
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_BATCH_COPIES_CUH_
