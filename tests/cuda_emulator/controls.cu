// Kernels that use what the emulator offers, and what is to be caught if one line of them is wrong.
//
// `controls PLANT…` runs them with each error in turn, `none` is without; 0 if all results of the last were right.
// Some errors show in a wrong result or a deadlock, others only under a sanitizer: tests/test_cuda_emulator.py has the
// table.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__CUDACC__)
#define SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char shared[]; \
  T* const name = reinterpret_cast<T*>(shared)
#else
#define SHARED(T, name) T* const name = static_cast<T*>(fn_emu_dynamic_shared())
#endif

namespace {

namespace cg = cooperative_groups;

enum Plant {
  none,
  no_barrier,         // between the warps' sums and their sum
  no_second_barrier,  // before the memory of the sums is used again
  early_return,       // of one thread, before others wait for it
  no_fence,           // between a result and the counter that announces it
  no_grid_barrier,
  no_last_barrier,  // of the cluster: a block ends while its shared memory is read
  overread,         // one 128-bit load past the end
  misaligned,       // a 128-bit load of four elements that lie across
  misaligned_hint,  // the same through __ldcs
  shared_overrun,   // one element past the dynamic shared memory
  divergent,        // half of the block at another barrier
  half_warp,        // in a shuffle of all lanes
};
constexpr const char* kNames[] = {
    "none",     "no_barrier", "no_second_barrier", "early_return",   "no_fence",  "no_grid_barrier", "no_last_barrier",
    "overread", "misaligned", "misaligned_hint",   "shared_overrun", "divergent", "half_warp"};

constexpr int kThreads = 96, kRows = 5, kLength = 500;
constexpr int kBlocks = 4;

__device__ double warp_sum(double value) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) value += __shfl_xor_sync(0xffffffffu, value, i);
  return value;
}

// The same for all threads.
__device__ double block_sum(double value, Plant plant) {
  __shared__ double sums[32];
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  if (plant != no_barrier) __syncthreads();
  double total = 0;
  for (unsigned i = 0; i < blockDim.x / 32; ++i) total += sums[i];
  if (plant != no_second_barrier) __syncthreads();
  return total;
}

__global__ void __launch_bounds__(kThreads) rows(const float* from, double* to, Plant plant) {
  SHARED(float4, kept);
  const int across = plant == misaligned || plant == misaligned_hint, over = plant == shared_overrun;
  for (int row = int(blockIdx.x); row < kRows; row += int(gridDim.x)) {
    const float* x = from + row * kLength + across;
    double sum = 0;
    for (int i = int(threadIdx.x); i < kLength / 4 - across; i += int(blockDim.x)) {
      const float4* pack = reinterpret_cast<const float4*>(x) + i;
      kept[i + over] = plant == misaligned ? *pack : __ldcs(pack);
      const float4 v = kept[i + over];
      sum += double(v.x) + double(v.y) + double(v.z) + double(v.w);
    }
    if (plant == overread && row == kRows - 1 && threadIdx.x == 0) sum += double(__ldg(&x[kLength]));
    sum = block_sum(sum, plant);
    if (threadIdx.x == 0) to[row] = sum;
    if (plant == early_return && threadIdx.x == 7) return;
    if (plant == divergent) {
      if (threadIdx.x < 32)
        __syncthreads();
      else
        __syncthreads();
    }
    if (plant == half_warp && threadIdx.x < 16) (void)__shfl_down_sync(0xffffffffu, 1.0f, 1);
  }
}

// The block that counts last adds up what the others left.
__global__ void last_block(const float* from, double* parts, unsigned* count, double* to, Plant plant) {
  __shared__ bool last;
  double sum = 0;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < kRows * kLength; i += gridDim.x * blockDim.x)
    sum += double(from[i]);
  sum = block_sum(sum, none);
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = sum;
    if (plant != no_fence) __threadfence();
    last = atomicAdd(count, 1u) == gridDim.x - 1;
    if (plant != no_fence) __threadfence();
  }
  __syncthreads();
  if (!last) return;
  sum = block_sum(threadIdx.x < gridDim.x ? parts[threadIdx.x] : 0, none);
  if (threadIdx.x == 0) *to = sum;
}

