// CUDA's table of verbs: what each asks of the two passes, and their launches.
#include <atomic>
#include <mutex>
#include <stdexcept>
#include <string>

#include "core/cuda.h"
#include "cuda/kernels.h"

namespace fusednorm::cuda {
namespace {

constexpr int kMaxDevices = 64;
constexpr int kEach = 128;  // threads of a block that does what comes after the passes

void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else the next call would report it again
  std::string message = std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error) + " while " + doing;
  if (error == cudaErrorNoKernelImageForDevice)
    message += std::string("; CUDA is ") + state() +
               ": install where this GPU is, or build with CMAKE_CUDA_ARCHITECTURES naming it";
  throw std::runtime_error(message);
}

// Makes a device the current one for a while.
class Current {
 public:
  explicit Current(int device) : now_(device) {
    check(cudaGetDevice(&before_), "asking for the current device");
    if (before_ != now_) check(cudaSetDevice(now_), "changing to the arrays' device");
  }
  ~Current() {
    if (before_ != now_) cudaSetDevice(before_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int before_ = 0, now_;
};

const Device& device(int ordinal) {
  static std::once_flag once[kMaxDevices];
  static Device devices[kMaxDevices];
  if (ordinal < 0 || ordinal >= kMaxDevices) check(cudaErrorInvalidDevice, "looking for the arrays' device");
  std::call_once(once[ordinal], [&] {
    const auto get = [&](cudaDeviceAttr attribute) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, attribute, ordinal), "asking for the device's properties");
      return value;
    };
    Device d;
    d.sms = get(cudaDevAttrMultiProcessorCount);
    d.threads = get(cudaDevAttrMaxThreadsPerMultiProcessor);
    d.shared = get(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    d.shared_block = get(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    d.shared_lost = get(cudaDevAttrReservedSharedMemoryPerBlock);
    d.l2 = get(cudaDevAttrL2CacheSize);
    d.max_cluster = get(cudaDevAttrClusterLaunch) ? 8 : 1;
    d.cooperative = get(cudaDevAttrCooperativeLaunch);
    devices[ordinal] = d;
  });
  return devices[ordinal];
}

template <class P>
cudaLaunchConfig_t config_of(const P& plan, const Queue& queue, cudaLaunchAttribute* attribute) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(uint32_t(plan.blocks()));
  config.blockDim = dim3(uint32_t(plan.threads));
  config.dynamicSmemBytes = size_t(plan.shared);
  config.stream = static_cast<cudaStream_t>(queue.stream);
  config.attrs = attribute;
  if (plan.team == Team::cluster) {
    attribute->id = cudaLaunchAttributeClusterDimension;
    attribute->val.clusterDim = {uint32_t(plan.size), 1, 1};
    config.numAttrs = 1;
  } else if (plan.team == Team::grid) {
    attribute->id = cudaLaunchAttributeCooperative;
    attribute->val.cooperative = 1;
    config.numAttrs = 1;
  }
  return config;
}

// What a kernel may use, of the current device. Asked once: the largest cluster is what fits beside other programs, too.
template <class Pass, class J>
Device limits(void (*kernel)(const Pass, const J), std::atomic<int>& largest_cluster, const Device& d, int resident) {
  Device own = d;
  own.threads = d.threads < resident ? d.threads : resident;
  if (largest_cluster == 0) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(d.shared_block)),
          "asking for shared memory");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100),
          "asking for shared memory");
    int size = d.max_cluster;
    for (; size > 1; size /= 2) {
      Plan plan;
      plan.team = Team::cluster;
      plan.size = size;
      plan.threads = own.threads;
      plan.shared = int(d.shared_block);
      cudaLaunchAttribute attribute;
      const cudaLaunchConfig_t config = config_of(plan, {}, &attribute);
      int clusters = 0;
      if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess && clusters > 0) break;
      cudaGetLastError();
    }
    largest_cluster = size;
  }
  own.max_cluster = largest_cluster;
  return own;
}

