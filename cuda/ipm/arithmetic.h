// Constants and small functions of the interior point that CPU and GPU share.
// lplb_jax/reference/ipm.py explains them.
#ifndef LPLB_CUDA_IPM_ARITHMETIC_H_
#define LPLB_CUDA_IPM_ARITHMETIC_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cuda/problem.h"

namespace lplb {

constexpr int32_t kMaxSteps = 16;
constexpr float kStopGap = 5e-5f;              // Relative to the largest load.
constexpr float kConvergedGap = 1e-4f;         // The same.
constexpr float kLeastWeight = 9.094947e-13f;  // 2⁻⁴⁰ of the largest; raises smaller ones.
constexpr float kMostLoad = 3.4e38f;  // Just below float's maximum, so that no rounding exceeds it.
constexpr float kLeastEdge = 1e-9f;   // Of a rank's mean load: edges that move less are left out.
constexpr float kBackOff = 0.99f;     // The fraction of the way to the boundary that a step takes.
constexpr float kLeastSigma = 0.01f;  // The corrector's least target, relative to the mean product,
constexpr float kCaution = 0.3f;      // and its factor for the square of the predictor's shortfall.
constexpr float kLeastMu = 3e-8f;
constexpr float kLeastPrimal = 1e-12f;
constexpr float kLeastShare = 1e-3f;  // Relative to a capacity below kLeastPrimal.
constexpr float kLeastDual = 1e-20f;
constexpr float kStartSlack = 0.03f;
constexpr float kStartProduct = 0.05f;        // x · √(zl zu), relative to s · y.
constexpr float kNoLimit = 3e38f;             // A step length.
constexpr float kMostTokens = 2147483520.0f;  // The largest float that is an int32.
constexpr int32_t kInfinity = 0x7f800000;     // The bits of float infinity.

// Options of the interior point besides the problem. Buffers of loads and results are 32-bit words.
// They are float instead of int32 if `floats`; the two load values also if `weighted`.
struct IpmOptions {
  bool floats;
  bool weighted;
  bool repair;
  bool cusolverdx;  // Factors with cuSolverDx instead of by elimination.

  LPLB_HOST_DEVICE bool float_loads_out() const { return floats || weighted; }
};

struct IpmOperands {
  SolveOperands solve;
  const float* weights;  // [group_size]
};

LPLB_HOST_DEVICE IpmOperands BatchElement(const Problem& p, const Sources& sources,
                                          const IpmOperands& first, int64_t b) {
  return {BatchElement(p, sources, first.solve, b), first.weights + b * p.group_size};
}

// The corrector's target for x · z, given what the predictor's steps reach.
LPLB_HOST_DEVICE float TargetMu(float mu, float affine, float reach) {
#ifdef __CUDA_ARCH__
  const float sigma = __fdividef(affine, mu);
#else
  const float sigma = affine / mu;
#endif
  const float least = fmaxf(kLeastSigma, kCaution * (1 - reach) * (1 - reach));
  return fmaxf(fmaxf(sigma * sigma * sigma, least) * mu, kLeastMu);
}

// The token count of an edge in a float plan.
LPLB_HOST_DEVICE int32_t RoundTokens(float moved, int32_t cap) {
  const int32_t tokens = static_cast<int32_t>(rintf(fminf(moved, kMostTokens)));
  return tokens < cap ? tokens : cap;
}

// The floors that a step keeps x, xb and s above.
LPLB_HOST_DEVICE float LeastPrimal(float cap) { return fminf(kLeastPrimal, kLeastShare * cap); }
LPLB_HOST_DEVICE float LeastSlack(float weight) { return kLeastPrimal * fminf(weight, 1); }

LPLB_HOST_DEVICE float FromBits(int32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// The exponent e of value = m · 2^e, 1 ≤ m < 2, for values ≥ 0. Clamped to [−126, 126], so that
// 2^±e is a float.
LPLB_HOST_DEVICE int32_t Exponent(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  const int32_t exponent = (bits >> 23) - 127;
  return exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
}

// 2^e, for −126 ≤ e ≤ 127.
LPLB_HOST_DEVICE float PowerOfTwo(int32_t e) { return FromBits((e + 127) << 23); }

// The most tokens of a rank whose load / weight is `value`. Rounded up by more than float can have
// rounded down, so that any larger count has a load / weight above `value`.
LPLB_HOST_DEVICE int32_t TokenLimit(float value, float weight) {
  const float limit = floorf(value * weight * (1 + 4.7683716e-7f));
  return limit < kMostTokens ? static_cast<int32_t>(limit) : kInt32Max;
}

// Whether a weight is positive and finite; denormal numbers count as 0.
LPLB_HOST_DEVICE bool IsSpeed(float weight) {
  return weight >= std::numeric_limits<float>::min() && weight <= std::numeric_limits<float>::max();
}

// The least float ≥ 0 for which `enough` holds, if `enough` also holds for all larger ones. The
// bits of floats ≥ 0 are ordered like the floats, so it is found bit by bit.
#ifdef __CUDACC__
#pragma nv_exec_check_disable  // Called with functions of the device or of the host.
#endif
template <typename Enough>
LPLB_HOST_DEVICE float LeastFloat(Enough&& enough) {
  if (enough(0.0f)) return 0;
  int32_t bits = 0;  // Not enough.
  for (int32_t bit = 30; bit >= 0; --bit) {
    const int32_t more = bits | 1 << bit;
    if (more < kInfinity && !enough(FromBits(more))) bits = more;
  }
  return FromBits(bits + 1);
}

// The load / weight that a cut proves if it keeps `total` and has weight `weight`. Rounded down by
// more than float can have rounded up.
LPLB_HOST_DEVICE float Provable(float total, float weight, int32_t n_ranks) {
  if (!(weight > 0)) return 0;
  return total / weight * (1 - 1.1920929e-7f * static_cast<float>(n_ranks + 4));
}

// Whether the reported result counts as converged: compares the largest load with the proven bound.
template <typename Value>
LPLB_HOST_DEVICE bool Converged(Value max_load, Value lower_bound) {
  return static_cast<float>(max_load - lower_bound) <= kConvergedGap * static_cast<float>(max_load);
}

}  // namespace lplb

#endif  // LPLB_CUDA_IPM_ARITHMETIC_H_
