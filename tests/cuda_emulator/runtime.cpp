// The host's half of the emulator: devices, launches, memory, streams and graphs, and the C functions of emulator.py.
// Compiled without sanitizers.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"

extern "C" __attribute__((weak)) void __asan_init();

namespace emu {
namespace {

// Devices.

struct Device {
  long sms = 4;
  long threads = 1024, threads_sm = 2048;                           // of a block, of an SM
  long shared = 227 << 10, shared_sm = 228 << 10, reserved = 1024;  // of a block, of an SM; the system's in each block
  long blocks_sm = 32;
  long l2 = 50 << 20;
  long cluster = 8;      // blocks of the largest; 1: the device has no clusters
  long cooperative = 1;  // 0: the device has no cooperative launches
  // 1: such launches fail although attributes and occupancy allow them, as where processes share a device.
  long refuse_clusters = 0, refuse_cooperative = 0;
  long image = 1;  // 0: the kernels were not compiled for it
};

const std::map<std::string, long Device::*> kSettings = {
    {"sms", &Device::sms},
    {"threads", &Device::threads},
    {"threads_sm", &Device::threads_sm},
    {"shared", &Device::shared},
    {"shared_sm", &Device::shared_sm},
    {"reserved", &Device::reserved},
    {"blocks_sm", &Device::blocks_sm},
    {"l2", &Device::l2},
    {"cluster", &Device::cluster},
    {"cooperative", &Device::cooperative},
    {"refuse_clusters", &Device::refuse_clusters},
    {"refuse_cooperative", &Device::refuse_cooperative},
    {"image", &Device::image},
};

// "name=number,name=number;…", one device after another; what is not named is as above.
std::vector<Device> parse(const std::string& text) {
  std::vector<Device> devices(1);
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find_first_of(",;", at), text.size());
    const std::string item = text.substr(at, end - at);
    if (!item.empty()) {
      const size_t equals = item.find('=');
      const auto found = kSettings.find(item.substr(0, equals));
      if (equals == std::string::npos || found == kSettings.end())
        throw std::runtime_error("no setting of an emulated device: " + item);
      devices.back().*found->second = std::stol(item.substr(equals + 1));
    }
    if (end < text.size() && text[end] == ';') devices.emplace_back();
    at = end + 1;
  }
  return devices;
}

std::vector<Device> chosen() {
  if (const char* text = std::getenv("FUSEDNORM_EMU_DEVICES")) return parse(text);
  const std::string toy = "threads=256,threads_sm=256,shared=20480,shared_sm=40960,reserved=0,l2=65536,cluster=4";
  return parse(";" + toy + ";" + toy + ",cluster=1;" + toy + ",cluster=1,cooperative=0;" + toy +
               ",refuse_clusters=1,refuse_cooperative=1");
}

std::vector<Device> devices = chosen();
thread_local int current = 0;
thread_local cudaError_t last = cudaSuccess;

cudaError_t error(cudaError_t e) {
  if (e) last = e;
  return e;
}

// CUDA does not survive a fork.
bool forked() {
  static const pid_t first = getpid();
  return getpid() != first;
}

const Device& device() { return devices[size_t(current)]; }

// Launches.

std::mutex launching, limits;
std::map<std::pair<const void*, int>, long> dynamic_limit;  // that cudaFuncSetAttribute raised

long most_dynamic(const void* kernel) {
  const std::lock_guard lock(limits);
  const auto found = dynamic_limit.find({kernel, current});
  return found == dynamic_limit.end() ? std::min(device().shared, 48l << 10) : found->second;
}

// Blocks that an SM has room for. Static shared memory and registers are not known here.
long resident(long threads, long shared) {
  const Device& d = device();
  if (threads > d.threads || shared > d.shared) return 0;
  const long by_shared = shared + d.reserved ? d.shared_sm / (shared + d.reserved) : d.blocks_sm;
  return std::min({d.blocks_sm, d.threads_sm / ((threads + 31) / 32 * 32), by_shared});
}

long count(dim3 d) { return long(d.x) * long(d.y) * long(d.z); }