bool refused(cudaError_t error) {
  return error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorLaunchOutOfResources ||
         error == cudaErrorInvalidClusterSize || error == cudaErrorNotSupported;
}

template <class Pass>
cudaError_t launch(Kernel<Pass> kernel, const Pass& pass, Job job, const Queue& queue) {
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = config_of(job.plan, queue, &attribute);
  job.size = Divisor(job.plan.size);
  if (job.plan.team != Team::launches || !job.merges) return cudaLaunchKernelEx(&config, kernel, pass, job);
  job.phase = Phase::sums;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, pass, job);
  if (error != cudaSuccess) return error;
  job.phase = Phase::rest;
  return cudaLaunchKernelEx(&config, kernel, pass, job);
}

// Statistics of several batch entries, for what is made of them afterwards: three numbers each.
bool has_entries(const Fold& f) { return f.batch != 1; }
int64_t entry_bytes(const Fold& f) { return has_entries(f) ? f.statistics() * 3 * int64_t(sizeof(double)) : 0; }

template <class T, class Pass>
void run(const Pass& pass, const Kernel<Pass> (&kernels)[2][2], const Queue& queue) {
  static std::atomic<int> largest_cluster[2][2][kMaxDevices];
  const Layout layout = layout_of<T>(pass, device(queue.device).sms);
  if (layout.slabs == 0) return;
  const bool columns = pass.fold.is_columns(), general = !kHasPlain<T> || !pass.is_plain();
  const Kernel<Pass> kernel = kernels[columns][general];
  const Current current(queue.device);
  Device d =
      limits(kernel, largest_cluster[columns][general][queue.device], device(queue.device), Pass::resident(general));
  Job job{layout,     plan_of<T>(pass, layout, d), {},
          Phase::all, pass.work().merges,          static_cast<char*>(queue.scratch) + entry_bytes(pass.fold)};
  cudaError_t error = launch(kernel, pass, job, queue);
  if (refused(error) && d.max_cluster + d.cooperative > 1) {
    cudaGetLastError();
    d.max_cluster = 1;
    d.cooperative = false;
    job.plan = plan_of<T>(pass, layout, d);
    error = launch(kernel, pass, job, queue);
  }
  check(error, "launching a kernel");
}

// What is done after the passes, a thread for each number.
template <class... Parameters, class... Arguments>
void launch_each(int64_t numbers, const Queue& queue, void (*kernel)(Parameters...), const Arguments&... arguments) {
  if (numbers == 0) return;
  const Current current(queue.device);
  Plan plan;
  plan.threads = kEach;
  plan.teams = int((numbers + plan.threads - 1) / plan.threads);
  cudaLaunchAttribute none;
  const cudaLaunchConfig_t config = config_of(plan, queue, &none);
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "launching a kernel");
}

// Lines. In scratch memory: the blocks' sums of channels [blocks][2][slots], then, of lines that are cut among blocks that do
// not meet, their sums [S][pieces] and s1 and s2 [S].
struct LineScratch {
  int64_t sums_at = 0, corrections_at = 0, bytes = 0;
};
template <class T>
LineScratch line_scratch(const Fold& f, const Device& d) {
  int64_t pieces = 0, columns = 0;  // the most, however large clusters may be
  const auto look = [&](auto pass) {
    pass.fold = f;
    Device own = d;
    own.threads = d.threads < pass.kLineThreads ? d.threads : pass.kLineThreads;
    for (own.max_cluster = 1; own.max_cluster <= d.max_cluster; own.max_cluster *= 2) {
      const LinePlan plan = plan_of_lines<T>(pass, own);
      const int64_t sums = pass.takes_columns() ? plan.blocks() * 2 * plan.slots : 0;
      if (sums > columns) columns = sums;
      if (plan.team == Team::launches && plan.size > pieces) pieces = plan.size;
    }
  };
  ForwardPass forward{};
  forward.y.data = &forward;
  look(forward);
  BackwardPass backward{};
  backward.dx.data = &backward;
  backward.sums = true;
  look(backward);
  backward.dx = {};  // of cut lines, the sums alone
  backward.s1 = reinterpret_cast<double*>(&backward);
  look(backward);
  LineScratch at;
  at.sums_at = columns * int64_t(sizeof(double));
  at.corrections_at = at.sums_at + f.statistics() * pieces * kSumsBytes;
  at.bytes = at.corrections_at + (pieces > 0 ? f.statistics() * 2 * int64_t(sizeof(double)) : 0);
  return at;
}

