// OpenMP as far as the kernels use it, on std::thread: linked in place of libgomp, which ThreadSanitizer does not
// understand (it waits by futex, and every barrier would look like a race). A pragma that is new to the kernels is an
// undefined GOMP_ symbol here.
//
// Tasks are handed out by a relaxed counter: anything stronger would order one thread's task after another's and hide the
// race between them.
#include "threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace {

constexpr int kThreads = 4, kLoops = 16;

class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const long now = passed_;
    if (++waiting_ == size_) {
      waiting_ = 0;
      ++passed_;
      changed_.notify_all();
    }
    changed_.wait(lock, [&] { return passed_ != now; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  const int size_;
  int waiting_ = 0;
  long passed_ = 0;
};

struct Team {
  explicit Team(int n) : size(n), barrier(n) {}
  const int size;
  Barrier barrier;
  std::atomic<long> taken[kLoops] = {};  // by each loop of the region in turn
};

struct Member {
  Team* team = nullptr;
  int rank = 0, loop = -1;
  long begin = 0, end = 0, chunk = 1;
};
thread_local Member member;

}  // namespace

bool barriers_left_out = false;

extern "C" {

int omp_get_max_threads() { return kThreads; }
int omp_get_num_threads() { return member.team ? member.team->size : 1; }
int omp_get_thread_num() { return member.rank; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  Team team(threads ? int(threads) : kThreads);
  const auto run = [&](int rank) {
    member = Member{&team, rank};
    body(data);
    member = Member{};
  };
  std::vector<std::thread> others;
  for (int rank = 1; rank < team.size; ++rank) others.emplace_back(run, rank);
  run(0);
  for (std::thread& other : others) other.join();
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* begin, long* end) {
  const long i = member.begin + member.team->taken[member.loop].fetch_add(member.chunk, std::memory_order_relaxed);
  *begin = i;
  *end = std::min(i + member.chunk, member.end);
  return i < member.end;
}
bool GOMP_loop_nonmonotonic_dynamic_start(long begin, long end, long step, long chunk, long* from, long* to) {
  if (step != 1 || ++member.loop >= kLoops) __builtin_trap();
  member.begin = begin;
  member.end = end;
  member.chunk = chunk;
  return GOMP_loop_nonmonotonic_dynamic_next(from, to);
}
void GOMP_loop_end() {
  if (!barriers_left_out) member.team->barrier.wait();
}
void GOMP_loop_end_nowait() {}
void GOMP_barrier() { GOMP_loop_end(); }

}  // extern "C"
