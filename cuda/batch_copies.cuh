// Chooses copies for the batch at hand: lplb_jax/reference/batch_copies.py says which. The attempts
// for all targets run side by side, one warp each, on what they share: the homes. A step of an
// attempt is a chain of votes and reductions, and attempts that share a scheduler slow one another
// down: so the blocks of a cluster make a few each.
#ifndef LPLB_CUDA_BATCH_COPIES_CUH_
#define LPLB_CUDA_BATCH_COPIES_CUH_

#include <cstdint>
#include <type_traits>

#include "cuda/cluster.cuh"
#include "cuda/graph_waves.cuh"
#include "cuda/problem.h"

namespace lplb::cuda {

// Shared memory of a block that makes n attempts side by side, in words of 32 bits, from an address
// on that is a multiple of 16 bytes.
struct CopiesMemory {
  int32_t* tokens;   // [n_physical], of the slot's expert
  int32_t* expert;   // [n_physical], at home in the slot; −1 where a copy may go
  int32_t* home;     // [n_logical], slots, as log2phy has them
  int32_t* load;     // [ep_size], without copies; −1 where it passes int32
  int32_t* n_free;   // [ep_size], slots for copies
  int32_t* most;     // [ep_size], the most tokens that a slot of the rank has
  int32_t* hottest;  // [ep_size], the first of its slots that has so many
  uint16_t* free;    // [ep_size, slots_per_rank], the rank's slots for copies, the last one first
  // Of every attempt:
  uint2* chosen;  // [MostCopies], its copies in their order: packed, and their tokens
  int32_t* left;  // [n_physical], tokens that are still at home

  LPLB_HOST_DEVICE static int32_t RoundUp(int32_t words) { return (words + 3) / 4 * 4; }

  // Copies that an attempt makes at most: as many as there are free slots, if all homes are right.
  LPLB_HOST_DEVICE static int32_t MostCopies(const Problem& p) {
    return p.n_physical - p.n_logical;
  }
  LPLB_HOST_DEVICE static int32_t AttemptWords(const Problem& p) {
    return RoundUp(2 * MostCopies(p)) + RoundUp(p.n_physical);
  }
  LPLB_HOST_DEVICE static int32_t SharedWords(const Problem& p) {
    return RoundUp(RoundUp(p.n_physical) + p.n_physical + p.n_logical + 4 * p.ep_size +
                   (p.n_physical + 1) / 2);
  }
  LPLB_HOST_DEVICE static int32_t Words(const Problem& p, int32_t n_attempts) {
    return SharedWords(p) + n_attempts * AttemptWords(p);
  }

  // With the memory of one of the attempts.
  __device__ CopiesMemory(const Problem& p, int32_t attempt, int32_t* memory) {
    tokens = memory;
    expert = tokens + RoundUp(p.n_physical);
    home = expert + p.n_physical;
    load = home + p.n_logical;
    n_free = load + p.ep_size;
    most = n_free + p.ep_size;
    hottest = most + p.ep_size;
    free = reinterpret_cast<uint16_t*>(hottest + p.ep_size);
    int32_t* of_attempt = memory + SharedWords(p) + attempt * AttemptWords(p);
    chosen = reinterpret_cast<uint2*>(of_attempt);
    left = of_attempt + RoundUp(2 * MostCopies(p));
  }

  // A copy is packed as its place in `free` and, in the upper half, the expert's home.
  static __device__ __forceinline__ uint2 Pack(int32_t place, int32_t home_slot, int32_t tokens) {
    return {static_cast<uint32_t>(place) + (static_cast<uint32_t>(home_slot) << 16),
            static_cast<uint32_t>(tokens)};
  }
  __device__ __forceinline__ int32_t SlotOf(uint2 copy) const { return free[copy.x & 0xffff]; }
  static __device__ __forceinline__ int32_t HomeOf(uint2 copy) {
    return static_cast<int32_t>(copy.x >> 16);
  }
  static __device__ __forceinline__ int32_t TokensOf(uint2 copy) {
    return static_cast<int32_t>(copy.y);
  }
  __device__ __forceinline__ int32_t ExpertOf(uint2 copy) const { return expert[HomeOf(copy)]; }
};

// How the attempts are dealt out over the blocks that share them. Both are powers of two.
struct AttemptShape {
  int32_t n_blocks;
  int32_t n_attempts;  // that a block makes side by side