// Of a line that is cut, or of a statistic's cells, by all threads of a block.
__device__ Sums<double> line_sums(const Sums<double>* sums, int64_t line, int size) {
  __shared__ Sums<double> all[kEach];
  Sums<double> own = Sums<double>::none();
  for (int i = int(threadIdx.x); i < size; i += kEach) own.merge(sums[line * size + i]);
  for (uint32_t o = kEach / 2; o > 0; o /= 2) {
    all[threadIdx.x] = own;
    __syncthreads();
    if (threadIdx.x < o) own.merge(all[threadIdx.x + o]);
    __syncthreads();
  }
  return own;
}
__global__ void line_moments_kernel(const ForwardPass pass, const Sums<double>* all, int size) {
  const int64_t s = blockIdx.x;
  const Sums<double> sums = line_sums(all, s, size);
  if (threadIdx.x > 0) return;
  const double unit = sums.unit();
  if (pass.count) pass.count[s] = sums.n;
  if (pass.mean) pass.mean[s] = pass.center ? sums.mean() : 0;
  if (pass.m2) pass.m2[s] = sums.scaled_m2(pass.center) * unit * unit;
  if (pass.rstd) pass.rstd[s] = sums.rstd(pass.center, pass.eps);
}
__global__ void line_sums_kernel(const BackwardPass pass, const Sums<double>* all, int size) {
  const Sums<double> sums = line_sums(all, blockIdx.x, size);
  if (threadIdx.x > 0) return;
  pass.s1[blockIdx.x] = sums.s * sums.unit();
  pass.s2[blockIdx.x] = sums.q * sums.unit() * sums.unit();
}
void merge_lines(const ForwardPass& pass, const void* sums, int size, const Queue& queue) {
  launch_each(pass.fold.statistics() * kEach, queue, line_moments_kernel, pass, static_cast<const Sums<double>*>(sums),
              size);
}
void merge_lines(const BackwardPass& pass, const void* sums, int size, const Queue& queue) {
  if (pass.takes_line_sums())
    launch_each(pass.fold.statistics() * kEach, queue, line_sums_kernel, pass, static_cast<const Sums<double>*>(sums),
                size);
}

// What the sums s1, s2 of lines bring into dx, in their place: c0, cx.
__global__ void line_corrections_kernel(int64_t lines, double n, bool center, double* s1, double* s2) {
  const int64_t s = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (s >= lines) return;
  s1[s] = center ? -s1[s] / n : 0;
  s2[s] = -s2[s] / n;
}

