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
  int32_t* home;      // [n_logical], slots, as log2phy has them
  int32_t* expert;    // [n_physical], at home in the slot; −1 where a copy may go
  int32_t* tokens;    // [n_physical], of that expert
  int32_t* load;      // [ep_size], without copies; −1 where it passes int32
  int32_t* n_free;    // [ep_size], slots for copies
  int32_t* hottest;   // [ep_size], which of a rank's slots has the most tokens
  int32_t* n_copies;  // [kNTargets], of every attempt; −1 where it failed
  uint16_t* free;     // [ep_size, slots_per_rank], the rank's slots for copies, the last one first
  // Of every attempt:
  uint32_t* chosen;  // [MostCopies], its copies in their order, packed
  int32_t* moved;    // [MostCopies], their tokens
  int32_t* left;     // [n_physical], tokens that are still at home

  LPLB_HOST_DEVICE static int32_t RoundUp(int32_t words) { return (words + 3) / 4 * 4; }

  // Copies that an attempt makes at most: as many as there are free slots, if all homes are right.
  LPLB_HOST_DEVICE static int32_t MostCopies(const Problem& p) {
    return p.n_physical - p.n_logical;
  }
  LPLB_HOST_DEVICE static int32_t AttemptWords(const Problem& p) {
    return 2 * RoundUp(MostCopies(p)) + RoundUp(p.n_physical);
  }
  LPLB_HOST_DEVICE static int32_t SharedWords(const Problem& p) {
    return RoundUp(p.n_logical + 2 * p.n_physical + 3 * p.ep_size + kNTargets +
                   (p.n_physical + 1) / 2);
  }
  LPLB_HOST_DEVICE static int32_t Words(const Problem& p, int32_t n_attempts) {
    return SharedWords(p) + n_attempts * AttemptWords(p);
  }

  // With the memory of one of the attempts.
  __device__ CopiesMemory(const Problem& p, int32_t attempt, int32_t* memory) {
    home = memory;
    expert = home + p.n_logical;
    tokens = expert + p.n_physical;
    load = tokens + p.n_physical;
    n_free = load + p.ep_size;
    hottest = n_free + p.ep_size;
    n_copies = hottest + p.ep_size;
    free = reinterpret_cast<uint16_t*>(n_copies + kNTargets);
    int32_t* of_attempt = memory + SharedWords(p) + attempt * AttemptWords(p);
    chosen = reinterpret_cast<uint32_t*>(of_attempt);
    moved = of_attempt + RoundUp(MostCopies(p));
    left = moved + RoundUp(MostCopies(p));
  }

  // A copy is packed as its place in `free` and, in the upper half, the expert's home.
  static __device__ __forceinline__ uint32_t Pack(int32_t place, int32_t home_slot) {
    return static_cast<uint32_t>(place) | static_cast<uint32_t>(home_slot) << 16;
  }
  __device__ __forceinline__ int32_t SlotOf(uint32_t copy) const { return free[copy & 0xffff]; }
  __device__ __forceinline__ int32_t HomeOf(uint32_t copy) const {
    return static_cast<int32_t>(copy >> 16);
  }
  __device__ __forceinline__ int32_t ExpertOf(uint32_t copy) const { return expert[HomeOf(copy)]; }
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

// Which slots are homes, and which are free: what needs no loads. A barrier must follow
// before other warps read it.
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
  Threads::Sync();
