// From quotas to tokens for experts on any number of ranks: how this source deals its tokens of an
// expert to the expert's slots. lplb_jax/reference/assignment.py explains the rule.
// xla_ffi/cpu/pieces.h implements it on the CPU with tables of its own.
#ifndef LPLB_CUDA_ROUTE_PIECES_CUH_
#define LPLB_CUDA_ROUTE_PIECES_CUH_

#include "cuda/replica_graph.cuh"
#include "cuda/route/tokens.cuh"

namespace lplb::cuda {

// The pieces of shared experts, in shared memory in place of their cells. Up to two are in the
// expert's PackedRoute: `keep` tokens go to slot `home`, and others to slot `replica`. If there are
// more, `replica` is the expert's first cell. Its `slot` is then the number of pieces.
struct PieceTable {
  int32_t* end;    // by cell: this source's tokens up to the end of the piece; the last has no end
  uint32_t* slot;  // by cell: the piece's slot
  int32_t* sent;   // [n_physical], this source's tokens for every slot, initially 0

  __device__ PieceTable(const GraphMemory& graph, int32_t* sent_)
      : end(graph.tokens), slot(graph.shared), sent(sent_) {}
};

// Takes the pieces of one expert in order. Pieces may be empty.
class Dealer {
 public:
  __device__ __forceinline__ Dealer(const PieceTable& table, int32_t first, int32_t n_tokens)
      : table_(table), first_(first), n_tokens_(n_tokens) {}

  // The next `take` tokens go to `slot`.
  __device__ __forceinline__ void Add(int32_t slot, int64_t take) {
    if (take <= 0) return;
    CountLast(dealt_);
    dealt_ += static_cast<int32_t>(take);
    if (n_ == 0) {
      keep_ = dealt_;
      home_ = slot;
    } else {
      table_.end[first_ + n_] = dealt_;
      table_.slot[first_ + n_] = slot;
    }
    last_ = slot;
    last_begin_ = dealt_ - static_cast<int32_t>(take);
    ++n_;
  }

  // Tokens beyond all pieces go where the last piece goes. If there is none, they go to
  // `otherwise`, which may be −1.
  __device__ __forceinline__ PackedRoute Finish(int32_t otherwise) {
    if (n_ == 0) {
      last_ = home_ = otherwise;
      n_ = 1;
    }
    if (last_ >= 0) CountLast(kInt32Max);
    if (n_ == 1) {
      return {kInt32Max, static_cast<uint16_t>(home_ >= 0 ? home_ : kNoSlot), kNoSlot};
    }
    if (n_ == 2) return {keep_, static_cast<uint16_t>(home_), static_cast<uint16_t>(last_)};
    table_.end[first_] = keep_;
    table_.slot[first_] = n_;
    table_.end[first_ + n_ - 1] = kInt32Max;
    return {~keep_, static_cast<uint16_t>(home_), static_cast<uint16_t>(first_)};
  }

 private:
  __device__ __forceinline__ void CountLast(int32_t end) {
    if (n_ > 0) table_.sent[last_] = max(min(end, n_tokens_) - last_begin_, 0);
  }

  const PieceTable& table_;
  const int32_t first_;
  const int32_t n_tokens_;  // of this source
  int32_t n_ = 0;
  int32_t dealt_ = 0;
  int32_t keep_ = 0;
  int32_t home_ = -1;
  int32_t last_ = -1;
  int32_t last_begin_ = 0;
};

// Calls `use(slot, quota)` for each host of a shared expert, in the order of their ranks. Quotas
// count up to a running sum of 2³¹ − 1. Negative ones count as 0.
template <typename Use>
__device__ __forceinline__ void ForHosts(const GraphMemory& graph, const int32_t* quota,
                                         int32_t first, int32_t n_hosts, const Use& use) {
  int32_t left = kInt32Max;
#pragma unroll 1
  for (int32_t c = first; c < first + n_hosts; ++c) {
    const int32_t slot = graph.slot[c];
    const int32_t tokens = min(max(quota[slot], 0), left);
    left -= tokens;
    use(slot, tokens);
  }
}

// Deals `count` tokens by each host's share of an estimate. The rounding depends on the source.
__device__ __forceinline__ void DealShares(const Problem& p, const GraphMemory& graph,
                                           const int32_t* quota, int32_t first, int32_t n_hosts,
                                           int32_t count, int32_t me, Dealer& dealer) {
  int32_t load = 0;
  ForHosts(graph, quota, first, n_hosts, [&](int32_t, int32_t tokens) { load += tokens; });
  if (load == 0) return;
  int32_t upto = 0;
  int32_t dealt = 0;
  ForHosts(graph, quota, first, n_hosts, [&](int32_t slot, int32_t tokens) {
    upto += tokens;
    const int32_t share = ProportionalShare(count, upto, load, me, p.ep_size);
    dealer.Add(slot, share - dealt);
    dealt = share;
  });
}

// Tokens of an expert on a line: [begin, end).
struct Interval {
  int64_t begin;
  int64_t end;

