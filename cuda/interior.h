// Constants and small functions of the interior point that CPU and GPU share; for their meaning see
// lplb_jax/reference/ipm.py.
#ifndef LPLB_CUDA_INTERIOR_H_
#define LPLB_CUDA_INTERIOR_H_

#include <cmath>
#include <cstdint>

#include "cuda/problem.h"

namespace lplb {

constexpr int32_t kMaxSteps = 16;
constexpr float kStopGap = 5e-5f;       // Of the largest load.
constexpr float kConvergedGap = 1e-4f;  // Likewise.
constexpr float kLeastEdge = 1e-9f;  // Of the mean load: edges that could move less are left out.
constexpr float kBackOff = 0.99f;    // How much of the way to the boundary a step goes.
constexpr float kLeastSigma = 0.01f;
constexpr float kLeastMu = 3e-8f;
constexpr float kLeastPrimal = 1e-12f;
constexpr float kLeastDual = 1e-20f;
constexpr float kStartSlack = 0.03f;
constexpr float kStartProduct = 0.05f;        // x · √(zl zu), of s · y.
constexpr float kNoLimit = 3e38f;             // A step length.
constexpr float kMostTokens = 2147483520.0f;  // The largest float that is an int32.

// What the interior point is asked for besides the problem. Buffers of loads and results are 32-bit
// words: float instead of int32 where floats says so; the two load values also where weighted.
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

// The corrector's target for x · z, from what the predictor's steps reach.
LPLB_HOST_DEVICE float TargetMu(float mu, float affine, float reach) {
#ifdef __CUDA_ARCH__
  const float sigma = __fdividef(affine, mu);
#else
  const float sigma = affine / mu;
#endif
  const float least = fmaxf(kLeastSigma, 0.3f * (1 - reach) * (1 - reach));
  return fmaxf(fmaxf(sigma * sigma * sigma, least) * mu, kLeastMu);
}

// The token count of a float plan's edge.
LPLB_HOST_DEVICE int32_t RoundTokens(float moved, int32_t cap) {
  const int32_t tokens = static_cast<int32_t>(rintf(fminf(moved, kMostTokens)));
  return tokens < cap ? tokens : cap;
}

// How many tokens are enough for a rank where the largest load / weight is `largest`.
LPLB_HOST_DEVICE int32_t EnoughTokens(float largest, float weight) {
  return static_cast<int32_t>(ceilf(fminf(largest * weight, kMostTokens)));
}

// What is proven by a cut that `stuck` units of 2^exponent cannot leave, of total weight `weight`:
// rounded down by more than float32 can have rounded up.
LPLB_HOST_DEVICE float Provable(int64_t stuck, int32_t exponent, float weight, int32_t n_ranks) {
  if (stuck <= 0 || !(weight > 0)) return 0;
  const float safe = 1 - 1.1920929e-7f * static_cast<float>(n_ranks + 4);
  return ldexpf(static_cast<float>(stuck) / weight * safe, exponent);
}

// The power of two in whose units the sum of a rank's loads, at most `most`, is below 2³⁰.
LPLB_HOST_DEVICE int32_t UnitExponent(float most) {
  int exponent = 0;
  frexpf(most, &exponent);
  return 29 - exponent;
}

}  // namespace lplb

#endif  // LPLB_CUDA_INTERIOR_H_