// The blocks' sums of channels, in order: 32 channels a block.
__global__ void line_gradients_kernel(const Fold f, const LinePlan plan, const Array columns, const Array dweight,
                                      const Array dbias) {
  constexpr int slices = kEach / int(kWarp);
  __shared__ double all[slices][2][kWarp];
  const int lane = int(threadIdx.x % kWarp), slice = int(threadIdx.x / kWarp);
  const int64_t c = int64_t(blockIdx.x) * kWarp + lane;
  double u = 0, ux = 0;
  if (c < f.channels() && plan.teams > 0) {
    const int64_t group = c / f.share(), own = c - group * f.share();  // of the group's
    const int64_t begin = own * f.span / plan.each, end = ((own + 1) * f.span - 1) / plan.each;
    for (int64_t rank = begin; rank <= end; ++rank) {
      const int64_t slot = own - rank * plan.each / f.span;
#pragma unroll 4
      for (int64_t team = slice; team < plan.teams; team += slices) {
        const int64_t at = ((team * f.groups + group) * plan.size + rank) * 2 * plan.slots + slot;
        u += columns.get(at);
        ux += columns.get(at + plan.slots);
      }
    }
  }
  all[slice][0][lane] = u;
  all[slice][1][lane] = ux;
  __syncthreads();
  if (slice > 0 || c >= f.channels()) return;
  for (int i = 1; i < slices; ++i) {
    u += all[i][0][lane];
    ux += all[i][1][lane];
  }
  dweight.set(c, ux);
  dbias.set(c, u);
}
void add_lines(const ForwardPass&, const LineJob&, const Queue&) {}
void add_lines(const BackwardPass& pass, const LineJob& job, const Queue& queue) {
  if (pass.sums)
    launch_each((pass.fold.channels() + kWarp - 1) / kWarp * kEach, queue, line_gradients_kernel, pass.fold, job.plan,
                job.columns, pass.dweight, pass.dbias);
}

void run(const ForwardPass&, const Queue&);
void run(BackwardPass, const Queue&);

// Lines that are cut: what waits for their sums is another launch.
template <class T>
bool in_turn(const ForwardPass& pass, const Queue& queue) {
  if (!pass.y) return false;
  ForwardPass first = pass, second = pass;
  first.y = {};
  second.given_mean = pass.mean;
  second.given_rstd = pass.rstd;
  second.mean = second.rstd = nullptr;
  run(first, queue);
  run(second, queue);
  return true;
}
template <class T>
bool in_turn(const BackwardPass& pass, const Queue& queue) {
  if (!pass.dx || pass.known()) return false;
  const int64_t lines = pass.fold.statistics();
  BackwardPass first = pass, second = pass;
  first.dx = {};
  first.s1 = reinterpret_cast<double*>(static_cast<char*>(queue.scratch) +
                                       line_scratch<T>(pass.fold, device(queue.device)).corrections_at);
  first.s2 = first.s1 + lines;
  second.c0 = first.s1;
  second.cx = first.s2;
  second.sums = false;
  run(first, queue);
  launch_each(lines, queue, line_corrections_kernel, lines, double(pass.fold.inner), bool(pass.mean), first.s1,
              first.s2);
  run(second, queue);
  return true;
}

template <class T, class Pass>
void run_lines(const Pass& pass, const Kernel<Pass, LineJob> (&kernels)[2], const Queue& queue, bool clusters = true) {
  static std::atomic<int> largest_cluster[2][kMaxDevices];
  const Fold& f = pass.fold;
  char* const scratch = static_cast<char*>(queue.scratch);
  LineJob job{};
  job.inverse_n = pass.fold.inner > 0 ? 1.0 / double(pass.fold.inner) : 0;
  job.columns = {scratch, DType::f64, queue.device};
  if (f.statistics() > 0) {
    const bool several = (f.inner + kWidth<T> - 1) / kWidth<T> <= kShortLine;
    const Current current(queue.device);
    Device d = limits(kernels[several], largest_cluster[several][queue.device], device(queue.device),
                      Pass::kLineThreads);
    if (!clusters) d.max_cluster = 1;
    job.plan = plan_of_lines<T>(pass, d);
    const bool cut = job.plan.team == Team::launches;
    if (cut && in_turn<T>(pass, queue)) return;
    if (cut) job.sums = scratch + line_scratch<T>(f, device(queue.device)).sums_at;
    if (sizeof(T) < 8 && job.plan.steps <= job.plan.teams * kChunk) job.columns.dtype = DType::f32;  // one sum each
    job.span = Divisor(f.span);
    job.vector = f.inner % kWidth<T> == 0;
    for (const void* p : pass.tensors()) job.vector = job.vector && reinterpret_cast<uintptr_t>(p) % kPackBytes == 0;
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = config_of(job.plan, queue, &attribute);
    const cudaError_t error = cudaLaunchKernelEx(&config, kernels[several], pass, job);
    if (refused(error) && clusters) {
      cudaGetLastError();
      return run_lines<T>(pass, kernels, queue, false);
    }
    check(error, "launching a kernel");
    if (cut) merge_lines(pass, job.sums, job.plan.size, queue);
  }
  add_lines(pass, job, queue);
}

