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

void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else the next call would report it again
  throw std::runtime_error(std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error) + " while " + doing);
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

cudaLaunchConfig_t config_of(const Plan& plan, const Queue& queue, cudaLaunchAttribute* attribute) {
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
template <class Pass>
Device limits(Kernel<Pass> kernel, std::atomic<int>& largest_cluster, const Device& d, int resident) {
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
  const bool columns = pass.fold.is_columns(), general = !pass.is_plain();
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

template <class Call>
void with_dtype(DType dtype, Call&& call) {
  switch (dtype) {
    case DType::f32: return call(float{});
    case DType::f64: return call(double{});
    case DType::f16: return call(f16{});
    case DType::bf16: return call(bf16{});
  }
}

void run(const ForwardPass& pass, const Queue& queue) {
  with_dtype(pass.x.dtype, [&](auto element) {
    using T = decltype(element);
    run<T>(pass, kernels<T>().forward, queue);
  });
}

void run(BackwardPass pass, const Queue& queue) {
  // Without an activation u is dy: the residual need not be read.
  if (pass.epilogue.activation == Activation::identity) pass.epilogue.residual = Array();
  pass.n = double(pass.fold.per_statistic());
  with_dtype(pass.x.dtype, [&](auto element) {
    using T = decltype(element);
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

template <class... Parameters, class... Arguments>
void launch_each(int64_t numbers, const Queue& queue, void (*kernel)(Parameters...), const Arguments&... arguments) {
  if (numbers == 0) return;
  const Current current(queue.device);
  Plan plan;
  plan.threads = 128;
  plan.teams = int((numbers + plan.threads - 1) / plan.threads);
  cudaLaunchAttribute none;
  const cudaLaunchConfig_t config = config_of(plan, queue, &none);
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "launching a kernel");
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
  pass.center = true;
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
  const bool after = has_entries(pass.fold);
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
  const int widest = f.is_columns() ? 8 * kPackBytes / int(item_size(dtype)) : 1;
  return entry_bytes(f) + int64_t(kMaxParts) * device(ordinal).sms * widest * kSumsBytes;
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
