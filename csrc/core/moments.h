// Moments of a set of numbers: how many, their mean, and the sum of squared deviations from it.
//
// `push` is Welford's recurrence (1962); `merge` is its generalization by Chan, Golub & LeVeque (1979); `add` is
// Welford's step for a block of numbers at once, and what the kernels spend their time on:
//
//     s = Σ(x − mean)    q = Σ(x − mean)²    mean += s/(n + k)    m2 += q − s²/(n + k)
//
// Since s² ≤ k·q, the subtraction takes away at most k/(n + k) of q: with a block no larger than what came before it,
// never more than half, whatever the data. (E[x²] − E[x]² is the same with mean = 0: it loses all digits once mean/σ
// reaches 10⁴ in float32, and is formed nowhere.)
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

  // k numbers x whose deviations from `pivot` ≈ mean add up to s, the squares of these to q.
  FN_INLINE void add(double k, double pivot, double s, double q) {
    const double offset = mean - pivot, total = n + k, t = s - k * offset;
    mean += t / total;
    m2 += (q - (s + t) * offset) - t * t / total;
    n = total;
  }
};

}  // namespace fusednorm