  __device__ __forceinline__ int64_t Overlap(int64_t first, int64_t last) const {
    return min(end, last) - max(begin, first);
  }
};

// The two sides of a node's line: the tokens left to place, and the room left.
struct NodeLine {
  int64_t supply;
  int64_t demand;
};

// Deals to the own rank first, then within the node, then anywhere. count_of(source) is the
// expert's token count on that rank.
template <typename CountOf>
__device__ inline void DealByDistance(const Problem& p, const GraphMemory& graph,
                                      const int32_t* quota, int32_t first, int32_t n_hosts,
                                      int32_t me, const CountOf& count_of, Dealer& dealer) {
  const int32_t here = me / p.node_size;
  const auto node_of = [&](int32_t slot) { return p.by_slots.Quotient(slot) / p.node_size; };
  const auto room_of = [&](int32_t slot, int32_t tokens) {
    return tokens - min(tokens, count_of(p.by_slots.Quotient(slot)));
  };
  // The line of node v. If `mine` is not null, sets it to this source's interval on the line.
  const auto line_of = [&](int32_t v, Interval* mine) {
    NodeLine line = {0, 0};
    int64_t before = 0;
#pragma unroll 4
    for (int32_t s = v * p.node_size; s < (v + 1) * p.node_size; ++s) {
      const int32_t count = count_of(s);
      line.supply += count;
      if (s < me) before += count;
    }
    int32_t kept = 0;
    ForHosts(graph, quota, first, n_hosts, [&](int32_t slot, int32_t tokens) {
      const int32_t rank = p.by_slots.Quotient(slot);
      if (rank / p.node_size != v) return;
      const int32_t own = tokens - room_of(slot, tokens);
      line.supply -= own;
      line.demand += tokens - own;
      if (rank < me) before -= own;
      if (rank == me) kept = own;
    });
    if (mine != nullptr) *mine = {before, before + count_of(me) - kept};
    return line;
  };

  Interval mine;
  const NodeLine own_line = line_of(here, &mine);
  ForHosts(graph, quota, first, n_hosts, [&](int32_t slot, int32_t tokens) {
    if (p.by_slots.Quotient(slot) == me) dealer.Add(slot, tokens - room_of(slot, tokens));
  });
  int64_t upto = 0;
  ForHosts(graph, quota, first, n_hosts, [&](int32_t slot, int32_t tokens) {
    if (node_of(slot) != here) return;
    const int64_t begin = upto;
    upto += room_of(slot, tokens);
    dealer.Add(slot, mine.Overlap(begin, upto));
  });
  // Tokens beyond the end of the node's line continue on the line over all nodes.
  const int64_t beyond = mine.end - max(mine.begin, own_line.demand);
  if (beyond <= 0) return;
  mine.begin = max(mine.begin - own_line.demand, int64_t{0});
#pragma unroll 1
  for (int32_t v = 0; v < here; ++v) {
    const NodeLine line = line_of(v, nullptr);
    mine.begin += max(line.supply - line.demand, int64_t{0});
  }
  mine.end = mine.begin + beyond;
  int64_t spare = 0;  // room left in the nodes before
#pragma unroll 1
  for (int32_t v = 0; v < p.ep_size / p.node_size && spare < mine.end; ++v) {
    if (v == here) continue;  // It has no room left.
    const NodeLine line = line_of(v, nullptr);
    if (line.demand <= line.supply) continue;
    int64_t taken = -line.supply;  // The node's own tokens come first.
    ForHosts(graph, quota, first, n_hosts, [&](int32_t slot, int32_t tokens) {
      if (node_of(slot) != v) return;
      const int64_t begin = spare + max(taken, int64_t{0});
      taken += room_of(slot, tokens);
      dealer.Add(slot, mine.Overlap(begin, spare + max(taken, int64_t{0})));
    });
    spare += line.demand - line.supply;
  }
}

// The pieces that a token may be in: n from `first` on; none if its place is known.
struct PieceSearch {
  int32_t first = 1;  // The end of the piece before is read even if none is searched.
  int32_t n = 0;

  // Looks into the expert's route. Where that does not tell the place, FindPieces must.
  __device__ __forceinline__ void Begin(const PieceTable& table, const PackedRoute& route,
                                        const NumberedToken& token, Place& place) {
    const bool many = route.keep < 0;
    const int32_t keep = many ? ~route.keep : route.keep;
    place = PlaceBy(route, keep, token);
    if (!many || token.ordinal < keep || token.expert < 0) return;
    first = route.replica + 1;
    n = static_cast<int32_t>(table.slot[route.replica]) - 1;
  }
};

// Finds the places of all tokens whose pieces are searched. The searches go on side by side.
template <int kAll>
__device__ __forceinline__ void FindPieces(const PieceTable& table, PieceSearch (&search)[kAll],
                                           const NumberedToken (&token)[kAll],
                                           Place (&place)[kAll]) {
  bool more = true;
  while (more) {
    more = false;
#pragma unroll
    for (int j = 0; j < kAll; ++j) {
      auto& [first, n] = search[j];
      const int32_t half = n / 2;
      // Read whether it is needed or not: a branch would delay the other searches.
      const bool later = token[j].ordinal >= table.end[first + half - 1];
      first += later ? half : 0;
      n = n < 2 ? n : later ? n - half : half;
      more |= n > 1;
    }
  }
#pragma unroll
  for (int j = 0; j < kAll; ++j) {
    const auto [piece, n] = search[j];
    if (n == 0) continue;
    place[j] =
        Place(static_cast<int32_t>(table.slot[piece]), token[j].ordinal - table.end[piece - 1]);
  }
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_ROUTE_PIECES_CUH_
