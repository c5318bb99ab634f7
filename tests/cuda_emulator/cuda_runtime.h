// The part of CUDA that csrc/cuda uses, for a C++ compiler in place of nvcc. See README.md.
#pragma once

#if defined(__CUDACC__)
#error "the emulator's folder must not be on nvcc's include path"
#endif

#include <math.h>

#include <bit>
#include <tuple>
#include <utility>

#include "emu.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

// What a kernel calls.

constexpr int warpSize = 32;

inline void __syncthreads(EMU_LINE) { emu::barrier(emu::Scope::block, emu::Vote::none, false, line); }
inline int __syncthreads_or(int p, EMU_LINE) { return emu::barrier(emu::Scope::block, emu::Vote::any, p, line); }
inline int __syncthreads_and(int p, EMU_LINE) { return emu::barrier(emu::Scope::block, emu::Vote::all, p, line); }
inline int __syncthreads_count(int p, EMU_LINE) { return emu::barrier(emu::Scope::block, emu::Vote::count, p, line); }

inline void __syncwarp(unsigned mask = ~0u, EMU_LINE) { emu::exchange(mask, emu::Warp::sync, 0, line); }
template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, EMU_LINE) {
  return emu::shuffle(mask, emu::Warp::shfl, value, from, width, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_LINE) {
  return emu::shuffle(mask, emu::Warp::up, value, int(delta), width, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_LINE) {
  return emu::shuffle(mask, emu::Warp::down, value, int(delta), width, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32, EMU_LINE) {
  return emu::shuffle(mask, emu::Warp::exclusive_or, value, other, width, line);
}
inline unsigned __ballot_sync(unsigned mask, int p, EMU_LINE) { return emu::ballot(mask, emu::Warp::ballot, p, line); }
inline int __any_sync(unsigned mask, int p, EMU_LINE) { return emu::ballot(mask, emu::Warp::any, p, line) != 0; }
inline int __all_sync(unsigned mask, int p, EMU_LINE) { return emu::ballot(mask, emu::Warp::all, p, line) == mask; }

inline void __threadfence() { emu::fence(); }
inline void __threadfence_block() { emu::fence(); }
inline void __nanosleep(unsigned) { emu::give_way(); }

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> value) {
  return emu::atomic(p, [&](auto a) { return a.fetch_add(value, std::memory_order_relaxed); });
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> value) {
  return emu::atomic(p, [&](auto a) { return a.exchange(value, std::memory_order_relaxed); });
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return emu::atomic(p, [&](auto a) {
    a.compare_exchange_strong(expected, value, std::memory_order_relaxed);
    return expected;
  });
}
inline unsigned atomicInc(unsigned* p, unsigned last) {
  return emu::atomic(p, [&](auto a) {
    unsigned old = a.load(std::memory_order_relaxed);
    while (!a.compare_exchange_weak(old, old >= last ? 0 : old + 1, std::memory_order_relaxed)) {
    }
    return old;
  });
}

// Hints to the caches.
#define EMU_LOAD(name)            \
  template <class T>              \
  T name(const T* p, EMU_LINE) {  \
    return emu::aligned(p, line); \
  }
#define EMU_STORE(name)                                      \
  template <class T>                                         \
  void name(T* p, std::type_identity_t<T> value, EMU_LINE) { \
    const_cast<T&>(emu::aligned(p, line)) = value;           \
  }
EMU_LOAD(__ldg)
EMU_LOAD(__ldca)
EMU_LOAD(__ldcg)
EMU_LOAD(__ldcs)
EMU_LOAD(__ldlu)
EMU_LOAD(__ldcv)
EMU_STORE(__stwb)
EMU_STORE(__stcg)
EMU_STORE(__stcs)
EMU_STORE(__stwt)

inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return float(1 / sqrt(double(x))); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline void __trap(EMU_LINE) { emu::fail("trap", line); }
template <class T>
constexpr T min(T a, std::type_identity_t<T> b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, std::type_identity_t<T> b) {
  return a < b ? b : a;
}

// What the host calls. Numbers as in the toolkit.

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInitializationError = 3,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorInvalidClusterSize = 912,
};
using cudaStream_t = struct CUstream_st*;

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMaxRegistersPerBlock = 12,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxRegistersPerMultiprocessor = 82,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrMaxBlocksPerMultiprocessor = 106,
  cudaDevAttrReservedSharedMemoryPerBlock = 111,
  cudaDevAttrClusterLaunch = 120,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 14,
};
struct cudaFuncAttributes {
  size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
  int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, cacheModeCA, maxDynamicSharedSizeBytes;
};
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault,
};
enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone,
  cudaStreamCaptureStatusActive,
  cudaStreamCaptureStatusInvalidated,
};

enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore = 0,
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
};
union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
  int cooperative;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorName(cudaError_t);
const char* cudaGetErrorString(cudaError_t);

cudaError_t cudaDriverGetVersion(int*);
cudaError_t cudaRuntimeGetVersion(int*);
cudaError_t cudaGetDeviceCount(int*);
cudaError_t cudaGetDevice(int*);
cudaError_t cudaSetDevice(int);
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int device);

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t, cudaMemcpyKind, cudaStream_t = nullptr);
cudaError_t cudaMemsetAsync(void*, int value, size_t, cudaStream_t = nullptr);
cudaError_t cudaStreamSynchronize(cudaStream_t);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus*);

namespace emu {
cudaError_t launch(const cudaLaunchConfig_t&, const void* kernel, std::function<void()> thread);
cudaError_t set_attribute(const void* kernel, cudaFuncAttribute, int value);
cudaError_t get_attributes(cudaFuncAttributes*, const void* kernel);
cudaError_t blocks_per_sm(int*, const void* kernel, int threads, size_t shared);
cudaError_t clusters(int*, const void* kernel, const cudaLaunchConfig_t*);
cudaError_t largest_cluster(int*, const void* kernel, const cudaLaunchConfig_t*);
template <class Kernel>
const void* address(Kernel* kernel) {
  return reinterpret_cast<const void*>(kernel);
}
}  // namespace emu

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... given) {
  return emu::launch(
      *config, emu::address(kernel),
      [kernel, all = std::tuple<Parameters...>(std::forward<Arguments>(given)...)] { std::apply(kernel, all); });
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return emu::set_attribute(emu::address(kernel), attribute, value);
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* to, Kernel* kernel) {
  return emu::get_attributes(to, emu::address(kernel));
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* to, Kernel* kernel, int threads, size_t shared) {
  return emu::blocks_per_sm(to, emu::address(kernel), threads, shared);
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* to, Kernel* kernel, const cudaLaunchConfig_t* config) {
  return emu::clusters(to, emu::address(kernel), config);
}
template <class Kernel>
cudaError_t cudaOccupancyMaxPotentialClusterSize(int* to, Kernel* kernel, const cudaLaunchConfig_t* config) {
  return emu::largest_cluster(to, emu::address(kernel), config);
}