  // Attempt number `nth` is made by this warp of this block, and, where there are fewer of them
  // than attempts, overwritten by another afterwards.
  __device__ __forceinline__ int32_t WarpOf(int32_t nth) const { return nth & (n_attempts - 1); }
  __device__ __forceinline__ int32_t BlockOf(int32_t nth) const {
    return nth >> BitNumber(n_attempts) & (n_blocks - 1);
  }
  LPLB_HOST_DEVICE bool IsOverwritten(int32_t nth) const {
    return nth + n_blocks * n_attempts < kNTargets;
  }
};

// The lanes that share a rank's slots, a power of two: a warp where there are warps enough, else no
// more than it has slots. Warps take several ranks at once.
class RankLanes {
 public:
  __device__ __forceinline__ RankLanes(const Problem& p, int32_t n_threads) {
    log2_ = 5;
    if (p.ep_size > n_threads >> log2_) {
      do {
        --log2_;
      } while (log2_ > 0 && (p.ep_size > n_threads >> log2_ || p.slots_per_rank <= Size() / 2));
    }
  }

  __device__ __forceinline__ int32_t Size() const { return 1 << log2_; }
  __device__ __forceinline__ int32_t Lane() const { return threadIdx.x & (Size() - 1); }
  // This thread's first rank. Its next one is as many further on as the threads take at once.
  __device__ __forceinline__ int32_t Rank() const {
    return static_cast<int32_t>(threadIdx.x) >> log2_;
  }
  __device__ __forceinline__ int32_t Ranks(int32_t n_threads) const { return n_threads >> log2_; }
  // Which of them vote so; all lanes of the warp call it.
  __device__ __forceinline__ uint32_t Ballot(bool vote) const {
    const uint32_t votes = __ballot_sync(kFullWarp, vote) >> (threadIdx.x & 31 & ~(Size() - 1));
    return log2_ == 5 ? votes : votes & ((1u << Size()) - 1);
  }