#pragma unroll 1
  for (int32_t rank = thread / 32; rank < p.ep_size; rank += n_threads / 32) {
    int32_t n_free = 0;  // of the slots that were looked at: the last ones come first
#pragma unroll 1
    for (int32_t begin = (p.slots_per_rank - 1) / 32 * 32; begin >= 0; begin -= 32) {
      const int32_t k = begin + lane;
      const int32_t slot = rank * p.slots_per_rank + k;
      const bool live = k < p.slots_per_rank;
      const int32_t expert = live ? memory.expert[slot] : -1;
      const bool known = expert >= 0 && expert < p.n_logical;
      const bool is_home = known && memory.home[expert] == slot;
      const uint32_t free = __ballot_sync(kFullWarp, live && !is_home);
      if (live && !is_home) {
        const int32_t n_later = n_free + __popc(free & (~1u << lane));
        memory.free[rank * p.slots_per_rank + n_later] = static_cast<uint16_t>(slot);
        memory.expert[slot] = -1;
      }
      n_free += __popc(free);
    }
    if (lane == 0) memory.n_free[rank] = n_free;
  }
}

// The loads without copies; total_of(e) are an expert's tokens, 2³¹ or more where they pass int32.
// Behind FindHomes and a barrier; ends with one.
template <typename Threads, typename TotalOf>
__device__ __forceinline__ void LoadHomes(const Problem& p, const TotalOf& total_of,
                                          const CopiesMemory& memory) {
  // So many lanes a rank, a power of two.
  constexpr int32_t kMostLanes = 16;
  int32_t n_lanes = kMostLanes;
  while (n_lanes > 1 && n_lanes * p.ep_size > Threads::Size()) n_lanes /= 2;
  const int32_t lane = threadIdx.x & (n_lanes - 1);
  const int32_t first = threadIdx.x / n_lanes;
  const int32_t stride = Threads::Size() / n_lanes;
#pragma unroll 1
  for (int32_t begin = 0; begin < p.ep_size; begin += stride) {
    const int32_t rank = begin + first;
    uint32_t high = 0;  // These sums of halves stay below 2³².
    uint32_t low = 0;
    int32_t most = -1;
    int32_t hottest = 0;
#pragma unroll 2
    for (int32_t k = lane; k < p.slots_per_rank && rank < p.ep_size; k += n_lanes) {
      const int32_t slot = rank * p.slots_per_rank + k;
      const int32_t expert = memory.expert[slot];
      const uint32_t total = expert >= 0 ? total_of(expert) : 0;
      const int32_t tokens = static_cast<int32_t>(min(total, static_cast<uint32_t>(kInt32Max)));
      memory.tokens[slot] = tokens;
      high += total >> 16;
      low += total & 0xffff;
      hottest = tokens > most ? k : hottest;
      most = max(most, tokens);
    }
#pragma unroll 1
    for (int32_t step = n_lanes / 2; step > 0; step /= 2) {
      high += __shfl_xor_sync(kFullWarp, high, step);
      low += __shfl_xor_sync(kFullWarp, low, step);
      const int32_t other_most = __shfl_xor_sync(kFullWarp, most, step);
      const int32_t other = __shfl_xor_sync(kFullWarp, hottest, step);
      if (other_most > most || (other_most == most && other < hottest)) hottest = other;
      most = max(most, other_most);
    }
    if (lane == 0 && rank < p.ep_size) {
      const bool fits = high + (low >> 16) < 1u << 15;
      memory.load[rank] = fits ? static_cast<int32_t>((high << 16) + low) : -1;
      memory.hottest[rank] = hottest;
    }
  }
  Threads::Sync();
}

// A key is a load and, below it, a number that tells whose it is, so that one reduction finds both.
// In 32 bits only small loads have room; others take two reductions.
template <typename Key>
constexpr int kNumberBits = sizeof(Key) == sizeof(uint32_t) ? 9 : 32;
template <typename Key>
constexpr Key kNumbers = (Key{1} << kNumberBits<Key>)-1;
template <typename Key>
constexpr Key kNoKey = ~Key{0};

