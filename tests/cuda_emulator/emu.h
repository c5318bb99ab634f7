// What the CUDA names of cuda_runtime.h and cooperative_groups.h stand on. emu.cpp defines it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <string>
#include <type_traits>

#include "vector_types.h"

extern "C" {  // there in builds with ThreadSanitizer only
__attribute__((weak)) void __tsan_acquire(void*);
__attribute__((weak)) void __tsan_release(void*);
}

// What a kernel sees; and its dynamic shared memory, for the kernels' macro.
extern uint3 threadIdx, blockIdx, blockDim, gridDim;
void* fn_emu_dynamic_shared();

namespace emu {

// Where in the kernel a collective is called: a default argument, so that messages name the line.
using Line = std::source_location;
#define EMU_LINE emu::Line line = emu::Line::current()

// What device code may see of the CUDA thread that runs.
struct Thread {
  uint3 index{};
  unsigned linear = 0;  // in its block
  // Fences, for ThreadSanitizer: atomics are relaxed, and order memory only together with a fence.
  bool fenced = false;   // later atomics release
  unsigned touched = 0;  // atomics since the last fence; the next one acquires them
  void* recent[8] = {};

  unsigned lane() const { return linear % 32; }
};
extern Thread* running;  // one at a time in the whole process

enum class Scope { block, cluster, grid };
enum class Vote { none, any, all, count };
// The two halves of a barrier. Arrivals before it are ordered before what follows `wait`.
unsigned arrive(Scope, Vote, bool, Line);
int wait(Scope, unsigned phase, Line);
inline int barrier(Scope scope, Vote vote, bool value, Line line) {
  return wait(scope, arrive(scope, vote, value, line), line);
}

enum class Warp { sync, shfl, up, down, exclusive_or, ballot, any, all };
// Waits for all lanes of the mask and returns what each brought; valid until the thread waits again. Only `sync` orders
// memory.
const uint64_t* exchange(unsigned mask, Warp, uint64_t value, Line);

void give_way();  // others may run
[[noreturn]] void fail(const char* what, Line);

unsigned cluster_rank();
unsigned cluster_size();
void* map_shared(const void* mine, unsigned rank, Line);

template <class T>
T shuffle(unsigned mask, Warp kind, T value, int arg, int width, Line line) {
  static_assert((sizeof(T) == 4 || sizeof(T) == 8) && std::is_trivially_copyable_v<T>);
  uint64_t raw = 0;
  std::memcpy(&raw, &value, sizeof value);
  const uint64_t* all = exchange(mask, kind, raw, line);
  const int lane = int(running->lane()), first = lane & ~(width - 1), last = first + width - 1;
  int from = kind == Warp::shfl   ? first + (arg & (width - 1))
             : kind == Warp::up   ? lane - arg
             : kind == Warp::down ? lane + arg
                                  : /* Warp::exclusive_or */ lane ^ arg;
  if (from < first || from > last) from = lane;
  if (!(mask >> from & 1)) fail("shuffle from a lane outside its mask", line);
  std::memcpy(&value, &all[from], sizeof value);
  return value;
}

inline unsigned ballot(unsigned mask, Warp kind, bool value, Line line) {
  const uint64_t* all = exchange(mask, kind, value, line);
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= unsigned(mask >> i & 1 & unsigned(all[i])) << i;
  return result;
}

inline void fence() {
  running->fenced = true;
  if (__tsan_acquire)
    for (unsigned i = 0; i < running->touched && i < 8; ++i) __tsan_acquire(running->recent[i]);
  running->touched = 0;
  give_way();
}

template <class T, class Change>
T atomic(T* p, Change change) {
  static_assert(std::is_integral_v<T>, "sums of floating-point atomics depend on their order");
  give_way();
  if (__tsan_release && running->fenced) __tsan_release(p);
  running->recent[running->touched++ % 8] = p;
  return change(std::atomic_ref<T>(*p));
}

template <class T>
const T& aligned(const T* p, Line line) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T)) fail("misaligned address", line);
  return *p;
}

struct Launch {
  dim3 grid, block, cluster;
  size_t shared;
  void* stream;
  bool cooperative;
};
// Every thread of the grid calls `thread`; what went wrong, or nothing.
std::string run(const Launch&, const std::function<void()>& thread);

// In which order threads run. 0: the first that can. Odd: each has a priority, in 1 from the last to the first; the
// best runs as far as it can, which finds barriers missing before memory is used again. Even: at random.
extern unsigned long seed;

}  // namespace emu