 private:
  int32_t log2_;
};

// Which slots are homes, and which are free: what needs no loads. A rank's lanes then know it; for
// others a barrier must follow.
template <typename Threads>
__device__ __forceinline__ void FindHomes(const Problem& p, const int32_t* phy2log,
                                          const int32_t* log2phy, const PrefetchedGraph& fetched,
                                          const CopiesMemory& memory) {
  const int32_t thread = threadIdx.x;
  const int32_t n_threads = Threads::Size();
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
  const RankLanes lanes(p, n_threads);
  const int32_t n_lanes = lanes.Size();
  const int32_t n_slots = p.slots_per_rank;
  // The first of the last slots that the lanes take at once, two each.
  const int32_t last = (n_slots - 1) & ~(2 * n_lanes - 1);
  Threads::Sync();
#pragma unroll 1
  for (int32_t first = 0; first < p.ep_size; first += lanes.Ranks(n_threads)) {
    const int32_t rank = first + lanes.Rank();
    const int32_t end = rank < p.ep_size ? n_slots : 0;
    int32_t n_free = 0;  // of the slots that were looked at: the last ones come first
#pragma unroll 1
    for (int32_t begin = last; begin >= 0; begin -= 2 * n_lanes) {
      uint32_t free[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int32_t k = begin + j * n_lanes + lanes.Lane();
        const int32_t slot = rank * n_slots + k;
        const int32_t expert = k < end ? memory.expert[slot] : -1;
        const bool known = expert >= 0 && expert < p.n_logical;
        const bool is_home = known && memory.home[expert] == slot;
        free[j] = lanes.Ballot(k < end && !is_home);
      }
#pragma unroll
      for (int j = 1; j >= 0; --j) {
        if (free[j] >> lanes.Lane() & 1) {
          const int32_t slot = rank * n_slots + begin + j * n_lanes + lanes.Lane();
          const int32_t n_later = n_free + __popc(free[j] & (~1u << lanes.Lane()));
          memory.free[rank * n_slots + n_later] = static_cast<uint16_t>(slot);
          memory.expert[slot] = -1;
        }
        n_free += __popc(free[j]);
      }
    }
    if (lanes.Lane() == 0 && rank < p.ep_size) memory.n_free[rank] = n_free;
  }
  __syncwarp();
}

// The loads without copies; total_of(e) are an expert's tokens, 2³¹ or more where they pass int32.
// Behind FindHomes; ends with a barrier.
template <typename Threads, typename TotalOf>
__device__ __forceinline__ void LoadHomes(const Problem& p, const TotalOf& total_of,
                                          const CopiesMemory& memory) {
  const RankLanes lanes(p, Threads::Size());
  const int32_t n_lanes = lanes.Size();
  const int32_t lane = lanes.Lane();
#pragma unroll 1
  for (int32_t begin = 0; begin < p.ep_size; begin += lanes.Ranks(Threads::Size())) {
    const int32_t rank = begin + lanes.Rank();
    uint32_t high = 0;  // These sums of halves stay below 2³².
    uint32_t low = 0;
    int32_t most = -1;
    int32_t hottest = 0;
    const int32_t n_slots = rank < p.ep_size ? p.slots_per_rank : 0;
#pragma unroll 1
    for (int32_t k = lane; k < n_slots; k += 2 * n_lanes) {
      uint32_t total[2];  // Both are waited for together.
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const bool live = k + j * n_lanes < n_slots;
        const int32_t expert = live ? memory.expert[rank * n_slots + k + j * n_lanes] : -1;
        total[j] = expert >= 0 ? total_of(expert) : 0;
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (k + j * n_lanes >= n_slots) break;
        const int32_t tokens =
            static_cast<int32_t>(min(total[j], static_cast<uint32_t>(kInt32Max)));
        memory.tokens[rank * n_slots + k + j * n_lanes] = tokens;
        high += total[j] >> 16;
        low += total[j] & 0xffff;
        hottest = tokens > most ? k + j * n_lanes : hottest;
        most = max(most, tokens);
      }
    }
    if (n_lanes == 32) {
      high = __reduce_add_sync(kFullWarp, high);
      low = __reduce_add_sync(kFullWarp, low);
      const int32_t lane_most = most;
      most = __reduce_max_sync(kFullWarp, most);
      hottest = __reduce_min_sync(kFullWarp, lane_most == most ? hottest : kInt32Max);
    } else {
#pragma unroll 1
      for (int32_t step = n_lanes / 2; step > 0; step /= 2) {
        high += __shfl_xor_sync(kFullWarp, high, step);
        low += __shfl_xor_sync(kFullWarp, low, step);
        const int32_t other_most = __shfl_xor_sync(kFullWarp, most, step);
        const int32_t other = __shfl_xor_sync(kFullWarp, hottest, step);
        if (other_most > most || (other_most == most && other < hottest)) hottest = other;
        most = max(most, other_most);
      }
    }
    if (lane == 0 && rank < p.ep_size) {
      const bool fits = high + (low >> 16) < 1u << 15;
      memory.load[rank] = fits ? static_cast<int32_t>((high << 16) + low) : -1;
      memory.most[rank] = most;
      memory.hottest[rank] = hottest;
    }
  }
  Threads::Sync();
}

// A key is a number of tokens and, below it, a number that tells whose they are, so that one
// reduction finds both. In 32 bits only few tokens have room; others take two reductions.
template <typename Key>
constexpr int kNumberBits = sizeof(Key) == sizeof(uint32_t) ? 10 : 32;
template <typename Key>
constexpr Key kNumbers = (Key{1} << kNumberBits<Key>)-1;

