// What the loop nests of every instruction set take from the one host file that is compiled once (host.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusednorm::cpu {

// Threads a call may use now: set_num_threads, OpenMP's own limit (OMP_NUM_THREADS, threadpoolctl), 1 in a forked
// child.
int threads();
void set_threads(int n);

// 64-byte aligned memory for one call; throws std::bad_alloc.
void* scratch_allocate(size_t bytes);
void scratch_free(void* memory) noexcept;

// From this many bytes of output on, results are streamed past the caches: nobody finds them there afterwards.
constexpr int64_t kStreamBytes = 16 << 20;

}  // namespace fusednorm::cpu