template <class Call>
void with_dtype(DType dtype, Call&& call) {
  switch (dtype) {
    case DType::f32: return call(float{});
    case DType::f64: return call(double{});
    case DType::f16: return call(f16{});
    case DType::bf16: return call(bf16{});
  }
}

// Statistics of several cells. In scratch memory, behind what passes over the cells need: what is known of each cell,
// then c0 and cx.
int64_t pass_bytes(const Fold& f, DType dtype, int ordinal) {
  const int widest = f.is_columns() ? 8 * kPackBytes / int(item_size(dtype)) : 1;
  return entry_bytes(f) + int64_t(kMaxParts) * device(ordinal).sms * widest * kSumsBytes;
}
char* cell_scratch(const Fold& f, DType dtype, const Queue& queue) {
  return static_cast<char*>(queue.scratch) + pass_bytes(f.cells(), dtype, queue.device);
}
int64_t cell_bytes(const Fold& f) {
  return f.cells().statistics() * kSumsBytes + f.statistics() * 2 * int64_t(sizeof(double));
}
bool has_cells(const Fold& f) { return f.share() != 1; }
template <class Pass>
Pass of_cells(Pass pass) {
  pass.share = Divisor(pass.fold.share());
  pass.fold = pass.fold.cells();
  return pass;
}

void run_cells(const ForwardPass& pass, const Queue& queue) {
  ForwardPass cells = of_cells(pass);
  if (pass.takes_statistics()) {
    ForwardPass first = cells;
    first.y = {};
    first.epilogue = {};
    first.count = first.mean = first.m2 = first.rstd = nullptr;
    first.sums = cell_scratch(pass.fold, pass.x.dtype, queue);
    run(first, queue);
    merge_lines(pass, first.sums, int(pass.fold.share()), queue);
    cells.given_mean = pass.mean;
    cells.given_rstd = pass.rstd;
    cells.mean = cells.rstd = nullptr;
    cells.mask = nullptr;
  }
  if (pass.y) run(cells, queue);
}

// Per statistic: the cells' numbers, added in order, times `factor`.
__global__ void cells_kernel(int64_t statistics, int64_t share, double factor, const double* a, const double* b,
                             double* all_a, double* all_b) {
  const int64_t s = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (s >= statistics) return;
  double sum_a = 0, sum_b = 0;
  for (int64_t i = s * share; i < (s + 1) * share; ++i) {
    sum_a += a[i];
    sum_b += b[i];
  }
  all_a[s] = factor * sum_a;
  all_b[s] = factor * sum_b;
}

void run(const ForwardPass& pass, const Queue& queue) {
  if (has_cells(pass.fold) && !pass.is_lines()) return run_cells(pass, queue);
  with_dtype(pass.x.dtype, [&](auto element) {
    using T = decltype(element);
    if (pass.is_lines()) return run_lines<T>(pass, kernels<T>().forward_lines, queue);
    run<T>(pass, kernels<T>().forward, queue);
  });
}

void run(BackwardPass pass, const Queue& queue) {
  if (has_cells(pass.fold) && !pass.is_lines()) return run(of_cells(pass), queue);
  // Without an activation u is dy: the residual need not be read.
  if (pass.epilogue.activation == Activation::identity) pass.epilogue.residual = Array();
  pass.n = double(pass.fold.per_statistic());
  with_dtype(pass.x.dtype, [&](auto element) {
    using T = decltype(element);
    if (pass.is_lines()) return run_lines<T>(pass, kernels<T>().backward_lines, queue);
    run<T>(pass, kernels<T>().backward, queue);
  });
}

// Kernels of one thread a number, for what comes after the passes.