template <typename Key>
__device__ __forceinline__ Key MakeKey(int32_t tokens, int32_t number) {
  return static_cast<Key>(tokens) << kNumberBits<Key> | static_cast<Key>(number);
}
// The key of a rank's slot k: of equal tokens, the largest has the lowest k.
template <typename Key>
__device__ __forceinline__ Key SlotKey(int32_t tokens, int32_t k) {
  return MakeKey<Key>(tokens, static_cast<int32_t>(kNumbers<Key> >> 1) - k);
}
template <typename Key>
__device__ __forceinline__ int32_t SlotIn(Key key) {
  return static_cast<int32_t>(kNumbers<Key> >> 1) - static_cast<int32_t>(key & kNumbers<Key>);
}
template <typename Key>
__device__ __forceinline__ int32_t TokensIn(Key key) {
  return static_cast<int32_t>(key >> kNumberBits<Key>);
}
template <typename Key>
__device__ __forceinline__ int32_t NumberIn(Key key) {
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
__device__ __forceinline__ int32_t SumOfWarp(int32_t value) {
  return __reduce_add_sync(kFullWarp, value);
}
__device__ __forceinline__ int64_t SumOfWarp(int64_t value) {
  return int64_t{SumOfWarp(static_cast<int32_t>(value >> 16))} * (1 << 16) +
         __reduce_add_sync(kFullWarp, static_cast<uint32_t>(value & 0xffff));
}

// Lets the compiler forget what a value is made of, lest it makes it anew in every step.
__device__ __forceinline__ void Keep(int32_t& value) { asm("" : "+r"(value)); }
__device__ __forceinline__ void Keep(uint32_t& value) { asm("" : "+r"(value)); }
__device__ __forceinline__ void Keep(uint64_t& value) { asm("" : "+l"(value)); }

// Whether no rank has sent more than `fan_out` of an attempt's n copies; by one warp.
template <int kWords>
__device__ inline bool AllSentFew(const Problem& p, const CopiesMemory& memory, int32_t n,
                                  int32_t fan_out) {
  __syncwarp();
  bool few = true;
#pragma unroll 1
  for (int32_t rank = Lane(); rank < p.ep_size; rank += 32) {
    int32_t n_sent = 0;
#pragma unroll 4
    for (int32_t i = 0; i < n; ++i) {
      n_sent += p.by_slots.Quotient(CopiesMemory::HomeOf(memory.chosen[i])) == rank;
    }
    few &= n_sent <= fan_out;
  }
  return __all_sync(kFullWarp, few);
}

// Copies with which no rank has more than `target` tokens, by one warp. Returns their number, −1
// where the attempt failed. Lanes hold kHeld slots of the sending rank; the rest, if kHeld is 3,
// they take one after the other.
//
// A step is a chain of a reduction, a shuffle and few instructions in between, but nearly as long
// are all its instructions: so keys tell lanes whether they are meant, and what a step does not
// need is only stored. A sender's next hottest expert is found while the next step shuffles. A
// limit to what a rank sends changes no step but makes attempts fail: it is looked at in the end.
template <int kWords, int kHeld, typename Key>
__device__ inline int32_t Attempt(const Problem& p, const CopiesMemory& memory, int32_t target,
                                  int32_t fan_out) {
  using Sum = std::make_signed_t<Key>;
  constexpr Key kNumber = kNumbers<Key>;
  const int32_t lane = Lane();
  const int32_t n_slots = p.slots_per_rank;
  const auto* tokens = reinterpret_cast<const int4*>(memory.tokens);
  auto* left = reinterpret_cast<int4*>(memory.left);
#pragma unroll 4
  for (int32_t i = lane; i < CopiesMemory::RoundUp(p.n_physical) / 4; i += 32) left[i] = tokens[i];
  // Ranks are numbered from the last one on, so that of equal keys the largest is the first rank's.
  Key excess[kWords];     // above the target, and the rank's number; else 0
  Key room[kWords];       // where a copy may go: below the target, number, whether it is the last
  Key hottest[kWords];    // the expert of a sending rank with most tokens left
  int32_t first[kWords];  // the rank's in `free`
  int32_t place[kWords];  // of its next copy there
  Sum spare = 0;          // all room, less all that is above the target
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const int32_t number = 32 * w + lane;
    const int32_t rank = p.ep_size - 1 - number;
    excess[w] = room[w] = hottest[w] = 0;
    first[w] = place[w] = 0;
    if (rank < 0) continue;
    const int32_t above = memory.load[rank] - target;
    const int32_t n_free = memory.n_free[rank];
    hottest[w] = SlotKey<Key>(memory.most[rank], memory.hottest[rank]);
    first[w] = rank * n_slots;
    place[w] = first[w] + n_free - 1;
    if (above > 0) excess[w] = MakeKey<Key>(above, number);
    if (above <= 0 && n_free > 0) room[w] = MakeKey<Key>(-above, 2 * number + (n_free == 1));
    if (above > 0 || n_free > 0) spare -= above;
  }
  spare = SumOfWarp(spare);
  __syncwarp();

  // A lane's slots on the sending rank: where it has fewer, the first one again.
  const bool has_slot = kHeld == 2 || lane < n_slots;
  int32_t offset[kHeld];
  Key slot[kHeld];
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    offset[j] = lane + 32 * j < n_slots ? 32 * j : 0;
    slot[j] = SlotKey<Key>(0, lane + offset[j]);
    Keep(offset[j]);
    Keep(slot[j]);
  }
  const int32_t last_first = (p.ep_size - 1) * n_slots;
  int32_t last_row = last_first + lane;  // in memory.left
  Keep(last_row);
  int32_t sender = -1;  // of the last copy
  Key next = 0;         // the hottest of this lane's of its experts
  int32_t n_copies = 0;
  Key fullest;
