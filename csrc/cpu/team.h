// One parallel region a call, and memory for it.
#pragma once

#include "core/inline.h"
#include "cpu/host.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fusednorm::cpu::FUSEDNORM_ISA {
namespace {

// Elements read. A smaller share is done by one thread about as soon, and cannot wait for a thread that lost its core
// to another pool.
constexpr int64_t kElementsPerThread = 1 << 15;

FN_INLINE int threads_for(int64_t elements, int64_t tasks) {
  int64_t n = threads();
  if (n > elements / kElementsPerThread) n = elements / kElementsPerThread;
  if (n > tasks) n = tasks;
  return n < 1 ? 1 : int(n);
}

struct Team {
  int size = 1, rank = 0;

  // Every member calls it; all tasks are done when it returns. A member's first tasks are the same in each call, so that
  // it finds what it wrote the last time in its own cache. The last quarter of many goes to who comes free, some at a
  // time, since cores that take turns at a counter, and at the results of neighbouring tasks, wait for each other.
  template <class Task>
  FN_INLINE void each(int64_t tasks, Task&& task) const {
    share<false>(tasks, task);
  }
  // The same tasks to the same members, what came last there first.
  template <class Task>
  FN_INLINE void each_backwards(int64_t tasks, Task&& task) const {
    share<true>(tasks, task);
  }

 private:
  template <bool kBackwards, class Task>
  FN_INLINE void share(int64_t tasks, Task&& task) const {
    int64_t own = tasks;
#if defined(_OPENMP)
    if (size > 1) own = (tasks < 8 * size ? tasks : tasks * 3 / 4) / size;
#endif
    for (int64_t i = 0; i < own; ++i) task(rank * own + (kBackwards ? own - 1 - i : i));
#if defined(_OPENMP)
    if (size == 1) return;
    const int64_t some = tasks / (32 * size) > 0 ? tasks / (32 * size) : 1, left = tasks - own * size;
#pragma omp for schedule(dynamic, some)
    for (int64_t i = 0; i < left; ++i) task(kBackwards ? tasks - 1 - i : own * size + i);
#endif
  }
};

template <class Body>
FN_INLINE void parallel([[maybe_unused]] int size, Body&& body) {
#if defined(_OPENMP)
  if (size > 1) {
#pragma omp parallel num_threads(size)
    body(Team{omp_get_num_threads(), omp_get_thread_num()});
    return;
  }
#endif
  body(Team{});
}

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(n > 0 ? static_cast<T*>(scratch_allocate(size_t(n) * sizeof(T))) : nullptr) {}
  ~Scratch() { scratch_free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T& operator[](int64_t i) const { return data_[i]; }
  T* get() const { return data_; }

 private:
  T* data_;
};

}  // namespace
}  // namespace fusednorm::cpu::FUSEDNORM_ISA
