// Element types: how each is stored, and the type its arithmetic is done in.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/inline.h"

namespace fusednorm {

enum class DType : uint8_t { f32, f64, f16, bf16 };

using f32 = float;
using f64 = double;
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

FN_INLINE int64_t item_size(DType d) { return d == DType::f64 ? 8 : d == DType::f32 ? 4 : 2; }

// Accumulation is never below float32; float64 stays float64.
template <class T>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};
template <class T>
using Real = typename RealOf<T>::type;

template <class To, class From>
FN_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

FN_INLINE float to_real(float x) { return x; }
FN_INLINE double to_real(double x) { return x; }
FN_INLINE float to_real(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
FN_INLINE float to_real(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  // Moved into float32's fields the exponent is 112 too small: a multiplication mends that, subnormals included.
  uint32_t bits = magnitude << 13;
  if (magnitude >= 0x7c00)
    bits |= 0x7f800000;
  else
    bits = bit_cast<uint32_t>(bit_cast<float>(bits) * 0x1p112f);
  return bit_cast<float>(bits | sign);
}

template <class T>
FN_INLINE T from_real(Real<T> x);

template <>
FN_INLINE float from_real<float>(float x) {
  return x;
}
template <>
FN_INLINE double from_real<double>(double x) {
  return x;
}
// Both round to nearest, ties to even, and keep NaN.
template <>
FN_INLINE bf16 from_real<bf16>(float x) {
  if (x != x) return {0x7fc0};
  const uint32_t bits = bit_cast<uint32_t>(x);
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
FN_INLINE f16 from_real<f16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {  // below 2^-14: a multiple of 2^-24, rounded by an addition
    const float sum = bit_cast<float>(magnitude) + 0.5f;
    return {uint16_t(sign | (bit_cast<uint32_t>(sum) - 0x3f000000))};
  }
  return {uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13))};
}

}  // namespace fusednorm
