// GradSums: what a backward pass must know about a statistic or a channel before it can write one element of dx.
//
// With u = dy·act'(pre) and x̂ = (x − mean)·rstd, the two sums are Σu and Σu·x̂. The loops take hi off, not the mean,
// and hold z = (x − hi)·rstd = x̂ + lo·rstd; lo is put right here, on single numbers, in float64.
#pragma once

#include "core/epilogue.h"
#include "core/inline.h"

namespace fusednorm {

struct GradSums {
  double u = 0, uz = 0;  // Σu, Σu·z: plain sums, added in a fixed order

  FN_INLINE void merge(const GradSums& other) {
    u += other.u;
    uz += other.uz;
  }
  // Σu·x̂
  FN_INLINE double ux(double lo, double rstd) const { return uz - lo * rstd * u; }
};

// dx = rstd·(w·u + cx·x̂ + c0) = scale·u + slope·z + shift. z is formed before it meets slope: rstd² would underflow in
// float32 where x is large.
template <class R>
struct GradAffine {
  R hi, rstd, scale, slope, shift;
};

template <class R>
FN_INLINE GradAffine<R> grad_affine(double mean, double rstd, double weight, double cx, double c0) {
  const R hi = pivot<R>(mean, rstd);
  const double slope = rstd * cx, lo = mean - double(hi);
  return {hi, coefficient<R>(rstd), coefficient<R>(rstd * weight), coefficient<R>(slope),
          R(rstd * c0 - slope * lo * rstd)};
}

}  // namespace fusednorm
