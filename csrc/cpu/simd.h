// The SIMD vocabulary: GCC vector types of the width native to the instruction set this file is compiled for, and the
// few operations the language has no word for. Everything is in an anonymous namespace inside the instruction set's
// own.
//
// A Pack<T> is what one step of a loop takes: one native register of T. Arithmetic is done in Real<T>, so a register of
// 16-bit elements becomes two vectors ("parts"). bfloat16 splits into even and odd elements, a shift and a mask, no
// shuffle; `order` tells which element a lane holds, for arrays that are laid out lane by lane.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "core/dtype.h"
#include "core/epilogue.h"

namespace fusednorm::cpu::FUSEDNORM_ISA {
namespace {

#define FN_LAMBDA __attribute__((always_inline))

#if defined(__AVX512BW__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int64_t kLine = 64;  // bytes of a cache line

template <class R>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kBytes)));
  typedef float unaligned __attribute__((vector_size(kBytes), aligned(4), may_alias));
  typedef int32_t mask __attribute__((vector_size(kBytes)));
  typedef double wide __attribute__((vector_size(2 * kBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kBytes)));
  typedef double unaligned __attribute__((vector_size(kBytes), aligned(8), may_alias));
  typedef int64_t mask __attribute__((vector_size(kBytes)));
};
template <class R>
using Vector = typename VectorOf<R>::type;
template <class R>
using MaskOf = typename VectorOf<R>::mask;
template <class R>
constexpr int kLanes = kBytes / int(sizeof(R));

using F = Vector<float>;
using D = Vector<double>;
using Fmask = MaskOf<float>;
typedef uint32_t Fbits __attribute__((vector_size(kBytes)));
typedef uint32_t FbitsUnaligned __attribute__((vector_size(kBytes), aligned(2), may_alias));
// A register of doubles as floats: half as wide.
typedef float HalfF __attribute__((vector_size(kBytes / 2)));

template <class V, class From>
FN_INLINE V reinterpret(From from) {
  return (V)from;
}

