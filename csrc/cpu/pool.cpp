#include "cpu/pool.h"

#include <pthread.h>
#include <sys/mman.h>

#include <iterator>
#include <map>
#include <mutex>
#include <new>

namespace fusednorm::cpu {
namespace {

constexpr size_t kPage = size_t(2) << 20;  // a huge page
constexpr size_t kCap = size_t(1) << 30;   // bytes kept at most
size_t rounded(size_t bytes) {
  const size_t unit = bytes < 4 * kPage ? kPage / 8 : kPage;
  return (bytes + unit - 1) / unit * unit;
}
// A block serves requests down to 3/4 of it: a smaller one would hold memory that its owner does not know of.
bool serves(size_t capacity, size_t bytes) { return bytes <= capacity && bytes * 4 >= capacity * 3; }

struct Pool {
  std::mutex mutex;
  std::multimap<size_t, void*> blocks;  // by capacity
  size_t bytes = 0;
};

// Never destroyed: arrays may outlive static destruction. Locked across a fork, so that the child finds it whole.
Pool& pool() {
  static Pool* const one = [] {
    static Pool* p = new Pool;
    pthread_atfork([] { p->mutex.lock(); }, [] { p->mutex.unlock(); }, [] { p->mutex.unlock(); });
    return p;
  }();
  return *one;
}

}  // namespace

Block pool_take(size_t bytes) {
  Pool& p = pool();
  {
    std::lock_guard<std::mutex> lock(p.mutex);
    const auto best = p.blocks.lower_bound(bytes);
    if (best != p.blocks.end() && serves(best->first, bytes)) {
      const Block block{best->second, best->first};
      p.bytes -= block.capacity;
      p.blocks.erase(best);
      return block;
    }
  }
  const size_t capacity = rounded(bytes);
  void* data = mmap(nullptr, capacity + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  // Trimmed to a huge page's alignment.
  const size_t start = reinterpret_cast<size_t>(data), aligned = (start + kPage - 1) / kPage * kPage;
  if (aligned > start) munmap(data, aligned - start);
  munmap(reinterpret_cast<void*>(aligned + capacity), kPage - (aligned - start));
#if defined(MADV_HUGEPAGE)
  madvise(reinterpret_cast<void*>(aligned), capacity, MADV_HUGEPAGE);
#endif
  return {reinterpret_cast<void*>(aligned), capacity};
}

void pool_give(Block block) noexcept {
  Pool& p = pool();
  {
    std::lock_guard<std::mutex> lock(p.mutex);
    if (p.bytes + block.capacity <= kCap) {
      try {
        p.blocks.emplace_hint(p.blocks.lower_bound(block.capacity), block.capacity, block.data);  // newest first: warm
        p.bytes += block.capacity;
        return;
      } catch (const std::bad_alloc&) {  // no memory for the map's node: give the block back instead
      }
    }
  }
  munmap(block.data, block.capacity);
}

size_t pool_empty() noexcept {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  const size_t freed = p.bytes;
  for (const auto& [capacity, data] : p.blocks) munmap(data, capacity);
  p.blocks.clear();
  p.bytes = 0;
  return freed;
}

}  // namespace fusednorm::cpu