// Of equal loads the largest key has the lowest number.
template <typename Key>
__device__ __forceinline__ Key MaxKey(int32_t load, int32_t number) {
  return static_cast<Key>(load) << kNumberBits<Key> | (kNumbers<Key> - static_cast<Key>(number));
}
template <typename Key>
__device__ __forceinline__ Key MinKey(int32_t load, int32_t number) {
  return static_cast<Key>(load) << kNumberBits<Key> | static_cast<Key>(number);
}
template <typename Key>
__device__ __forceinline__ int32_t LoadIn(Key key) {
  return static_cast<int32_t>(key >> kNumberBits<Key>);
}
template <typename Key>
__device__ __forceinline__ int32_t NumberInMax(Key key) {
  return static_cast<int32_t>(kNumbers<Key> - (key & kNumbers<Key>));
}
template <typename Key>
__device__ __forceinline__ int32_t NumberInMin(Key key) {
  return static_cast<int32_t>(key & kNumbers<Key>);
}

__device__ __forceinline__ uint32_t WarpMax(uint32_t key) {
  return __reduce_max_sync(kFullWarp, key);
}
__device__ __forceinline__ uint64_t WarpMax(uint64_t key) {
  const uint32_t high = static_cast<uint32_t>(key >> 32);
  const uint32_t most = WarpMax(high);
  return static_cast<uint64_t>(most) << 32 |
         WarpMax(high == most ? static_cast<uint32_t>(key) : 0u);
}
__device__ __forceinline__ uint32_t WarpMin(uint32_t key) {
  return __reduce_min_sync(kFullWarp, key);
}
__device__ __forceinline__ uint64_t WarpMin(uint64_t key) { return ~WarpMax(~key); }

// Copies with which no rank has more than `target` tokens, by one warp. Returns their number, −1
// where the attempt failed. A step is a chain of a reduction and a shuffle. A warp waits for a
// result where it is first used: so a rank's next hottest expert is found with the next step's
// reductions, and what the step does not need is only stored.
template <int kWords, typename Key>
__device__ inline int32_t Attempt(const Problem& p, const CopiesMemory& memory, int32_t target,
                                  int32_t fan_out) {
  const int32_t lane = threadIdx.x & 31;
  const int32_t n_slots = p.slots_per_rank;
#pragma unroll 4
  for (int32_t i = lane; i < p.n_physical; i += 32) memory.left[i] = memory.tokens[i];
  Key load[kWords];       // of all ranks, the largest first
  Key open[kWords];       // of those that can take a copy, the smallest first
  Key hottest[kWords];    // the rank's expert with most tokens left; 0: it may send no more copies
  int32_t spare[kWords];  // slots for copies that are left
  int32_t sent[kWords];   // copies of the rank's experts
  int64_t room = 0;  // of the ranks that can take copies, less what is above the target elsewhere
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const int32_t rank = 32 * w + lane;
    load[w] = hottest[w] = 0;
    open[w] = kNoKey<Key>;
    spare[w] = sent[w] = 0;
    if (rank >= p.ep_size) continue;
    const int32_t tokens = memory.load[rank];
    const int32_t slot = memory.hottest[rank];
    load[w] = MaxKey<Key>(tokens, rank);
    hottest[w] = MaxKey<Key>(memory.tokens[rank * n_slots + slot], slot);
    spare[w] = memory.n_free[rank];
    if (spare[w] > 0 && tokens < target) open[w] = MinKey<Key>(tokens, rank);
    if (tokens > target || spare[w] > 0) room += target - tokens;
  }
  room = int64_t{__reduce_add_sync(kFullWarp, static_cast<int32_t>(room >> 16))} * (1 << 16) +
         __reduce_add_sync(kFullWarp, static_cast<uint32_t>(room & 0xffff));
  __syncwarp();

  int32_t sender = -1;  // of the last copy
  Key next = 0;         // the hottest of this lane's of its experts