// Explicit, since contraction is off: a product rounded in one place and fused in another would let a recomputed ReLU
// mask differ from the forward's.
FN_INLINE F fma(F a, F b, F c) {
#if defined(__AVX512BW__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
FN_INLINE D fma(D a, D b, D c) {
#if defined(__AVX512BW__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__aarch64__)
  return (D)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

// What core/epilogue.h asks for. exp and tanh in float32: Cephes' polynomials, below 2 ulp; in float64: libm, lane by
// lane.
struct Math {
  template <class Mask, class V>
  static FN_INLINE V select(Mask m, V a, V b) {
    return m ? a : b;
  }
  static FN_INLINE F exp(F x) {
    x = select(x > 89.0f, F{} + 89.0f, x);
    x = select(x < -104.0f, F{} - 104.0f, x);
    const F magic = F{} + 0x1.8p23f;  // adding it rounds to an integer in the low bits
    const F shifted = fma(x, F{} + 1.44269504088896341f, magic);
    const F n = shifted - magic;
    F r = fma(n, F{} - 0.693359375f, x);
    r = fma(n, F{} + 2.12194440e-4f, r);
    F p = F{} + 1.9875691500e-4f;
    p = fma(p, r, F{} + 1.3981999507e-3f);
    p = fma(p, r, F{} + 8.3334519073e-3f);
    p = fma(p, r, F{} + 4.1665795894e-2f);
    p = fma(p, r, F{} + 1.6666665459e-1f);
    p = fma(p, r, F{} + 5.0000001201e-1f);
    p = fma(p * r, r, r) + 1.0f;
    // 2^n in two factors: 2^128 and 2^-149 have no single one.
    const Fmask exponent = reinterpret<Fmask>(shifted) - 0x4b400000, half = exponent >> 1;
    return p * reinterpret<F>((half + 127) << 23) * reinterpret<F>((exponent - half + 127) << 23);
  }
  static FN_INLINE F tanh(F x) {
    const F magnitude = select(x < 0, -x, x), square = x * x;
    const F large = 1 - 2 / (exp(magnitude + magnitude) + 1);
    // Below 0.625 that difference cancels: an odd polynomial instead.
    F p = F{} - 5.70498872745e-3f;
    p = fma(p, square, F{} + 2.06390887954e-2f);
    p = fma(p, square, F{} - 5.37397155531e-2f);
    p = fma(p, square, F{} + 1.33314422036e-1f);
    p = fma(p, square, F{} - 3.33332819422e-1f);
    return select(magnitude < 0.625f, fma(p * square, x, x), select(x < 0, -large, large));
  }
  static FN_INLINE D exp(D x) {
    for (int l = 0; l < kLanes<double>; ++l) x[l] = ::exp(x[l]);
    return x;
  }
  static FN_INLINE D tanh(D x) {
    for (int l = 0; l < kLanes<double>; ++l) x[l] = ::tanh(x[l]);
    return x;
  }
};

template <class Mask>
FN_INLINE bool any(Mask m) {
  int64_t word[sizeof m / 8], found = 0;
  memcpy(word, &m, sizeof m);
  for (int64_t w : word) found |= w;
  return found != 0;
}

// Sum of the lanes, a fixed tree in float64.
FN_INLINE double sum_lanes(D v) {
  double lane[kLanes<double>];
  memcpy(lane, &v, sizeof v);
  for (int width = kLanes<double> / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lane[l] += lane[l + width];
  return lane[0];
}
FN_INLINE void widen(F v, D& low, D& high) {
  HalfF half[2];
  memcpy(half, &v, sizeof v);
  low = __builtin_convertvector(half[0], D);
  high = __builtin_convertvector(half[1], D);
}
FN_INLINE double sum_lanes(F v) {
  D low, high;
  widen(v, low, high);
  return sum_lanes(low + high);
}

// The numbers 0 … n − 1 as a type.
template <int... kNumbers>
struct Numbers {};
template <int n, int... kNumbers>
struct UpTo : UpTo<n - 1, n - 1, kNumbers...> {};
template <int... kNumbers>
struct UpTo<0, kNumbers...> {
  using type = Numbers<kNumbers...>;
};

// Sums of neighbouring lanes: a's, then b's.
template <class V, int... kNumbers>
FN_INLINE V add_pairs(V a, V b, Numbers<kNumbers...>) {
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, 2 * kNumbers...) + __builtin_shufflevector(a, b, (2 * kNumbers + 1)...);
#else
  typedef decltype(a < b) Mask;
  return __builtin_shuffle(a, b, Mask{2 * kNumbers...}) + __builtin_shuffle(a, b, Mask{(2 * kNumbers + 1)...});
#endif
}
// The sums of the lanes of as many vectors, one in each lane; v is overwritten. A fixed tree, the same for each.
template <class V, int kCount>
FN_INLINE V sums_of_lanes(V (&v)[kCount]) {
#pragma GCC unroll 4
  for (int n = kCount / 2; n > 0; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) v[i] = add_pairs(v[2 * i], v[2 * i + 1], typename UpTo<kCount>::type{});
  return v[0];
}

// How much of a pack is there: all of it, or its first n elements.
struct Whole {};
struct Part {
  int n;
};

template <class T>
struct Pack;

template <class T>
struct Lanes {
  Vector<Real<T>> v[Pack<T>::parts];
};

// Elements [0, n) of memory as a whole register and back, without touching what lies behind them.
template <class V, class T>
FN_INLINE V load_first(const T* p, int n) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(T) == 8) return (V)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
  if constexpr (sizeof(T) == 4) return (V)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
  if constexpr (sizeof(T) == 2) return (V)_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), p);
#else
  V v{};
  for (int i = 0; i < n; ++i) memcpy(reinterpret_cast<char*>(&v) + i * sizeof(T), p + i, sizeof(T));
  return v;
#endif
}
template <class T, class V>
FN_INLINE void store_first(T* p, int n, V v) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
  if constexpr (sizeof(T) == 2) _mm512_mask_storeu_epi16(p, __mmask32((uint64_t(1) << n) - 1), (__m512i)v);
#else
  for (int i = 0; i < n; ++i) memcpy(p + i, reinterpret_cast<const char*>(&v) + i * sizeof(T), sizeof(T));
