// Moments of a set of numbers: how many, their mean, and the sum of squared deviations from it.
//
// `push` is Welford's recurrence (1962); `merge` is its generalization by Chan, Golub & LeVeque (1979), and push is merge
// with a set of one. The kernels take Welford's step a block at a time: the exact two-pass moments of a chunk in cache,
// merged. Nowhere is E[x²] − E[x]² formed, which loses all digits once mean/σ reaches 10⁴ in float32.
#pragma once

#include "core/inline.h"

namespace fusednorm {

struct Moments {
  double n = 0, mean = 0, m2 = 0;

  FN_INLINE void push(double x) { merge({1, x, 0}); }

  FN_INLINE void merge(const Moments& other) {
    if (other.n == 0) return;
    if (n == 0) {
      *this = other;
      return;
    }
    const double total = n + other.n, delta = other.mean - mean, share = other.n / total;
    mean += delta * share;
    m2 += other.m2 + delta * delta * (n * share);
    n = total;
  }
};

}  // namespace fusednorm
