// The factor of the interior point's matrix M, without subtraction, in the registers of a team.
//
// M = diag(excess) + Laplacian of the weights o ≥ 0. Elimination gives M = (I − l) D (I − l)ᵀ. With
// W = (I − l)⁻¹, which is ≥ 0 as well, M⁻¹ = Wᵀ D⁻¹ W: two products instead of two chains of
// substitutions. M⁻¹ itself would not do: where M is almost singular, its entries are huge, and the
// differences between neighbours, which are all that matters, are lost. In W they are not.
//
// A thread holds kColumns entries of one row of a symmetric table T; kParts adjacent threads share
// a row. Between ranks not yet eliminated, T holds o. Between eliminated ranks it holds W: W_ij for
// j < i and its mirror image for j > i. Between the two kinds it holds the weights A with which an
// eliminated rank's value follows the others. Eight ranks are eliminated at a time: every thread
// gets the 8 × 8 block, eliminates it itself, and updates its own entries.
#ifndef LPLB_CUDA_IPM_FACTOR_CUH_
#define LPLB_CUDA_IPM_FACTOR_CUH_

#include "cuda/team.cuh"

namespace lplb::cuda {

__device__ __forceinline__ float Quotient(float a, float b) { return __fdividef(a, b); }

constexpr int kBlock = 8;  // Ranks that are eliminated together.

template <int kRanks, int kParts>
class Table {
 public:
  static constexpr int kColumns = kRanks / kParts;
  static constexpr int kUsed = kRanks * kParts;  // Threads that own an entry.
  static constexpr int kThreads = kUsed < 32 ? 32 : kUsed;
  // With many warps, which share the schedulers, one warp eliminates the block for all.
  static constexpr bool kOneWarpEliminates = kThreads > 128;
  static constexpr bool kWholeBlock = false;  // Whether it uses barriers of the block.
  using TeamOf = Team<kThreads>;

  struct Memory {
    // The eight columns of a block, one row each. 16 bytes between the parts avoid bank conflicts.
    alignas(16) float panel[2][kRanks * kBlock + kParts * 4];
    float beyond[2][kBlock][kParts];  // Per row of the block, its sum beyond the block.
    alignas(16) float excess[2][kBlock];
    alignas(16) float block[2][kBlock][kBlock];  // W of the block, with D⁻¹ as its diagonal.
  };

  __device__ explicit Table(Memory& memory)
      : memory_(memory),
        row_(threadIdx.x / kParts % kRanks),
        part_(threadIdx.x % kParts),
        owner_(threadIdx.x < kUsed) {}

  __device__ __forceinline__ int row() const { return row_; }
  __device__ __forceinline__ int first_column() const { return part_ * kColumns; }
  __device__ __forceinline__ bool owner() const { return owner_; }
  __device__ __forceinline__ float& operator[](int i) { return entry_[i]; }

  // Eliminates all ranks. Inputs: o, and the row's excess. Only n_ranks rows count, the others are
  // diagonal.
  __device__ __forceinline__ void Factor(int n_ranks, float excess) {
#pragma unroll 1
    for (int p = 0; p < kParts; ++p) {
#pragma unroll
      for (int s = 0; s < kColumns; s += kBlock) {
        if (p * kColumns + s < n_ranks) EliminateBlock(p, s, excess);
      }
    }
  }