__global__ void merge_kernel(const MergeArgs a) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= a.before * a.after) return;
  Moments m;
  for (int64_t j = 0; j < a.axis; ++j) {
    const int64_t from = (i / a.after * a.axis + j) * a.after + i % a.after;
    m.merge({a.count[from], a.mean[from], a.m2[from]});
  }
  a.merged_count[i] = m.n;
  a.merged_mean[i] = m.mean;
  a.merged_m2[i] = m.m2;
}

// The running statistics, by the statistics of the batch entries.
__global__ void running_kernel(const Fold f, const RunningArgs running, const double* count, const double* mean,
                               const double* m2) {
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= f.groups) return;
  running.update_by_entries(c, f.batch, [&](int64_t b) {
    const int64_t s = b * f.groups + c;
    return Moments{count[s], mean[s], m2[s]};
  });
}

// Per-channel gradients: the batch entries' sums, in order.
__global__ void gradients_kernel(const Fold f, const double* u, const double* ux, const Array dweight,
                                 const Array dbias) {
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= f.groups) return;
  GradSums sums;
  for (int64_t s = c; s < f.statistics(); s += f.groups) sums.merge({u[s], ux[s]});
  dweight.set(c, sums.uz);
  dbias.set(c, sums.u);
}

// The verbs.

void moments(const MomentsArgs& a) {
  ForwardPass pass{};
  pass.fold = a.fold;
  pass.x = a.x;
  pass.mask = a.mask;
  pass.center = a.center;
  pass.count = a.count;
  pass.mean = a.mean;
  pass.m2 = a.m2;
  run(pass, a.queue);
}

void merge(const MergeArgs& a) { launch_each(a.before * a.after, a.queue, merge_kernel, a); }

void normalize(const NormalizeArgs& a) {
  if (a.fold.size() == 0) return;
  ForwardPass pass{};
  pass.fold = a.fold;
  pass.x = a.x;
  pass.weight = a.weight;
  pass.bias = a.bias;
  pass.y = a.y;
  pass.epilogue = a.epilogue;
  pass.given_mean = a.mean;
  pass.given_rstd = a.rstd;
  run(pass, a.queue);
}

void forward(const ForwardArgs& a) {
  ForwardPass pass{};
  pass.fold = a.fold;
  pass.x = a.x;
  pass.weight = a.weight;
  pass.bias = a.bias;
  pass.y = a.y;
  pass.epilogue = a.epilogue;
  pass.mask = a.training ? a.mask : nullptr;
  pass.evaluation = !a.training;
  pass.center = bool(a.mean);
  pass.eps = a.eps;
  pass.running = a.running;
  pass.mean = a.mean;
  pass.rstd = a.rstd;
  const bool updates = a.training && a.running.mean, after = updates && has_entries(a.fold);
  pass.updates = updates && !after;
  pass.update_weight = a.running.weight(0);
  if (after) {
    pass.count = static_cast<double*>(a.queue.scratch);
    pass.m2 = pass.count + a.fold.statistics();
  }
  run(pass, a.queue);
  if (after) launch_each(a.fold.groups, a.queue, running_kernel, a.fold, a.running, pass.count, pass.mean, pass.m2);
}