Launch read(const cudaLaunchConfig_t& c) {
  Launch l{c.gridDim, c.blockDim, dim3(1), c.dynamicSmemBytes, c.stream, false};
  for (unsigned i = 0; i < c.numAttrs; ++i) {
    const cudaLaunchAttribute& a = c.attrs[i];
    if (a.id == cudaLaunchAttributeCooperative) l.cooperative = a.val.cooperative;
    if (a.id == cudaLaunchAttributeClusterDimension)
      l.cluster = dim3(a.val.clusterDim.x, a.val.clusterDim.y, a.val.clusterDim.z);
  }
  return l;
}

std::mutex streaming;
std::map<void*, int> streams;  // and their devices; besides the null stream

bool usable(void* stream) {
  const std::lock_guard lock(streaming);
  const auto found = streams.find(stream);
  return uintptr_t(stream) <= 2 || (found != streams.end() && found->second == current);
}

cudaError_t check(const Launch& l, const void* kernel) {
  const Device& d = device();
  const long threads = count(l.block), blocks = count(l.grid);
  if (forked()) return cudaErrorInitializationError;
  if (!d.image) return cudaErrorNoKernelImageForDevice;
  if (!usable(l.stream)) return cudaErrorInvalidResourceHandle;
  if (blocks == 0 || l.grid.x > 0x7fffffff || l.grid.y > 65535 || l.grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (threads == 0 || threads > d.threads || l.block.z > 64) return cudaErrorInvalidConfiguration;
  if (long(l.shared) > most_dynamic(kernel)) return cudaErrorInvalidValue;
  if (l.cluster.x == 0 || l.cluster.y != 1 || l.cluster.z != 1) return cudaErrorInvalidConfiguration;
  const long at_once = resident(threads, long(l.shared)) * d.sms;
  if (l.cluster.x > 1) {
    if (d.cluster == 1) return cudaErrorNotSupported;
    if (l.cluster.x > d.cluster) return cudaErrorInvalidClusterSize;
    if (l.grid.x % l.cluster.x) return cudaErrorInvalidConfiguration;
    if (d.refuse_clusters || at_once < l.cluster.x) return cudaErrorLaunchOutOfResources;
  }
  if (at_once == 0) return cudaErrorLaunchOutOfResources;
  if (l.cooperative) {
    if (!d.cooperative) return cudaErrorNotSupported;
    if (d.refuse_cooperative || blocks > at_once / l.cluster.x * l.cluster.x) return cudaErrorCooperativeLaunchTooLarge;
  }
  return cudaSuccess;
}

// As emulator.py reads it.
struct Record {
  int device, cooperative;
  unsigned grid[3], block[3], cluster;
  size_t shared;
  void* stream;
};
std::vector<Record> launched;

// Memory. The host may touch it only while a kernel or a copy runs, so that a verb that reads it on the host ends there
// and then. Each allocation ends where an unmapped page begins, and what is freed is unmapped. With AddressSanitizer it
// is the heap's.

struct Pages {
  char* from;
  size_t size;
};
std::map<void*, Pages> memory;
std::mutex remembering;
int opened = 0;

void open(int change) {
  const std::lock_guard lock(remembering);
  const bool before = opened > 0;
  opened += change;
  if (before != (opened > 0))
    for (const auto& [data, pages] : memory)
      mprotect(pages.from, pages.size, opened ? PROT_READ | PROT_WRITE : PROT_NONE);
}
struct Open {
  Open() { open(1); }
  ~Open() { open(-1); }
};

// Graphs.

using Step = std::function<void()>;
using Graph = std::vector<Step>;
std::map<void*, std::unique_ptr<Graph>> recording;  // by stream

bool captured(void* stream) {
  const std::lock_guard lock(streaming);
  return recording.count(stream);
}
void enqueue(void* stream, Step step) {
  {
    const std::lock_guard lock(streaming);
    if (const auto found = recording.find(stream); found != recording.end())
      return found->second->push_back(std::move(step));
  }
  step();
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> thread) {
  const Launch l = read(config);
  if (const cudaError_t e = check(l, kernel)) return error(e);
  enqueue(l.stream, [l, thread = std::move(thread), device = current] {
    const std::lock_guard lock(launching);
    const Open open;
    launched.push_back({device,
                        l.cooperative,
                        {l.grid.x, l.grid.y, l.grid.z},
                        {l.block.x, l.block.y, l.block.z},
                        l.cluster.x,
                        l.shared,
                        l.stream});
    const std::string wrong = run(l, thread);
    if (!wrong.empty()) throw std::runtime_error("CUDA emulator: " + wrong);
  });
  return cudaSuccess;
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (!device().image) return error(cudaErrorNoKernelImageForDevice);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > device().shared) return error(cudaErrorInvalidValue);
  const std::lock_guard lock(limits);
  dynamic_limit[{kernel, current}] = value;
  return cudaSuccess;
}

