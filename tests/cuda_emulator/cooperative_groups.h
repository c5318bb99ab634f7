// Block, tile, grid and cluster; clusters lie along x.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

// Barrier of all threads of a block, a cluster or the grid. Between the two halves a thread may do other work.
template <emu::Scope scope>
struct Group {
  struct arrival_token {
    unsigned phase;
  };
  static void sync(EMU_LINE) { emu::barrier(scope, emu::Vote::none, false, line); }
  static arrival_token barrier_arrive(EMU_LINE) { return {emu::arrive(scope, emu::Vote::none, false, line)}; }
  static void barrier_wait(arrival_token&& token, EMU_LINE) { emu::wait(scope, token.phase, line); }
};

struct thread_block : Group<emu::Scope::block> {
  static unsigned thread_rank() { return emu::running->linear; }
  static unsigned num_threads() { return blockDim.x * blockDim.y * blockDim.z; }
  static unsigned size() { return num_threads(); }
};
inline thread_block this_thread_block() { return {}; }

struct grid_group : Group<emu::Scope::grid> {
  static unsigned block_rank() { return blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z); }
  static unsigned num_blocks() { return gridDim.x * gridDim.y * gridDim.z; }
  static unsigned long long thread_rank() {
    return block_rank() * 1ull * thread_block::num_threads() + thread_block::thread_rank();
  }
  static unsigned long long num_threads() { return num_blocks() * 1ull * thread_block::num_threads(); }
};
inline grid_group this_grid() { return {}; }

struct cluster_group : Group<emu::Scope::cluster> {
  static unsigned block_rank() { return emu::cluster_rank(); }
  static unsigned num_blocks() { return emu::cluster_size(); }
  static unsigned thread_rank() { return block_rank() * thread_block::num_threads() + thread_block::thread_rank(); }
  static unsigned num_threads() { return num_blocks() * thread_block::num_threads(); }
  template <class T>
  static T* map_shared_rank(T* mine, unsigned rank, EMU_LINE) {
    return static_cast<T*>(emu::map_shared(mine, rank, line));
  }
};
inline cluster_group this_cluster() { return {}; }

template <unsigned N>
struct thread_block_tile {
  static_assert(N <= 32 && (N & (N - 1)) == 0);
  static unsigned mask() { return (~0u >> (32 - N)) << (emu::running->lane() & ~(N - 1)); }
  static unsigned thread_rank() { return emu::running->lane() % N; }
  static constexpr unsigned num_threads() { return N; }
  static constexpr unsigned size() { return N; }
  static void sync(EMU_LINE) { __syncwarp(mask(), line); }
  template <class T>
  static T shfl(T value, int from, EMU_LINE) {
    return __shfl_sync(mask(), value, from, N, line);
  }
  template <class T>
  static T shfl_down(T value, unsigned delta, EMU_LINE) {
    return __shfl_down_sync(mask(), value, delta, N, line);
  }
  template <class T>
  static T shfl_xor(T value, int other, EMU_LINE) {
    return __shfl_xor_sync(mask(), value, other, N, line);
  }
};
template <unsigned N>
thread_block_tile<N> tiled_partition(const thread_block&) {
  return {};
}

}  // namespace cooperative_groups