#pragma unroll 1
  while (true) {
    fullest = excess[0];
    Key emptiest = room[0];
#pragma unroll
    for (int w = 1; w < kWords; ++w) {
      fullest = max(fullest, excess[w]);
      emptiest = max(emptiest, room[w]);
    }
    fullest = WarpMax(fullest);
    emptiest = WarpMax(emptiest);
    // Where there is no room at all, there is less than is above the target.
    if (fullest <= kNumber || spare < 0 || n_copies == CopiesMemory::MostCopies(p)) break;
    Key hot = hottest[0];
#pragma unroll
    for (int w = 1; w < kWords; ++w) hot = excess[w] == fullest ? hottest[w] : hot;
    hot = __shfl_sync(kFullWarp, hot, static_cast<int32_t>(fullest));
    next = WarpMax(next);  // Meanwhile: it is needed last.
    const int32_t from = NumberIn(fullest);
    const int32_t before_last = from * n_slots;
    int32_t* const row = memory.left + (last_row - before_last);
    int32_t held[kHeld];
#pragma unroll
    for (int j = 0; j < kHeld; ++j) held[j] = has_slot ? row[offset[j]] : 0;
    hot = from == sender ? next : hot;
#pragma unroll
    for (int w = 0; w < kWords; ++w) hottest[w] = sender == 32 * w + lane ? next : hottest[w];

    const Key moved = min(min(fullest, emptiest), hot) & ~kNumber;
    // What room the rank has left is lost with its last slot.
    const Key rest = emptiest - moved;
    const Key room_left = (emptiest & 1) != 0 ? 0 : rest;
    spare -= static_cast<Sum>((rest - room_left) >> kNumberBits<Key>);
    const int32_t home = last_first - before_last + SlotIn(hot);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      excess[w] = excess[w] == fullest ? fullest - moved : excess[w];
      // Little at a time, so that it is no branch.
      const bool takes = room[w] == emptiest;
      const uint2 copy = CopiesMemory::Pack(place[w], home, TokensIn(moved));
      if (takes) memory.chosen[n_copies] = copy;
      if (takes) --place[w];
      room[w] = takes ? room_left : room[w];
      if (takes && place[w] == first[w]) ++room[w];
    }
    next = 0;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      Key key = MakeKey<Key>(held[j], 0) + slot[j];
      if (key == hot) {
        key -= moved;
        row[offset[j]] = TokensIn(key);
      }
      next = max(next, key);
    }
    if constexpr (kHeld == 3) {
#pragma unroll 1
      for (int32_t k = lane + 96; k < n_slots; k += 32) {
        Key key = SlotKey<Key>(row[k - lane], k);
        if (key == hot) {
          key -= moved;
          row[k - lane] = TokensIn(key);
        }
        next = max(next, key);
      }
    }
    sender = from;
    ++n_copies;
  }
  if (fullest > kNumber) return -1;
  return n_copies <= fan_out || AllSentFew<kWords>(p, memory, n_copies, fan_out) ? n_copies : -1;
}

