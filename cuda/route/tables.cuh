// The shared memory of a block that routes tokens.
#ifndef LPLB_CUDA_ROUTE_TABLES_CUH_
#define LPLB_CUDA_ROUTE_TABLES_CUH_

#include "cuda/batch_copies.cuh"
#include "cuda/cluster.cuh"
#include "cuda/replica_graph.cuh"
#include "cuda/route.h"
#include "cuda/solver.cuh"

namespace lplb::cuda {

constexpr int32_t kPlanThreads = 256;  // of a cluster's block, besides kRouteThreads, as a rule
constexpr int32_t kMaxRounds = 16;     // Tokens that a lane holds in registers.
constexpr int32_t kAtOnce = 8;         // Tokens of a tile that a lane has in flight.
constexpr int32_t kLookedUp = 4;       // Tokens whose places a lane looks up at once.

// A warp's state for one expert.
struct Cell {
  uint32_t mask;   // lanes with a token of this expert; 0 between uses
  uint32_t count;  // the warp's tokens so far; after a scan, plus those of the warps before
};

constexpr int32_t kNoSlot = 0xffff;
static_assert(kMaxSlots < kNoSlot);

// Where an expert's tokens go. Packed into 8 bytes, since every token reads it.
struct PackedRoute {
  int32_t keep;      // tokens that stay at home; ~keep if the others go to several slots
  uint16_t home;     // a slot, or kNoSlot
  uint16_t replica;  // a slot, or kNoSlot; the first cell of the pieces if there are several slots
};

// Shared memory of a block that routes tokens. Rows have room for all experts and, at n_logical,
// for invalid ids, and behind it for tokens that chose no expert. With other ranks, `total` only
// records there whether any id did.
struct RouteMemory {
  Cell* cells;          // [n_warps, n_logical + kPad]
  PackedRoute* routes;  // [n_logical]
  int32_t* earlier;     // [row], tokens in earlier blocks
  int32_t* total;       // [row], all tokens
  int32_t* own;         // [row], this rank's; the same as total if there is no other
  int32_t* before;      // [n_logical], with other ranks: tokens that come before this rank's
  int32_t* quota;       // [n_physical]
  int32_t* held;        // [n_physical], phy2log, in place of given quotas
  int32_t* groups;      // GroupMemory, or the tokens sent to every slot and a GraphMemory
  // For the blocks of a cluster:
  int32_t* counts;     // [row], the block's histogram
  uint16_t* incoming;  // [n_blocks, row], every block's
  uint64_t* arrivals;  // counts the bytes of `incoming`

  // Padding that avoids bank conflicts between the lanes of ScanWarps, which read several rows at
  // once.
  static constexpr int32_t kPad = 4;
  // Counts that are sent together.
  static constexpr int32_t kPacked = 8;

  LPLB_HOST_DEVICE static int32_t Row(const Problem& p) {
    return (p.n_logical + 1 + kPacked) / kPacked * kPacked;
  }

  // How many attempts at copies for the batch each block of a cluster of n_blocks makes side by
  // side, one per planning warp. n_blocks is 0 for a block by itself.
  LPLB_HOST_DEVICE static int32_t Attempts(int32_t n_blocks) {
    constexpr int32_t kMost = kPlanThreads / 32;
    const int32_t share = n_blocks > 0 ? kNTargets / n_blocks : kNTargets;
    return share < kMost ? share : kMost;
  }

  // Pairs of copies that every attempt sends along with its result: enough for up to 16 ranks, of
  // which each has few slots for them.
  LPLB_HOST_DEVICE static int32_t EarlyChunks(const Problem& p, int32_t n_blocks) {
    constexpr int32_t kMost = 8;
    const int32_t all = (CopiesMemory::MostCopies(p) + 1) / 2;
    return n_blocks == 0 ? 0 : all < kMost ? all : kMost;
  }

  // Words for choosing copies for the batch, see route/batch_copies.cuh.
  LPLB_HOST_DEVICE static int32_t ChoiceWords(const Problem& p, int32_t n_blocks) {
    return 3 + 4 * kNTargets * (1 + EarlyChunks(p, n_blocks)) + 4 +
           CopiesMemory::Words(p, Attempts(n_blocks));
  }

  // Words for solving. Any placement also needs its graph in assign, and a count per slot; tiles
  // need PlacesWords behind them.
  LPLB_HOST_DEVICE static int32_t SolverWords(const Problem& p, Quotas quotas) {
    if (p.node_size > 0) return GraphMemory::Words(p) + p.n_physical + PlacesWords(p);
    return quotas != Quotas::kGiven ? GroupMemory::Words(p, p.n_groups) : 0;
  }

  LPLB_HOST_DEVICE static int32_t Bytes(const Problem& p, int32_t n_warps, int32_t n_blocks,
                                        Quotas quotas, bool chooses) {
    const int32_t row = Row(p);
    const int32_t words = 2 * n_warps * (p.n_logical + kPad) + 2 * p.n_logical + 2 * row +
                          p.n_physical + (n_blocks > 0 ? row + n_blocks * row / 2 + 2 : 0) +
                          SolverWords(p, quotas) + (chooses ? ChoiceWords(p, n_blocks) : 0) +
                          (quotas == Quotas::kSynced ? row + p.n_logical : 0);
    return 4 * words;
  }

  // Arrays that are read or written 16 bytes at a time come first.
  __device__ RouteMemory(const Problem& p, int32_t n_warps, int32_t n_blocks, Quotas quotas,
                         void* memory) {
    const int32_t row = Row(p);
    // Kept in a register: otherwise the compiler recomputes it for every use, which takes time.
    uint32_t address = SharedAddress(memory);
    asm volatile("" : "+r"(address));
    cells = static_cast<Cell*>(__cvta_shared_to_generic(address));
    counts = reinterpret_cast<int32_t*>(cells + n_warps * (p.n_logical + kPad));
    incoming = reinterpret_cast<uint16_t*>(counts + (n_blocks > 0 ? row : 0));
    arrivals = reinterpret_cast<uint64_t*>(incoming + n_blocks * row);
    routes = reinterpret_cast<PackedRoute*>(arrivals + (n_blocks > 0 ? 1 : 0));
    earlier = reinterpret_cast<int32_t*>(routes + p.n_logical);
    total = earlier + row;
    own = total + (quotas == Quotas::kSynced ? row : 0);
    quota = held = own + row;
    groups = quota + p.n_physical;
    if (quotas == Quotas::kSynced) before = groups + GroupMemory::Words(p, p.n_groups);
  }

  __device__ Cell* CellsOf(const Problem& p, int32_t warp) const {
    return cells + warp * (p.n_logical + kPad);
  }
};

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_ROUTE_TABLES_CUH_
