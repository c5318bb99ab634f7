// FN_INLINE: for every function of core/. It is inlined always, never emitted, so that the copy compiled for one
// instruction set can never be the one the linker keeps for another (tests/test_symbols.py holds us to it).
#pragma once

#if defined(__CUDACC__)
#define FN_INLINE __host__ __device__ __forceinline__
#else
#define FN_INLINE __attribute__((always_inline)) inline
#endif