  // M⁻¹(q − shift · w). q, w and the result are in shared memory; includes the barriers.
  __device__ __forceinline__ void Solve(const float* q, const float* w, float shift, float* middle,
                                        float* result) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kColumns; i += 4) {
      const float4 a = reinterpret_cast<const float4*>(q + first_column())[i / 4];
      const float4 b = reinterpret_cast<const float4*>(w + first_column())[i / 4];
      const int before = row_ - first_column() - i;
      if (before > 0) sum += entry_[i] * (a.x - shift * b.x);
      if (before > 1) sum += entry_[i + 1] * (a.y - shift * b.y);
      if (before > 2) sum += entry_[i + 2] * (a.z - shift * b.z);
      if (before > 3) sum += entry_[i + 3] * (a.w - shift * b.w);
    }
    const float mine = (OverRow(sum) + (q[row_] - shift * w[row_])) * inverse_pivot_;
    if (owner_ && part_ == 0) middle[row_] = mine;
    TeamOf::Sync();
    sum = 0;
#pragma unroll
    for (int i = 0; i < kColumns; i += 4) {
      const float4 a = reinterpret_cast<const float4*>(middle + first_column())[i / 4];
      const int before = row_ - first_column() - i;
      if (before < 0) sum += entry_[i] * a.x;
      if (before < 1) sum += entry_[i + 1] * a.y;
      if (before < 2) sum += entry_[i + 2] * a.z;
      if (before < 3) sum += entry_[i + 3] * a.w;
    }
    sum = OverRow(sum) + mine;
    if (owner_ && part_ == 0) result[row_] = sum;
    TeamOf::Sync();
  }

  // Sum over the threads of one row.
  static __device__ __forceinline__ float OverRow(float value) {
#pragma unroll
    for (int step = 1; step < kParts; step *= 2) {
      value += __shfl_xor_sync(kFullWarp, value, step);
    }
    return value;
  }

 private:
  static __device__ __forceinline__ int PanelAt(int row) {
    return row * kBlock + row / kColumns * 4;
  }

  static __device__ __forceinline__ void Load(const float* from, float (&to)[kBlock]) {
    const float4 a = reinterpret_cast<const float4*>(from)[0];
    const float4 b = reinterpret_cast<const float4*>(from)[1];
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
    to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
  }

  // Eliminates rank p · kColumns + s and the seven after it.
  __device__ __forceinline__ void EliminateBlock(int p, int s, float& excess) {
    const int first = p * kColumns + s;
    const int turn = first / kBlock & 1;  // Two buffers: one barrier per block is enough.
    float* panel = memory_.panel[turn];
    const int own = row_ - first;  // This row's number in the block.
    const bool inside = own >= 0 && own < kBlock;
    if (owner_ && part_ == p) {
      float4* to = reinterpret_cast<float4*>(&panel[PanelAt(row_)]);
      to[0] = make_float4(entry_[s], entry_[s + 1], entry_[s + 2], entry_[s + 3]);
      to[1] = make_float4(entry_[s + 4], entry_[s + 5], entry_[s + 6], entry_[s + 7]);
    }
    if (inside && owner_) {
      float here = 0;
      float after = 0;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) (i < s + kBlock ? here : after) += entry_[i];
      float beyond = part_ > p ? here + after : part_ == p ? after : 0;
      if (part_ == 0) {
        beyond += excess;
        memory_.excess[turn][own] = excess;
      }
      memory_.beyond[turn][own][part_] = beyond;
    }
    TeamOf::Sync();

    // W of the block below the diagonal, and the inverse pivots on it.
    float W[kBlock][kBlock];
    if constexpr (kOneWarpEliminates) {
      if (threadIdx.x < 32) {
        EliminateDiagonal(turn, first, W);
        if (threadIdx.x == 0) {
#pragma unroll
          for (int k = 0; k < kBlock; ++k) {
#pragma unroll
            for (int j = 0; j <= k; ++j) memory_.block[turn][k][j] = W[k][j];
          }
        }
      }
      TeamOf::Sync();
    } else {
      EliminateDiagonal(turn, first, W);
    }

    // With c this row's weights to the block, h = c Wᵀ and g = c Wᵀ D⁻¹ W. For a row of the block
    // itself, c is its unit vector, and v is then its row of W.
    float h[kBlock], g[kBlock], v[kBlock];
    Load(&panel[PanelAt(row_)], h);
    if (inside) {
#pragma unroll
      for (int k = 0; k < kBlock; ++k) h[k] = k == own ? 1 : 0;
    }
    // Row k of W: keeping all rows would take too many registers where one warp eliminates.
    const auto row = [&](int k, float (&w)[kBlock]) {
      if constexpr (kOneWarpEliminates) {
        Load(memory_.block[turn][k], w);
      } else {
#pragma unroll
        for (int j = 0; j < kBlock; ++j) w[j] = W[k][j];
      }
    };
