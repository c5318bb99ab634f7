// The output pool: memory of outputs that were freed, kept for the next ones.
//
// A fresh large array costs more than the kernel that fills it: every call would fault its pages in anew. Blocks here
// are page-aligned, advised to use huge pages, handed out again to the next request of about their size, and given back
// to the system beyond a cap. Thread-safe; survives fork.
#pragma once

#include <cstddef>

namespace fusednorm::cpu {

// Smaller outputs are left to NumPy's allocator.
constexpr size_t kPoolBytes = size_t(1) << 20;

struct Block {
  void* data;
  size_t capacity;
};

Block pool_take(size_t bytes);  // throws std::bad_alloc
void pool_give(Block block) noexcept;
// Frees what is not in use; returns its bytes.
size_t pool_empty() noexcept;

}  // namespace fusednorm::cpu