#pragma unroll 1
  for (int32_t n_copies = 0;; ++n_copies) {
    Key fullest = load[0];
    Key emptiest = open[0];
#pragma unroll
    for (int w = 1; w < kWords; ++w) {
      fullest = max(fullest, load[w]);
      emptiest = min(emptiest, open[w]);
    }
    fullest = WarpMax(fullest);
    emptiest = WarpMin(emptiest);
    next = WarpMax(next);
    const int32_t most = LoadIn(fullest);
    if (most <= target) return n_copies;
    const int32_t from = NumberInMax(fullest);
    const int32_t to = NumberInMin(emptiest);
    int32_t* of_rank = memory.left + from * n_slots;
    const int32_t first_left = lane < n_slots ? of_rank[lane] : 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if (sender == 32 * w + lane) hottest[w] = sent[w] < fan_out ? next : 0;
    }
    const Key hot = ValueOf(hottest, from);
    const int32_t n_spare = ValueOf(spare, to);
    if (room < 0 || emptiest == kNoKey<Key> || hot == 0) return -1;
    if (n_copies == CopiesMemory::MostCopies(p)) return -1;
    const int32_t k = NumberInMax(hot);
    const int32_t fits = target - LoadIn(emptiest);
    const int32_t moved = min(min(most - target, LoadIn(hot)), fits);
    // What room the rank has left is lost with its last slot.
    room -= n_spare == 1 ? fits - moved : 0;
    const Key change = static_cast<Key>(moved) << kNumberBits<Key>;
    const bool closes = n_spare == 1 || moved == fits;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const bool sends = from == 32 * w + lane;
      const bool takes = to == 32 * w + lane;
      load[w] += takes ? change : sends ? -change : 0;
      open[w] = !takes ? open[w] : closes ? kNoKey<Key> : open[w] + change;
      spare[w] -= takes;
      sent[w] += sends;
    }
    const int32_t left = LoadIn(hot) - moved;
    if (lane == 0) {
      memory.chosen[n_copies] = CopiesMemory::Pack(to * n_slots + n_spare - 1, from * n_slots + k);
      memory.moved[n_copies] = moved;
      of_rank[k] = left;
    }
    sender = from;
    next = lane < n_slots ? MaxKey<Key>(lane == k ? left : first_left, lane) : 0;
#pragma unroll 1
    for (int32_t i = lane + 32; i < n_slots; i += 32) {
      next = max(next, MaxKey<Key>(i == k ? left : of_rank[i], i));
    }
    __syncwarp();
  }
}

// What the targets are made of; every warp finds it.
struct TargetRange {
  int32_t mean;
  int32_t most;
  bool too_many;  // All together are too many tokens for the solver: there are no copies.

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
  uint32_t high = 0;
  uint32_t low = 0;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    most = max(most, load[w]);
    // One that passes int32 makes the sum large, too.
    high += static_cast<uint32_t>(load[w]) >> 16;
    low += static_cast<uint32_t>(load[w]) & 0xffff;
  }
  most = __reduce_max_sync(kFullWarp, most);
  high = __reduce_add_sync(kFullWarp, high);
  low = __reduce_add_sync(kFullWarp, low);
  if (high + (low >> 16) >= 1u << 15) return {0, 0, true};
  return {CeilDivide(high, low, SmallDivisor(p.ep_size)), most, false};
}

// Attempt number `nth`, with keys that have room for its loads.
template <int kWords>
__device__ __forceinline__ int32_t AttemptNth(const Problem& p, const CopiesMemory& memory,
                                              const TargetRange& targets, int32_t nth,
                                              int32_t fan_out) {
  using Small = uint32_t;
  if (targets.too_many) return 0;
  const int32_t target = targets.Target(nth);
  if (targets.most < LoadIn(kNoKey<Small>) &&
      p.slots_per_rank <= static_cast<int32_t>(kNumbers<Small>)) {
    return Attempt<kWords, Small>(p, memory, target, fan_out);
  }
  return Attempt<kWords, uint64_t>(p, memory, target, fan_out);
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
    report(i, AttemptNth<kWords>(p, memory, targets, i, fan_out));
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

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_BATCH_COPIES_CUH_
