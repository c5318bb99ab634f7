// Packs: 16 bytes of a tensor, what a thread loads and stores at once, and the few words CUDA has for that. Everything
// here has a plain form for compilers that are not nvcc.
#pragma once

#include <cuda_runtime.h>
#if defined(__CUDA_ARCH__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "core/dtype.h"
#include "core/epilogue.h"

#if defined(__CUDACC__)
#define FN_DEVICE __device__ __forceinline__
#else
#define FN_DEVICE FN_INLINE
#endif

// The block's dynamic shared memory.
#if defined(__CUDACC__)
#define FN_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char fn_shared[]; \
  T* const name = reinterpret_cast<T*>(fn_shared)
#else
#define FN_SHARED(T, name) T* const name = static_cast<T*>(fn_emu_dynamic_shared())
#endif

namespace fusednorm::cuda {

constexpr int kPackBytes = 16;
constexpr uint32_t kWarp = 32, kAllLanes = 0xffffffff;

template <class T>
constexpr int kWidth = kPackBytes / int(sizeof(T));  // elements of a pack
// Elements that are taken out of a pack at once: as many as 16 bytes of their arithmetic type hold.
template <class T>
constexpr int kSome = kPackBytes / int(sizeof(Real<T>));
template <class T>
constexpr uint32_t kWhole = (1u << kWidth<T>)-1;  // a bit for each element of a pack

// Explicit, since contraction is off: a product rounded in one place and fused in another would let a recomputed ReLU
// mask differ from the forward's.
FN_DEVICE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FN_DEVICE double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

// The same number, but the compiler does not know: what follows from it is computed where it is needed, not held in
// registers from one end of a kernel to the other.
FN_DEVICE uint32_t anew(uint32_t v) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(v));
#endif
  return v;
}
// A pointer to the device's memory.
template <class T>
FN_DEVICE T* anew(T* p) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(p));
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}
// What is read before it is not read after it, nor the other way around: registers are short.
FN_DEVICE void apart() {
#if defined(__CUDACC__)
  asm volatile("" ::: "memory");
#endif
}
FN_DEVICE uint32_t thread() { return anew(threadIdx.x); }

// A division that may be wrong in its last digits.
FN_DEVICE float quotient(float a, float b) { return __fdividef(a, b); }
FN_DEVICE double quotient(double a, double b) { return a / b; }

// 1/√v
FN_DEVICE double inverse_root(double v) { return ::rsqrt(v); }

// v, or `low` where that is larger; NaN stays.
FN_DEVICE float at_least(float v, float low) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(low));
  return v;
#else
  return v <= low ? low : v;
#endif
}
FN_DEVICE double at_least(double v, double low) { return v <= low ? low : v; }

// What core/epilogue.h asks for.
struct Math {
  template <class R>
  static FN_DEVICE R select(bool condition, R a, R b) {
    return condition ? a : b;
  }
  static FN_DEVICE float exp(float x) { return ::expf(x); }
  static FN_DEVICE double exp(double x) { return ::exp(x); }
  static FN_DEVICE float tanh(float x) { return ::tanhf(x); }
  static FN_DEVICE double tanh(double x) { return ::tanh(x); }
};

// Elements [part·kSome, (part + 1)·kSome) of a pack, and back. `part` is a constant where the loops are unrolled.
FN_DEVICE void take(const uint4& pack, int, float (&v)[4], float) {
  v[0] = bit_cast<float>(pack.x);
  v[1] = bit_cast<float>(pack.y);
  v[2] = bit_cast<float>(pack.z);
  v[3] = bit_cast<float>(pack.w);
}
FN_DEVICE void put(uint4& pack, int, const float (&v)[4], float) {
  pack = {bit_cast<uint32_t>(v[0]), bit_cast<uint32_t>(v[1]), bit_cast<uint32_t>(v[2]), bit_cast<uint32_t>(v[3])};
}
FN_DEVICE void take(const uint4& pack, int, double (&v)[2], double) {
  v[0] = bit_cast<double>(uint64_t(pack.y) << 32 | pack.x);
  v[1] = bit_cast<double>(uint64_t(pack.w) << 32 | pack.z);
}
FN_DEVICE void put(uint4& pack, int, const double (&v)[2], double) {
  const uint64_t a = bit_cast<uint64_t>(v[0]), b = bit_cast<uint64_t>(v[1]);
  pack = {uint32_t(a), uint32_t(a >> 32), uint32_t(b), uint32_t(b >> 32)};
}