// What the targets are made of; every warp finds it.
struct Targets {
  int32_t mean;
  int32_t most;
  int32_t of_lane;  // the target of the attempt that has the lane's number, from 0 on
  bool too_many;    // All together are too many tokens for the solver: there are no copies.

  __device__ __forceinline__ int32_t Of(int32_t nth) const {
    return __shfl_sync(kFullWarp, of_lane, nth);
  }
};
static_assert(kNTargets == 32, "a lane has an attempt");

template <int kWords>
__device__ __forceinline__ Targets TargetsOf(const Problem& p, const CopiesMemory& memory) {
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
  if (high + (low >> 16) >= 1u << 15) return {0, 0, 0, true};
  const int32_t sum = static_cast<int32_t>((high << 16) + low);
  const int32_t mean = p.by_ranks.Quotient(sum) + (p.by_ranks.Remainder(sum) > 0);
  const int32_t nth = Lane() + 1;
  return {mean, most, mean + CopyTargetPart(CopyTargetPart(most - mean, nth), nth), false};
}

// Attempt number `nth`, with keys that have room for its loads.
template <int kWords>
__device__ __forceinline__ int32_t AttemptNth(const Problem& p, const CopiesMemory& memory,
                                              const Targets& targets, int32_t nth,
                                              int32_t fan_out) {
  using Small = uint32_t;
  if (targets.too_many) return 0;
  const int32_t target = targets.Of(nth);
  const bool small = targets.most <= TokensIn(~Small{0}) &&
                     p.slots_per_rank <= static_cast<int32_t>(kNumbers<Small> >> 1);
  if (small && p.slots_per_rank <= 32) {
    return Attempt<kWords, 1, Small>(p, memory, target, fan_out);
  }
  if (small && p.slots_per_rank <= 64) {
    return Attempt<kWords, 2, Small>(p, memory, target, fan_out);
  }
  if constexpr (kWords == 1) {  // Else there are hardly so many slots.
    if (small) return Attempt<kWords, 3, Small>(p, memory, target, fan_out);
  }
  return Attempt<kWords, 3, uint64_t>(p, memory, target, fan_out);
}

// Which attempt is taken; a warp finds it, lane i from the copies of attempt i.
__device__ __forceinline__ int32_t ChooseAttempt(int32_t n_copies, const Targets& targets) {
  const int32_t target = targets.of_lane;
  const bool succeeded = n_copies >= 0;
  const int32_t least = __reduce_min_sync(kFullWarp, succeeded ? target : targets.most);
  const bool good_enough = succeeded && target - least <= targets.mean >> kCopiesWorth;
  const int32_t fewest = __reduce_min_sync(kFullWarp, good_enough ? n_copies : kInt32Max);
  return __ffs(__ballot_sync(kFullWarp, good_enough && n_copies == fewest)) - 1;
}

struct BestAttempt {
  int32_t nth;
  int32_t n_copies;
};

