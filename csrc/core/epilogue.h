// Epilogue: what happens to a normalized element before it is stored.
//
//     y = act(pre)        pre = weight·x̂ + bias + residual = (x − hi)·scale + shift + residual
//
// Written for any "real" V: a scalar on a GPU, a native vector on a CPU. A backend supplies M, the mathematics of its
// V: M::select(mask, a, b), M::exp(v), M::tanh(v).
#pragma once

#include "core/inline.h"

namespace fusednorm {

enum class Activation : int { identity, relu, leaky_relu, silu, sigmoid, tanh };

// The affine map of one statistic and channel. The mean is a sum hi + lo: hi is taken off in the loop, which is exact
// near the mean; lo enters here, in float64, so that y keeps its digits at any mean/σ.
template <class R>
struct Affine {
  R hi, scale, shift;
};

// hi for this mean. x − hi overflows where σ itself nears the largest number: then hi = 0 and the whole mean goes into
// the shift.
template <class R>
FN_INLINE R pivot(double mean, double rstd) {
  return rstd < (sizeof(R) == 4 ? 3e-35 : 1e-304) ? R(0) : R(mean);
}

// A coefficient in the loops' type, at most the largest finite one: deviations of 0 times it must stay 0.
template <class R>
FN_INLINE R coefficient(double value) {
  const double most = sizeof(R) == 4 ? 3.4028234663852886e38 : 1.7976931348623157e308;
  return R(value > most ? most : value < -most ? -most : value);
}

template <class R>
FN_INLINE Affine<R> affine(double mean, double rstd, double weight, double bias) {
  const R hi = pivot<R>(mean, rstd);
  const double scale = weight * rstd;
  return {hi, coefficient<R>(scale), R(bias - (mean - double(hi)) * scale)};
}

// NaN passes through every activation.
template <class M, class V>
FN_INLINE V relu(V pre) {
  return M::select(pre <= 0, V{}, pre);
}
template <class M, class V>
FN_INLINE V relu_gradient(V dy, V pre) {
  return M::select(pre <= 0, V{}, dy);
}

template <class M, class V>
FN_INLINE V sigmoid(V pre) {
  return 1 / (1 + M::exp(-pre));
}

template <class M, class V, class R>
FN_INLINE V activate(Activation activation, R slope, V pre) {
  switch (activation) {
    case Activation::identity: return pre;
    case Activation::relu: return relu<M>(pre);
    case Activation::leaky_relu: return M::select(pre <= 0, pre * slope, pre);
    case Activation::silu: return pre * sigmoid<M>(pre);
    case Activation::sigmoid: return sigmoid<M>(pre);
    case Activation::tanh: return M::tanh(pre);
  }
  return pre;
}

// u = dy·act'(pre)
template <class M, class V, class R>
FN_INLINE V activation_gradient(Activation activation, R slope, V dy, V pre) {
  switch (activation) {
    case Activation::identity: return dy;
    case Activation::relu: return relu_gradient<M>(dy, pre);
    case Activation::leaky_relu: return M::select(pre <= 0, dy * slope, dy);
    case Activation::silu: {
      const V s = sigmoid<M>(pre);
      return dy * (s * (1 + pre * (1 - s)));
    }
    case Activation::sigmoid: {
      const V s = sigmoid<M>(pre);
      return dy * (s * (1 - s));
    }
    case Activation::tanh: {
      const V t = M::tanh(pre);
      return dy * (1 - t * t);
    }
  }
  return dy;
}

}  // namespace fusednorm