FN_DEVICE void take(uint32_t word, float& low, float& high, bf16) {
  low = bit_cast<float>(word << 16);
  high = bit_cast<float>(word & 0xffff0000);
}
FN_DEVICE uint32_t put(float low, float high, bf16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return bit_cast<uint32_t>(__floats2bfloat162_rn(low, high));
#else
  return from_real<bf16>(low).bits | uint32_t(from_real<bf16>(high).bits) << 16;
#endif
}
FN_DEVICE void take(uint32_t word, float& low, float& high, f16) {
#if defined(__CUDA_ARCH__)
  const float2 both = __half22float2(bit_cast<__half2>(word));
  low = both.x;
  high = both.y;
#else
  low = to_real(f16{uint16_t(word)});
  high = to_real(f16{uint16_t(word >> 16)});
#endif
}
FN_DEVICE uint32_t put(float low, float high, f16) {
#if defined(__CUDA_ARCH__)
  return bit_cast<uint32_t>(__floats2half2_rn(low, high));
#else
  return from_real<f16>(low).bits | uint32_t(from_real<f16>(high).bits) << 16;
#endif
}
template <class T>
FN_DEVICE void take(const uint4& pack, int part, float (&v)[4], T type) {
  take(part ? pack.z : pack.x, v[0], v[1], type);
  take(part ? pack.w : pack.y, v[2], v[3], type);
}
template <class T>
FN_DEVICE void put(uint4& pack, int part, const float (&v)[4], T type) {
  (part ? pack.z : pack.x) = put(v[0], v[1], type);
  (part ? pack.w : pack.y) = put(v[2], v[3], type);
}

// 16 bytes of `kSome` numbers in shared memory.
FN_DEVICE void take_some(const float* from, float (&v)[4]) {
  take(*reinterpret_cast<const uint4*>(from), 0, v, float());
}
FN_DEVICE void take_some(const double* from, double (&v)[2]) {
  take(*reinterpret_cast<const uint4*>(from), 0, v, double());
}

// A pack from memory: all of it at once where it is aligned (`vector`) and all of it there, else element by element; the
// others are 0 and are not touched. `last`: it will not be read again, the caches need not keep it.
template <class T>
FN_DEVICE uint4 load(const T* from, uint32_t there, bool vector, bool last) {
  if (vector && there == kWhole<T>) {
    const uint4* pack = reinterpret_cast<const uint4*>(from);
    return last ? __ldcs(pack) : *pack;
  }
  T v[kWidth<T>];
#pragma unroll
  for (int j = 0; j < kWidth<T>; ++j) v[j] = there >> j & 1 ? from[j] : T{};
  return bit_cast<uint4>(v);
}
template <class T>
FN_DEVICE void store(T* to, const uint4& pack, uint32_t there, bool vector, bool last) {
  if (vector && there == kWhole<T>) {
    uint4* whole = reinterpret_cast<uint4*>(to);
    if (last)
      __stcs(whole, pack);
    else
      *whole = pack;
    return;
  }
  T v[kWidth<T>];
  std::memcpy(v, &pack, sizeof v);
#pragma unroll
  for (int j = 0; j < kWidth<T>; ++j)
    if (there >> j & 1) to[j] = v[j];
}

}  // namespace fusednorm::cuda