__global__ void whole_grid(const float* from, double* parts, double* to, Plant plant) {
  double sum = 0;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < kRows * kLength; i += gridDim.x * blockDim.x)
    sum += double(from[i]);
  sum = block_sum(sum, none);
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
  if (plant != no_grid_barrier) cg::this_grid().sync();
  if (threadIdx.x == 0) {
    sum = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) sum += parts[i];
    to[blockIdx.x] = sum;
  }
}

// Every block reads the sums of its cluster where they lie.
__global__ void cluster(const float* from, double* to, Plant plant) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  __shared__ double mine;
  SHARED(double, too);
  const cg::cluster_group group = cg::this_cluster();
  double sum = 0;
  for (unsigned i = group.block_rank() * blockDim.x + threadIdx.x; i < kRows * kLength;
       i += group.num_blocks() * blockDim.x)
    sum += double(from[i]);
  sum = block_sum(sum, none);
  if (threadIdx.x == 0) mine = *too = sum;
  group.sync();
  if (threadIdx.x == 0) {
    sum = 0;
    for (unsigned i = 0; i < group.num_blocks(); ++i) sum += *group.map_shared_rank(i % 2 ? &mine : too, i);
    to[blockIdx.x] = sum;
  }
  if (plant != no_last_barrier) group.sync();
#endif
}

enum Kind { plain, cooperative, clustered };

template <class... P, class... A>
void launch(Kind kind, unsigned blocks, size_t shared, void (*kernel)(P...), A... arguments) {
  cudaLaunchAttribute attribute{};
  if (kind == cooperative) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else if (kind == clustered) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = kBlocks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.attrs = &attribute;
  config.numAttrs = kind == plain ? 0 : 1;
  if (const cudaError_t e = cudaLaunchKernelEx(&config, kernel, arguments...))
    throw std::runtime_error(cudaGetErrorString(e));
}

int check(const char* what, const double* got, const std::vector<double>& wanted) {
  for (size_t i = 0; i < wanted.size(); ++i)
    if (got[i] != wanted[i]) return std::printf("%s: %g, not %g\n", what, got[i], wanted[i]), 1;
  return 0;
}

__global__ void scale(float* x, int n, float by) {
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) x[i] *= by;
}

}  // namespace

// For Python: one launch, and its error.
extern "C" __attribute__((visibility("default"))) int launch_scale(float* x, int n, float by, unsigned blocks,
                                                                   unsigned threads, size_t shared, int raise,
                                                                   unsigned cluster_size, int is_cooperative,
                                                                   cudaStream_t stream) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = is_cooperative;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster_size;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  if (raise && cudaFuncSetAttribute(scale, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)))
    return cudaGetLastError();
  return cudaLaunchKernelEx(&config, scale, x, n, by);
}

static bool right(Plant p) {
  std::vector<float> x(kRows * kLength);  // whole numbers, whose sums are exact
  std::vector<double> sums(kRows);
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = float(i / kLength + i % 2);
    sums[i / kLength] += double(x[i]);
  }
  const double total = std::accumulate(sums.begin(), sums.end(), 0.0);
  const auto out = std::make_unique<double[]>(2 * kBlocks), parts = std::make_unique<double[]>(kBlocks);
  unsigned count = 0;
  int wrong = 0;
  try {
    launch(plain, 2, sizeof(float) * kLength, rows, x.data(), out.get(), p);
    wrong += check("rows", out.get(), sums);
    launch(plain, kBlocks, 0, last_block, x.data(), parts.get(), &count, out.get(), p);
    wrong += check("last block", out.get(), std::vector<double>(1, total));
    std::fill_n(parts.get(), kBlocks, -1.0);
    launch(cooperative, kBlocks, 0, whole_grid, x.data(), parts.get(), out.get(), p);
    wrong += check("whole grid", out.get(), std::vector<double>(kBlocks, total));
    launch(clustered, 2 * kBlocks, sizeof(double), cluster, x.data(), out.get(), p);
    wrong += check("cluster", out.get(), std::vector<double>(2 * kBlocks, total));
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return false;
  }
  return wrong == 0;
}

int main(int, char** arguments) {
  bool good = false;
  while (*++arguments) {
    int plant = 0;
    while (plant < half_warp && *arguments != std::string(kNames[plant])) ++plant;
    good = right(Plant(plant));
  }
  return !good;
}