#pragma unroll
    for (int k = 0; k < kBlock; ++k) v[k] = 0;
    if (inside) {
      if constexpr (kOneWarpEliminates) {
        row(own, v);
#pragma unroll
        for (int k = 0; k < kBlock; ++k) {
          if (k == own) inverse_pivot_ = v[k];
          v[k] = k < own ? v[k] : k == own;
        }
      } else {
#pragma unroll
        for (int k = 0; k < kBlock; ++k) {
          if (k == own) {
            inverse_pivot_ = W[k][k];
#pragma unroll
            for (int j = 0; j < k; ++j) v[j] = W[k][j];
            v[k] = 1;
          }
        }
      }
    }
#pragma unroll
    for (int k = kBlock - 1; k >= 0; --k) {
      float w[kBlock];
      row(k, w);
#pragma unroll
      for (int j = 0; j < k; ++j) h[k] += w[j] * h[j];
      g[k] = h[k] * w[k];
    }
#pragma unroll
    for (int k = 1; k < kBlock; ++k) {
      float w[kBlock];
      row(k, w);
#pragma unroll
      for (int j = 0; j < k; ++j) g[j] += g[k] * w[j];
    }

    float own_excess[kBlock];
    Load(memory_.excess[turn], own_excess);
    float carried = 0;
#pragma unroll
    for (int k = 0; k < kBlock; ++k) carried += g[k] * own_excess[k];
    excess += carried;

#pragma unroll
    for (int t = 0; t < kColumns; t += kBlock) {
      const int column = first_column() + t;
      const bool before = column < first;
      // Entries between two eliminated ranks stay. Those of the block's own rows are replaced.
      float factor[kBlock];
#pragma unroll
      for (int k = 0; k < kBlock; ++k)
        factor[k] = !before ? g[k] : inside ? v[k] : own < 0 ? 0 : g[k];
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        float other[kBlock];
        Load(&panel[PanelAt(column + i)], other);
        float even = inside ? 0 : entry_[t + i];
        float odd = factor[1] * other[1];
        even += factor[0] * other[0];
#pragma unroll
        for (int k = 2; k < kBlock; k += 2) {
          even += factor[k] * other[k];
          odd += factor[k + 1] * other[k + 1];
        }
        entry_[t + i] = even + odd;
      }
    }
    if (part_ == p) {
#pragma unroll
      for (int k = 0; k < kBlock; ++k) {
        entry_[s + k] = own < 0 || k >= own && inside ? h[k] : inside ? v[k] : g[k];
      }
    }
  }

  // Eliminates the 8 × 8 block on the diagonal, in every thread independently.
  __device__ __forceinline__ void EliminateDiagonal(int turn, int first,
                                                    float (&W)[kBlock][kBlock]) {
    float o[kBlock][kBlock];
    float beyond[kBlock];
#pragma unroll
    for (int k = 0; k < kBlock; ++k) {
      Load(&memory_.panel[turn][PanelAt(first + k)], o[k]);
      beyond[k] = 0;
#pragma unroll
      for (int p = 0; p < kParts; ++p) beyond[k] += memory_.beyond[turn][k][p];
    }
#pragma unroll
    for (int k = 0; k < kBlock; ++k) {
      float pivot = beyond[k];
      float rest = 0;
#pragma unroll
      for (int j = k + 1; j < kBlock; ++j) (j % 2 ? pivot : rest) += o[k][j];
      const float inverse = Quotient(1, pivot + rest);
      float l[kBlock];
#pragma unroll
      for (int i = k + 1; i < kBlock; ++i) {
        l[i] = o[k][i] * inverse;
        beyond[i] += l[i] * beyond[k];
#pragma unroll
        for (int j = i + 1; j < kBlock; ++j) o[i][j] += l[i] * o[k][j];
      }
      // Row k of W is complete. Adds its contribution to the later rows.
      W[k][k] = inverse;
#pragma unroll
      for (int i = k + 1; i < kBlock; ++i) {
#pragma unroll
        for (int j = 0; j < k; ++j) W[i][j] = W[i][j] + l[i] * W[k][j];
        W[i][k] = l[i];
      }
    }
  }

  Memory& memory_;
  const int row_;
  const int part_;
  const bool owner_;
  float entry_[kColumns];
  float inverse_pivot_ = 1;
};

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_IPM_FACTOR_CUH_
