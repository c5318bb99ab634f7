// The kernels as the sanitizers can see them. A streaming store is an intrinsic, which gcc does not instrument: here it is
// a plain one. The instruction set is the least one, whose 16-byte vectors and byte-wise tails every sanitizer checks; the
// masked loads of wider ones none does.
#if defined(__SSE2__)
#include <immintrin.h>
#define _mm_stream_ps(to, vector) (*reinterpret_cast<__m128*>(to) = (vector))
#endif

#if defined(FUSEDNORM_DTYPE)
#include "cpu/nests.cpp"
#else
#include "cpu/backend.cpp"
#endif
