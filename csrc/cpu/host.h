// What the loop nests of every instruction set take from the one host file that is compiled once (host.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/inline.h"

namespace fusednorm::cpu {

// Threads a call may use now: set_num_threads, OpenMP's own limit (OMP_NUM_THREADS, threadpoolctl), 1 in a forked
// child.
int threads();
void set_threads(int n);

// 64-byte aligned memory for one call; throws std::bad_alloc.
void* scratch_allocate(size_t bytes);
void scratch_free(void* memory) noexcept;

// Whether results are streamed past the caches: where they, and what `read` tensors of as many bytes bring in, would
// push each other out of the last one.
constexpr int64_t kStreamBytes = 32 << 20;
FN_INLINE bool is_streamed(int64_t bytes, int64_t read) { return bytes * (read + 1) >= kStreamBytes; }

}  // namespace fusednorm::cpu