// What the blocks of a cluster tell one another of their attempts.
struct AttemptResults {
  uint4* results;      // [kNTargets], .x: how many copies an attempt has
  uint4* copies;       // [kNTargets, n_chunks], and the first of them, two to a chunk
  int32_t n_chunks;    // may be 0
  uint64_t* arrivals;  // counts the bytes of both

  __device__ __forceinline__ int32_t Bytes() const {
    return kNTargets * (1 + n_chunks) * static_cast<int32_t>(sizeof(uint4));
  }
  __device__ __forceinline__ bool HasAllOf(const BestAttempt& attempt) const {
    return attempt.n_copies <= 2 * n_chunks;
  }

#if __CUDA_ARCH__ >= 900
  // Sends them to all blocks; by the warp that made the attempt. n_blocks is a power of two.
  __device__ __forceinline__ void Send(int32_t n_blocks, int32_t nth, int32_t n_copies,
                                       const uint2* chosen) const {
    const auto* chunks = reinterpret_cast<const uint4*>(chosen);
    const int32_t to = Lane() & (n_blocks - 1);
    const int32_t log2_blocks = BitNumber(n_blocks);
    __syncwarp();
#pragma unroll 1
    for (int32_t i = Lane() >> log2_blocks; i <= n_chunks; i += 32 >> log2_blocks) {
      uint4* address = i == 0 ? results + nth : copies + nth * n_chunks + i - 1;
      const uint4 value = i == 0 ? uint4{static_cast<uint32_t>(n_copies), 0, 0, 0} : chunks[i - 1];
      SendTo(to, address, value, arrivals);
    }
  }
#endif
};

// Makes all attempts, together with the other blocks of a cluster if there are any, and tells which
// is taken. If shared.HasAllOf it, its copies are there; else they are in the memory of its warp in
// its block, for all threads. `words` is the memory of the copies. Other blocks must have started.
template <int kWords, typename Threads>
__device__ __forceinline__ BestAttempt MakeAttempts(const Problem& p, int32_t* words,
                                                    const AttemptShape& shape, int32_t block,
                                                    const Targets& targets, int32_t fan_out,
                                                    const AttemptResults& shared) {
  const int32_t lane = Lane();
  const int32_t warp = WarpIndex();
  const bool together = shape.n_blocks > 1;
  const int32_t stride = shape.n_blocks * shape.n_attempts;
  int32_t nth = warp < shape.n_attempts ? block * shape.n_attempts + warp : kNTargets;
  BestAttempt best = {-1, 0};
#pragma unroll 1
  while (true) {
#pragma unroll 1
    for (; nth < kNTargets; nth += stride) {
      const CopiesMemory memory(p, warp, words);
      const int32_t n = AttemptNth<kWords>(p, memory, targets, nth, fan_out);
      if (best.nth >= 0) break;
      if (!together && lane == 0) shared.results[nth].x = static_cast<uint32_t>(n);
#if __CUDA_ARCH__ >= 900
      if (together) shared.Send(shape.n_blocks, nth, n, memory.chosen);
#endif
      __syncwarp();
    }
    if (best.nth >= 0) break;
    if (!together) Threads::Sync();
#if __CUDA_ARCH__ >= 900
    if (together) AwaitBytes(shared.arrivals);
#endif
    const int32_t n_copies = static_cast<int32_t>(shared.results[lane].x);
    best.nth = ChooseAttempt(n_copies, targets);
    best.n_copies = __shfl_sync(kFullWarp, n_copies, best.nth);
    if (shared.HasAllOf(best)) return best;
    if (!shape.IsOverwritten(best.nth)) break;
    if (block != shape.BlockOf(best.nth) || warp != shape.WarpOf(best.nth)) break;
    nth = best.nth;  // Once more.
  }
  Threads::Sync();  // The copies are those of a warp; elsewhere, others will come in their place.
  return best;
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_BATCH_COPIES_CUH_