cudaError_t get_attributes(cudaFuncAttributes* to, const void* kernel) {
  const int version = device().cluster > 1 ? 90 : 80;
  *to = {0, 0, 0, int(device().threads), 32, version, version, 0, int(most_dynamic(kernel))};
  return cudaSuccess;
}

cudaError_t blocks_per_sm(int* to, const void*, int threads, size_t shared) {
  if (threads <= 0) return error(cudaErrorInvalidValue);
  *to = int(resident(threads, long(shared)));
  return cudaSuccess;
}

cudaError_t clusters(int* to, const void*, const cudaLaunchConfig_t* config) {
  const Launch l = read(*config);
  if (device().cluster == 1) return error(cudaErrorNotSupported);
  if (l.cluster.x == 0 || l.cluster.x > device().cluster) return error(cudaErrorInvalidClusterSize);
  *to = int(resident(count(l.block), long(l.shared)) * device().sms / l.cluster.x);
  return cudaSuccess;
}

cudaError_t largest_cluster(int* to, const void*, const cudaLaunchConfig_t*) {
  *to = int(device().cluster);
  return cudaSuccess;
}

}  // namespace emu

using namespace emu;

cudaError_t cudaGetLastError() { return std::exchange(last, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last; }
const char* cudaGetErrorName(cudaError_t e) {
  switch (e) {
#define NAME(name) \
  case name: return #name
    NAME(cudaSuccess);
    NAME(cudaErrorInvalidValue);
    NAME(cudaErrorMemoryAllocation);
    NAME(cudaErrorInitializationError);
    NAME(cudaErrorInvalidConfiguration);
    NAME(cudaErrorInsufficientDriver);
    NAME(cudaErrorNoDevice);
    NAME(cudaErrorInvalidDevice);
    NAME(cudaErrorNoKernelImageForDevice);
    NAME(cudaErrorInvalidResourceHandle);
    NAME(cudaErrorLaunchOutOfResources);
    NAME(cudaErrorCooperativeLaunchTooLarge);
    NAME(cudaErrorNotSupported);
    NAME(cudaErrorStreamCaptureUnsupported);
    NAME(cudaErrorInvalidClusterSize);
#undef NAME
  }
  return "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t e) { return cudaGetErrorName(e); }

cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* n) {
  *n = int(devices.size());
  return forked() ? error(cudaErrorInitializationError) : cudaSuccess;
}
cudaError_t cudaGetDevice(int* to) {
  *to = current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int to) {
  if (forked()) return error(cudaErrorInitializationError);
  if (to < 0 || size_t(to) >= devices.size()) return error(cudaErrorInvalidDevice);
  current = to;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int of) {
  if (of < 0 || size_t(of) >= devices.size()) return error(cudaErrorInvalidDevice);
  const Device& d = devices[size_t(of)];
  const auto look = [&]() -> long {
    switch (attribute) {
      case cudaDevAttrMaxThreadsPerBlock: return d.threads;
      case cudaDevAttrMaxSharedMemoryPerBlock: return std::min(d.shared, 48l << 10);
      case cudaDevAttrWarpSize: return 32;
      case cudaDevAttrMaxRegistersPerBlock:
      case cudaDevAttrMaxRegistersPerMultiprocessor: return std::min(65536l, 64 * d.threads_sm);
      case cudaDevAttrMultiProcessorCount: return d.sms;
      case cudaDevAttrL2CacheSize: return d.l2;
      case cudaDevAttrMaxThreadsPerMultiProcessor: return d.threads_sm;
      case cudaDevAttrComputeCapabilityMajor: return d.cluster > 1 ? 9 : 8;
      case cudaDevAttrComputeCapabilityMinor: return 0;
      case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return d.shared_sm;
      case cudaDevAttrCooperativeLaunch: return d.cooperative;
      case cudaDevAttrMaxSharedMemoryPerBlockOptin: return d.shared;
      case cudaDevAttrMaxBlocksPerMultiprocessor: return d.blocks_sm;
      case cudaDevAttrReservedSharedMemoryPerBlock: return d.reserved;
      case cudaDevAttrClusterLaunch: return d.cluster > 1;
    }
    return -1;
  };
  *value = int(look());
  return *value < 0 ? error(cudaErrorInvalidValue) : cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t stream) {
  if (!usable(stream)) return error(cudaErrorInvalidResourceHandle);
  enqueue(stream, [=] {
    const Open open;
    std::memcpy(to, from, n);
  });
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t n, cudaStream_t stream) {
  if (!usable(stream)) return error(cudaErrorInvalidResourceHandle);
  enqueue(stream, [=] {
    const Open open;
    std::memset(to, value, n);
  });
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (captured(stream)) return error(cudaErrorStreamCaptureUnsupported);
  return usable(stream) ? cudaSuccess : error(cudaErrorInvalidResourceHandle);
}
cudaError_t cudaDeviceSynchronize() {
  const std::lock_guard lock(streaming);
  return recording.empty() ? cudaSuccess : error(cudaErrorStreamCaptureUnsupported);
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = captured(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

// For emulator.py.

#define EXPORT __attribute__((visibility("default")))
extern "C" {
EXPORT void fn_emu_seed(unsigned long to) { seed = to; }
EXPORT int fn_emu_devices(const char* text) {
  try {
    devices = parse(text);
    dynamic_limit.clear();
  } catch (const std::exception&) {
    return -1;
  }
  return int(devices.size());
}
EXPORT int fn_emu_device_count() { return int(devices.size()); }
EXPORT int fn_emu_get_device() { return current; }
EXPORT int fn_emu_set_device(int to) { return cudaSetDevice(to); }

// The number of launches since the last call; the first `most` of them.
EXPORT size_t fn_emu_launches(Record* to, size_t most) {
  const std::lock_guard lock(launching);
  const size_t n = launched.size();
  std::copy_n(launched.begin(), std::min(n, most), to);
  launched.clear();
  return n;
}

EXPORT void* fn_emu_allocate(size_t n) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE)), size = (n + page) / page * page;
  void* data = nullptr;
  if (__asan_init) {
    if (posix_memalign(&data, 16, n + !n)) return nullptr;
    return std::memset(data, 0xff, n);
  }
  auto* pages =
      static_cast<char*>(mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (pages == MAP_FAILED) return nullptr;
  mprotect(pages + size, page, PROT_NONE);
  data = pages + size - (n + 15) / 16 * 16;
  std::memset(data, 0xff, n);
  const std::lock_guard lock(remembering);
  memory[data] = {pages, size};
  if (!opened) mprotect(pages, size, PROT_NONE);
  return data;
}
EXPORT void fn_emu_free(void* data) {
  if (__asan_init) return std::free(data);
  const std::lock_guard lock(remembering);
  const auto found = memory.find(data);
  munmap(found->second.from, found->second.size + size_t(sysconf(_SC_PAGESIZE)));
  memory.erase(found);
}
EXPORT void fn_emu_open(int change) { emu::open(change); }

EXPORT void* fn_emu_stream(int of) {
  const std::lock_guard lock(streaming);
  void* stream = reinterpret_cast<void*>(0x100 + 0x10 * streams.size());
  streams[stream] = of;
  return stream;
}
EXPORT void fn_emu_begin_capture(void* stream) {
  const std::lock_guard lock(streaming);
  recording[stream] = std::make_unique<Graph>();
}
EXPORT int fn_emu_capturing(void* stream) { return captured(stream); }
EXPORT void* fn_emu_end_capture(void* stream) {
  const std::lock_guard lock(streaming);
  Graph* graph = recording.at(stream).release();
  recording.erase(stream);
  return graph;
}
EXPORT void fn_emu_record(void* stream, void (*step)()) { enqueue(stream, step); }
// What went wrong, or null.
EXPORT const char* fn_emu_replay(const Graph* graph) {
  static std::string wrong;
  try {
    for (const Step& step : *graph) step();
  } catch (const std::exception& e) {
    wrong = e.what();
    return wrong.c_str();
  }
  return nullptr;
}
}
