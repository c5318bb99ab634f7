#include "cpu/host.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fusednorm::cpu {
namespace {

#if defined(_OPENMP)
constexpr bool kSerial = false;
int openmp_limit() { return omp_get_max_threads(); }
#else
constexpr bool kSerial = true;
int openmp_limit() { return 1; }
#endif

const int limit_at_start = openmp_limit();
std::atomic<int> wanted{0};
std::atomic<bool> forked{false};

// libgomp's threads do not survive a fork, and its next parallel region in the child waits for them for ever.
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

}  // namespace

int threads() {
  (void)fork_handler;
  if (kSerial || forked.load(std::memory_order_relaxed)) return 1;
  const int limit = openmp_limit(), n = wanted.load(std::memory_order_relaxed);
  if (n == 0) return limit;
  // A limit that somebody (threadpoolctl, torch.set_num_threads) changed since we started binds us too.
  return limit == limit_at_start ? n : std::min(n, limit);
}

void set_threads(int n) { wanted.store(n); }

void* scratch_allocate(size_t bytes) {
  void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (!memory) throw std::bad_alloc();
  return memory;
}
void scratch_free(void* memory) noexcept { std::free(memory); }

}  // namespace fusednorm::cpu