// Sums, and the parameters' gradients of them.
void run_sums(BackwardPass pass, const Array& dweight, const Array& dbias, const Queue& queue) {
  pass.sums = true;
  if (has_cells(pass.fold) && !pass.is_lines()) {
    const Fold& f = pass.fold;
    const int64_t cells = f.cells().statistics(), all = f.statistics();
    double *const own = reinterpret_cast<double*>(cell_scratch(f, pass.x.dtype, queue)),
           *const together = own + cells * kSumsBytes / int64_t(sizeof(double));
    const bool waits = pass.dx && !pass.known();
    BackwardPass first = of_cells(pass), second = first;
    first.s1 = first.s2 = nullptr;
    if (waits) {
      first.dx = first.dresidual = {};
      first.own_c0 = own;
      first.own_cx = own + cells;
    } else if (pass.s1) {
      first.s1 = own;
      first.s2 = own + cells;
    }
    run_sums(first, dweight, dbias, queue);
    if (!waits && pass.s1) launch_each(all, queue, cells_kernel, all, f.share(), 1.0, own, own + cells, pass.s1, pass.s2);
    if (!waits) return;
    launch_each(all, queue, cells_kernel, all, f.share(), 1 / double(f.share()), own, own + cells, together,
                together + all);
    second.sums = false;
    second.c0 = together;
    second.cx = together + all;
    return run(second, queue);
  }
  const bool after = has_entries(pass.fold) && !pass.is_lines();
  if (after) {
    pass.u = static_cast<double*>(queue.scratch);
    pass.ux = pass.u + pass.fold.statistics();
  } else {
    pass.dweight = dweight;
    pass.dbias = dbias;
  }
  run(pass, queue);
  if (after) launch_each(pass.fold.groups, queue, gradients_kernel, pass.fold, pass.u, pass.ux, dweight, dbias);
}

void grad_sums(const GradSumsArgs& a) {
  BackwardPass pass{};
  pass.fold = a.fold;
  pass.dy = a.dy;
  pass.x = a.x;
  pass.mean = a.mean;
  pass.rstd = a.rstd;
  pass.weight = a.weight;
  pass.bias = a.bias;
  pass.epilogue = a.epilogue;
  pass.constant = true;
  pass.s1 = a.s1;
  pass.s2 = a.s2;
  run_sums(pass, a.dweight, a.dbias, a.queue);
}

void grad_input(const GradInputArgs& a) {
  if (a.fold.size() == 0) return;
  BackwardPass pass{};
  pass.fold = a.fold;
  pass.dy = a.dy;
  pass.x = a.x;
  pass.mean = a.mean;
  pass.rstd = a.rstd;
  pass.weight = a.weight;
  pass.bias = a.bias;
  pass.epilogue = a.epilogue;
  pass.cx = a.cx;
  pass.c0 = a.c0;
  pass.constant = !a.cx && !a.c0;
  pass.mask = a.mask;
  pass.dx = a.dx;
  pass.dresidual = a.dresidual;
  run(pass, a.queue);
}

void backward(const BackwardArgs& a) {
  BackwardPass pass{};
  pass.fold = a.fold;
  pass.dy = a.dy;
  pass.x = a.x;
  pass.mean = a.mean;
  pass.rstd = a.rstd;
  pass.weight = a.weight;
  pass.bias = a.bias;
  pass.epilogue = a.epilogue;
  pass.constant = a.constant;
  pass.mask = a.constant ? nullptr : a.mask;
  pass.dx = a.dx;
  pass.dresidual = a.dresidual;
  run_sums(pass, a.dweight, a.dbias, a.queue);
}

void copy(const CopyArgs& a) {
  const Current current(a.queue.device);
  check(cudaMemcpyAsync(a.to, a.from, size_t(a.bytes), cudaMemcpyDeviceToDevice,
                        static_cast<cudaStream_t>(a.queue.stream)),
        "copying");
}

int64_t scratch(const Fold& f, DType dtype, int ordinal) {
  int64_t lines = 0;
  if (fits_lines(f))
    with_dtype(dtype, [&](auto element) { lines = line_scratch<decltype(element)>(f, device(ordinal)).bytes; });
  const int64_t passes = pass_bytes(f.cells(), dtype, ordinal) + (has_cells(f) ? cell_bytes(f) : 0);
  return lines > passes ? lines : passes;
}

const Backend table{"cuda", moments, merge, normalize, grad_sums, grad_input, forward, backward, copy, scratch};

}  // namespace

const Backend* backend() { return &table; }

const char* state() {
#if defined(FUSEDNORM_CUDA_STATE)
  return FUSEDNORM_CUDA_STATE;
#else
  return "built";
#endif
}

int devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

bool capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "asking whether a graph is captured");
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace fusednorm::cuda