#endif
}
// Non-temporal, past the caches: p is aligned to kBytes. A plain store on aarch64, whose non-temporal one is but a hint.
template <class T, class V>
FN_INLINE void stream_whole(T* p, V v) {
#if defined(__AVX512BW__)
  _mm512_stream_ps(reinterpret_cast<float*>(p), (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(reinterpret_cast<float*>(p), (__m256)v);
#elif defined(__SSE2__)
  _mm_stream_ps(reinterpret_cast<float*>(p), (__m128)v);
#else
  memcpy(p, &v, sizeof v);
#endif
}
// Orders streamed stores before whatever the thread publishes next.
FN_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <class R>
struct RealPack {
  static constexpr int parts = 1, width = kLanes<R>;
  static constexpr int order(int, int lane) { return lane; }
  using Register = Vector<R>;
  template <class T>
  static FN_INLINE Lanes<T> unpack(Register v) {
    return {{v}};
  }
  template <class T>
  static FN_INLINE Register pack(const Lanes<T>& lanes) {
    return lanes.v[0];
  }
};
template <>
struct Pack<float> : RealPack<float> {};
template <>
struct Pack<double> : RealPack<double> {};

template <>
struct Pack<bf16> {
  static constexpr int parts = 2, width = 2 * kLanes<float>;
  static constexpr int order(int part, int lane) { return 2 * lane + part; }
  using Register = Fbits;
  template <class T>
  static FN_INLINE Lanes<bf16> unpack(Fbits both) {
    return {{reinterpret<F>(both << 16), reinterpret<F>(both & 0xffff0000u)}};
  }
  // Nearest, ties to even; NaN stays NaN (rounding could carry its payload away).
  static FN_INLINE Fbits round(F v) {
    Fbits bits = reinterpret<Fbits>(v);
    bits += 0x7fffu + ((bits >> 16) & 1u);
    return v != v ? Fbits{} + 0x7fc00000u : bits;
  }
  template <class T>
  static FN_INLINE Fbits pack(const Lanes<bf16>& lanes) {
    return (round(lanes.v[0]) >> 16) | (round(lanes.v[1]) & 0xffff0000u);
  }
};

template <>
struct Pack<f16> {
  static constexpr int parts = 2, width = 2 * kLanes<float>;
  static constexpr int order(int part, int lane) { return part * kLanes<float> + lane; }
  using Register = Fbits;
#if defined(__F16C__)
  template <class T>
  static FN_INLINE Lanes<f16> unpack(Fbits both) {
#if defined(__AVX512BW__)
    return {
        { _mm512_cvtph_ps(_mm512_extracti64x4_epi64((__m512i)both, 0)),
          _mm512_cvtph_ps(_mm512_extracti64x4_epi64((__m512i)both, 1)) }};
#else
    return {
        { _mm256_cvtph_ps(_mm256_extracti128_si256((__m256i)both, 0)),
          _mm256_cvtph_ps(_mm256_extracti128_si256((__m256i)both, 1)) }};
#endif
  }
  template <class T>
  static FN_INLINE Fbits pack(const Lanes<f16>& lanes) {
#if defined(__AVX512BW__)
    const __m512i low = _mm512_castsi256_si512(_mm512_cvtps_ph(lanes.v[0], _MM_FROUND_TO_NEAREST_INT));
    return (Fbits)_mm512_inserti64x4(low, _mm512_cvtps_ph(lanes.v[1], _MM_FROUND_TO_NEAREST_INT), 1);
#else
    const __m256i low = _mm256_castsi128_si256(_mm256_cvtps_ph(lanes.v[0], _MM_FROUND_TO_NEAREST_INT));
    return (Fbits)_mm256_inserti128_si256(low, _mm256_cvtps_ph(lanes.v[1], _MM_FROUND_TO_NEAREST_INT), 1);
#endif
  }
#elif defined(__aarch64__)
  template <class T>
  static FN_INLINE Lanes<f16> unpack(Fbits both) {
    const float16x8_t elements = (float16x8_t)both;
    Lanes<f16> lanes;
    lanes.v[0] = (F)vcvt_f32_f16(vget_low_f16(elements));
    lanes.v[1] = (F)vcvt_high_f32_f16(elements);
    return lanes;
  }
  template <class T>
  static FN_INLINE Fbits pack(const Lanes<f16>& lanes) {
    return (Fbits)vcvt_high_f16_f32(vcvt_f16_f32((float32x4_t)lanes.v[0]), (float32x4_t)lanes.v[1]);
  }
#else
  template <class T>
  [[gnu::noinline]] static Lanes<f16> unpack(Fbits both) {
    Lanes<f16> lanes;
    f16 element[width];
    memcpy(element, &both, sizeof both);
    for (int part = 0; part < parts; ++part)
      for (int l = 0; l < kLanes<float>; ++l) lanes.v[part][l] = to_real(element[order(part, l)]);
    return lanes;
  }
  template <class T>
  [[gnu::noinline]] static Fbits pack(const Lanes<f16>& lanes) {
    f16 element[width];
    for (int part = 0; part < parts; ++part)
      for (int l = 0; l < kLanes<float>; ++l) element[order(part, l)] = from_real<f16>(lanes.v[part][l]);
    Fbits both;
    memcpy(&both, element, sizeof both);
    return both;
  }
#endif
};

template <class T>
using Register = typename Pack<T>::Register;

template <class T>
FN_INLINE Lanes<T> load(const T* p, Whole) {
  Register<T> r;
  memcpy(&r, p, sizeof r);
  return Pack<T>::template unpack<T>(r);
}
template <class T>
FN_INLINE Lanes<T> load(const T* p, Part part) {
  return Pack<T>::template unpack<T>(load_first<Register<T>>(p, part.n));
}
template <class T>
FN_INLINE void store(T* p, const Lanes<T>& lanes, Whole) {
  const Register<T> r = Pack<T>::template pack<T>(lanes);
  memcpy(p, &r, sizeof r);
}
template <class T>
FN_INLINE void store(T* p, const Lanes<T>& lanes, Part part) {
  store_first(p, part.n, Pack<T>::template pack<T>(lanes));
}
template <class T>
FN_INLINE void stream(T* p, const Lanes<T>& lanes) {
  stream_whole(p, Pack<T>::template pack<T>(lanes));
}

// The lanes that hold the first n elements of a pack.
template <class T>
FN_INLINE MaskOf<Real<T>> lanes_of(int part, Part first) {
  MaskOf<Real<T>> element;
  for (int l = 0; l < kLanes<Real<T>>; ++l) element[l] = Pack<T>::order(part, l);
  return element < first.n;
}
// Zero in the lanes that hold no element.
template <class T, class V>
FN_INLINE V live(V v, int, Whole) {
  return v;
}
template <class T, class V>
FN_INLINE V live(V v, int part, Part there) {
  return Math::select(lanes_of<T>(part, there), v, V{});
}

// Elements from p to the next address of a register's alignment, fewer than a register holds; -1 if elements straddle
// it. Streamed stores need it; plain ones, misaligned, touch two lines each.
template <class T>
FN_INLINE int64_t to_alignment(const T* p) {
  const int64_t bytes = -reinterpret_cast<intptr_t>(p) & (kBytes - 1);
  return bytes % int64_t(sizeof(T)) ? -1 : bytes / int64_t(sizeof(T));
}

// Copies what was put together in L1 to memory, past the caches.
template <class T>
FN_INLINE void stream_elements(T* to_elements, const T* from_elements, int64_t elements) {
  char* to = reinterpret_cast<char*>(to_elements);
  const char* from = reinterpret_cast<const char*>(from_elements);
  const int64_t n = elements * int64_t(sizeof(T));
  int64_t i = -reinterpret_cast<intptr_t>(to) & (kLine - 1);
  if (i > n) i = n;
  memcpy(to, from, i);
  for (; i + kBytes <= n; i += kBytes) {
    F v;
    memcpy(&v, from + i, sizeof v);
    stream_whole(reinterpret_cast<float*>(to + i), v);
  }
  memcpy(to + i, from + i, n - i);
}

FN_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

}  // namespace
}  // namespace fusednorm::cpu::FUSEDNORM_ISA
