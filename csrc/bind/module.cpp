// The one door between Python and the verbs: arrays become core::Array, one m.def per verb, the GIL released while a
// verb runs. Everything a verb indexes with is checked here, in the words Python users see; nothing is computed here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bind/xla.h"
#include "core/cuda.h"
#include "cpu/host.h"
#include "cpu/isa.h"
#include "cpu/levels.h"
#include "cpu/pool.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace py = pybind11;

namespace fusednorm {
namespace {

[[noreturn]] void type_error(const std::string& message) { throw py::type_error(message); }

// Null where the type is none of ours; bfloat16 is ml_dtypes', kind 'V', char 'E'.
std::optional<DType> dtype_of(const py::dtype& d) {
  if (d.byteorder() == '>') return std::nullopt;
  switch (d.num()) {
    case py::detail::npy_api::NPY_FLOAT_: return DType::f32;
    case py::detail::npy_api::NPY_DOUBLE_: return DType::f64;
    case 23: return DType::f16;  // NPY_HALF, which pybind11 does not name
  }
  if (d.char_() == 'E' && d.itemsize() == 2) return DType::bf16;
  return std::nullopt;
}
std::string shown(py::handle h) { return py::str(h); }

// An array as this file sees it. One of a GPU is seen as a NumPy array over the GPU's addresses: shape, strides and type
// are looked at, elements never.
struct View : py::array {
  int device = kCpu;

  View() = default;
  View(py::array a, int on) : py::array(std::move(a)), device(on) {}
};

std::string shown_device(int device) { return device == kCpu ? "cpu" : "cuda:" + std::to_string(device); }

// CuPy's `data`, with the address and the device, or None: it costs less than the dictionary that every array of a GPU
// offers.
py::object device_data(py::handle h) {
  if (!py::hasattr(py::type::of(h), "__cuda_array_interface__") || !py::hasattr(h, "data")) return py::none();
  py::object data = h.attr("data");
  return py::hasattr(data, "ptr") ? data : py::none();
}

View view_of(py::handle h, const char* name) {
  const auto type = reinterpret_cast<PyObject*>(Py_TYPE(h.ptr()));
  // A masked array is an ndarray, but its mask would be ignored.
  if (type == reinterpret_cast<PyObject*>(py::detail::npy_api::get().PyArray_Type_) ||
      (py::isinstance<py::array>(h) && !py::hasattr(h, "_mask")))
    return {py::reinterpret_borrow<py::array>(h), kCpu};
  const py::object data = device_data(h);
  if (data.is_none())
    type_error(std::string(name) + " must be a NumPy or CuPy array, not " + shown(py::handle(type).attr("__name__")));
  if (!cuda::backend())
    type_error(std::string(name) + " is an array of a GPU, and in this fusednorm CUDA is " + cuda::state());
  const auto shape = h.attr("shape").cast<std::vector<py::ssize_t>>();
  const auto strides = h.attr("strides").cast<std::vector<py::ssize_t>>();
  const auto pointer = reinterpret_cast<void*>(data.attr("ptr").cast<uintptr_t>());
  return {py::array(py::reinterpret_borrow<py::dtype>(h.attr("dtype")), shape, strides, pointer, h),
          data.attr("device_id").cast<int>()};
}

// The addresses from an array's lowest byte to its highest: what costs little to compare, and mostly is enough to tell
// that two arrays share no memory. Columns of one array interleave, though.
struct Extent {
  uintptr_t begin = 0, end = 0;

  Extent() = default;
  explicit Extent(const py::array& a) {
    if (a.size() == 0) return;
    begin = reinterpret_cast<uintptr_t>(a.data());
    end = begin + uintptr_t(a.itemsize());
    for (py::ssize_t i = 0; i < a.ndim(); ++i) (a.strides(i) < 0 ? begin : end) += (a.shape(i) - 1) * a.strides(i);
  }
  bool meets(const Extent& other) const { return begin < other.end && other.begin < end; }
};

void expect_size(const char* name, int64_t expected, int64_t actual) {
  if (expected != actual)
    throw py::value_error(std::string(name) + " should contain " + std::to_string(expected) + " elements not " +
                          std::to_string(actual));
}

void expect_device(const char* name, int device, const Array& x) {
  if (device != x.device)
    type_error(std::string(name) + " is on " + shown_device(device) + ", x on " + shown_device(x.device));
}

// A tensor: its elements fill size·itemsize bytes from its pointer on, in any axis order. What is given beside an x has
// its dtype and lies on its device.
Array tensor(py::handle h, const char* name, int64_t size, bool written, const Array* x = nullptr) {
  if (h.is_none()) return {};
  const View a = view_of(h, name);
  const auto dtype = dtype_of(a.dtype());
  if (!dtype || (x && *dtype != x->dtype))
    type_error(std::string(name) + " has dtype " + shown(a.dtype()) +
               (x ? ", x has another" : "; float32, float64, float16 and bfloat16 are taken"));
  if (x) expect_device(name, a.device, *x);
  expect_size(name, size, a.size());
  int64_t last = 0;
  for (py::ssize_t i = 0; i < a.ndim(); ++i) {
    if (a.shape(i) == 1) continue;  // its stride means nothing
    if (a.strides(i) < 0) throw py::value_error(std::string(name) + " must be dense");
    last += (a.shape(i) - 1) * a.strides(i);
  }
  if (size > 0 && last != (size - 1) * a.itemsize()) throw py::value_error(std::string(name) + " must be dense");
  const void* data = a.data();
  if (reinterpret_cast<uintptr_t>(data) % uintptr_t(a.itemsize()))
    throw py::value_error(std::string(name) + " must be aligned");
  if (written && !a.writeable()) throw py::value_error(std::string(name) + " is read-only");
  return {const_cast<void*>(data), *dtype, a.device};
}

// A parameter or statistic: one number a channel, on x's device. Strided or byte-swapped ones travel through a copy, and
// back if written.
class Vector {
 public:
  Vector(py::handle h, const char* name, int64_t size, const Array& x, bool written = false) {
    if (h.is_none()) return;
    view_ = view_of(h, name);
    expect_device(name, view_.device, x);
    expect_size(name, size, view_.size());
    if (view_.ndim() != 1)
      throw py::value_error(std::string(name) + " must have one axis, not " + std::to_string(view_.ndim()));
    if (written && !view_.writeable()) throw py::value_error(std::string(name) + " is read-only");
    if (written && size > 1 && std::abs(view_.strides(0)) < view_.itemsize())
      throw py::value_error(std::string(name) + " overlaps itself: its stride is " + std::to_string(view_.strides(0)) +
                            " bytes");
    View used = view_;
    const bool plain = used.flags() & py::array::c_style && used.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_;
    if (!plain || used.dtype().byteorder() == '>') {
      given_ = py::reinterpret_borrow<py::object>(h);
      copy_ = given_.attr("astype")(used.dtype().attr("newbyteorder")("="), py::arg("order") = "C");
      used = view_of(copy_, name);
    }
    const auto dtype = dtype_of(used.dtype());
    if (!dtype)
      type_error(std::string(name) + " has dtype " + shown(used.dtype()) +
                 "; float32, float64, float16 and bfloat16 are taken");
    array_ = {const_cast<void*>(used.data()), *dtype, used.device};
  }
  const Array& array() const { return array_; }
  void write_back() const {
    if (copy_) given_.attr("__setitem__")(py::ellipsis(), copy_);
  }
  bool shares_memory(const Vector& other) const {
    return array_ && other.array_ && Extent(view_).meets(Extent(other.view_)) &&
           py::module_::import("numpy").attr("shares_memory")(view_, other.view_).cast<bool>();
  }

 private:
  View view_;
  py::object given_, copy_;  // where the array itself cannot be used
  Array array_;
};

// The mean need not be there: it is taken as 0 then (RMS norm).
double* statistics(py::handle h, const char* name, int64_t size, bool written, const Array& x, bool needed = true) {
  if (h.is_none() && needed) throw py::value_error(std::string(name) + " must be given");
  if (h.is_none()) return nullptr;
  const Array a = tensor(h, name, size, written);
  if (a.dtype != DType::f64) type_error(std::string(name) + " must be float64");
  expect_device(name, a.device, x);
  return a.as<double>();
}
void expect(bool condition, const char* message) {
  if (!condition) throw py::value_error(message);
}

// What is written must be nothing else that the call takes.
void expect_apart(const Vector& written, const char* name, const Vector& other, const char* other_name) {
  if (written.shares_memory(other))
    throw py::value_error(std::string(name) + " and " + other_name + " share memory, and training writes " + name +
                          "; give each its own array, such as a copy");
}

// One byte for each position.
const uint8_t* mask_of(py::handle h, const Fold& f, const Array& x) {
  if (h.is_none()) return nullptr;
  const View a = view_of(h, "mask");
  if (a.dtype().kind() != 'b') type_error("mask must be boolean, not " + shown(a.dtype()));
  expect_device("mask", a.device, x);
  expect_size("mask", f.batch * f.outer * f.span, a.size());
  if (!(a.flags() & py::array::c_style)) throw py::value_error("mask must be dense");
  return static_cast<const uint8_t*>(a.data());
}

EpilogueArgs epilogue(int activation, double slope, const Array& residual) {
  expect(activation >= 0 && activation <= int(Activation::tanh), "unknown activation");
  return {Activation(activation), slope, residual};
}

// The folds whose loops exist.
void expect_loops(const Fold& f) {
  expect(f.span == 0 || f.inner % f.span == 0, "no kernel takes a fold whose statistics share a channel");
}

// The backend of x's device, and what its verbs need besides their arguments: `stream`, a cudaStream_t, and `scratch`,
// as many bytes as scratch_bytes says. The CPU needs neither.
const Backend& backend_of(const Array& x) { return x.device == kCpu ? cpu::backend() : *cuda::backend(); }
int64_t scratch_bytes(const Fold& f, const Array& x) {
  const Backend& backend = backend_of(x);
  return backend.scratch ? backend.scratch(f, x.dtype, x.device) : 0;
}
Queue queue_of(const Array& x, const Fold& f, uintptr_t stream, py::handle scratch) {
  Queue queue{x.device, reinterpret_cast<void*>(stream), nullptr};
  const int64_t needed = scratch_bytes(f, x);
  if (needed == 0) return queue;
  if (scratch.is_none()) throw py::value_error("this call needs scratch of " + std::to_string(needed) + " bytes");
  const View a = view_of(scratch, "scratch");
  expect_device("scratch", a.device, x);
  if (a.nbytes() < needed || !(a.flags() & py::array::c_style) || reinterpret_cast<uintptr_t>(a.data()) % 16)
    throw py::value_error("scratch must be dense, aligned and of " + std::to_string(needed) + " bytes");
  queue.scratch = const_cast<void*>(a.data());
  return queue;
}

template <class Verb, class Args>
void call(const Array& x, Verb Backend::* verb, const Args& args) {
  const Backend& backend = backend_of(x);
  py::gil_scoped_release released;
  (backend.*verb)(args);
}

void moments(const Fold& f, py::handle x, py::handle mask, bool center, py::handle count, py::handle mean,
             py::handle m2, uintptr_t stream, py::handle scratch) {
  const Array in = tensor(x, "x", f.size(), false);
  expect_loops(f);
  const int64_t s = f.statistics();
  call(in, &Backend::moments,
       MomentsArgs{f, in, mask_of(mask, f, in), center, statistics(count, "count", s, true, in),
                   statistics(mean, "mean", s, true, in), statistics(m2, "m2", s, true, in),
                   queue_of(in, f, stream, scratch)});
}

void merge(int64_t before, int64_t axis, int64_t after, py::handle count, py::handle mean, py::handle m2,
           py::handle merged_count, py::handle merged_mean, py::handle merged_m2, uintptr_t stream) {
  expect(before >= 0 && axis >= 0 && after >= 0, "sizes must not be negative");
  const int64_t from = before * axis * after, to = before * after;
  const Array in = tensor(count, "count", from, false);
  call(in, &Backend::merge,
       MergeArgs{before, axis, after, statistics(count, "count", from, false, in),
                 statistics(mean, "mean", from, false, in), statistics(m2, "m2", from, false, in),
                 statistics(merged_count, "merged_count", to, true, in),
                 statistics(merged_mean, "merged_mean", to, true, in), statistics(merged_m2, "merged_m2", to, true, in),
                 Queue{in.device, reinterpret_cast<void*>(stream)}});
}

void normalize(const Fold& f, py::handle x, py::handle mean, py::handle rstd, py::handle weight, py::handle bias,
               py::handle residual, int activation, double slope, py::handle y, uintptr_t stream, py::handle scratch) {
  const Array in = tensor(x, "x", f.size(), false);
  expect_loops(f);
  const Vector w(weight, "weight", f.channels(), in), b(bias, "bias", f.channels(), in);
  const int64_t s = f.statistics();
  call(in, &Backend::normalize,
       NormalizeArgs{f, in, statistics(mean, "mean", s, false, in, false), statistics(rstd, "rstd", s, false, in),
                     w.array(), b.array(),
                     epilogue(activation, slope, tensor(residual, "residual", f.size(), false, &in)),
                     tensor(y, "out", f.size(), true, &in), queue_of(in, f, stream, scratch)});
}

void forward(const Fold& f, py::handle x, py::handle weight, py::handle bias, py::handle running_mean,
             py::handle running_var, py::handle residual, py::handle mask, py::handle y, py::handle mean,
             py::handle rstd, bool training, double momentum, int64_t counted, bool averaged, int correction,
             double eps, int activation, double slope, uintptr_t stream, py::handle scratch) {
  const Array in = tensor(x, "x", f.size(), false);
  expect_loops(f);
  const int64_t c = f.channels(), s = f.statistics();
  expect(c == f.groups || running_mean.is_none(), "running statistics go with one channel per group");
  const Vector rm(running_mean, "running_mean", c, in, training), rv(running_var, "running_var", c, in, training);
  const Vector w(weight, "weight", c, in), b(bias, "bias", c, in);
  expect(bool(rm.array()) == bool(rv.array()), "running_mean and running_var go together");
  expect(training || rm.array(), "running statistics are missing in evaluation");
  expect(correction == 0 || correction == 1, "correction must be 0 or 1");
  expect(!training || f.size() == 0 || !rm.array() || f.per_statistic() > 1,
         "Expected more than 1 value per channel when training");
  if (training) {
    expect_apart(rm, "running_mean", rv, "running_var");
    expect_apart(rm, "running_mean", w, "weight");
    expect_apart(rm, "running_mean", b, "bias");
    expect_apart(rv, "running_var", w, "weight");
    expect_apart(rv, "running_var", b, "bias");
  }
  double *m = statistics(mean, "mean", s, true, in, false), *r = statistics(rstd, "rstd", s, true, in);
  call(
      in, &Backend::forward,
      ForwardArgs{f, in, w.array(), b.array(),
                  epilogue(activation, slope, tensor(residual, "residual", f.size(), false, &in)), mask_of(mask, f, in),
                  eps, training, RunningArgs{rm.array(), rv.array(), momentum, counted, averaged, double(correction)},
                  m, r, tensor(y, "out", f.size(), true, &in), queue_of(in, f, stream, scratch)});
  if (training) {
    rm.write_back();
    rv.write_back();
  }
}

void backward(const Fold& f, py::handle dy, py::handle x, py::handle mean, py::handle rstd, py::handle weight,
              py::handle bias, py::handle residual, py::handle mask, bool constant, int activation, double slope,
              py::handle dx, py::handle dresidual, py::handle dweight, py::handle dbias, uintptr_t stream,
              py::handle scratch) {
  const Array in = tensor(x, "x", f.size(), false);
  expect_loops(f);
  const int64_t c = f.channels(), s = f.statistics();
  const Vector w(weight, "weight", c, in), b(bias, "bias", c, in), dw(dweight, "dweight", c, in, true),
      db(dbias, "dbias", c, in, true);
  const double *m = statistics(mean, "mean", s, false, in, false), *r = statistics(rstd, "rstd", s, false, in);
  expect(dw.array() && db.array(), "dweight and dbias must be given");
  call(in, &Backend::backward,
       BackwardArgs{f, tensor(dy, "dy", f.size(), false, &in), in, m, r, w.array(), b.array(),
                    epilogue(activation, slope, tensor(residual, "residual", f.size(), false, &in)),
                    mask_of(mask, f, in), constant, tensor(dx, "out", f.size(), true, &in),
                    tensor(dresidual, "dresidual", f.size(), true, &in), dw.array(), db.array(),
                    queue_of(in, f, stream, scratch)});
  dw.write_back();
  db.write_back();
}

void grad_sums(const Fold& f, py::handle dy, py::handle x, py::handle mean, py::handle rstd, py::handle weight,
               py::handle bias, py::handle residual, int activation, double slope, py::handle s1, py::handle s2,
               py::handle dweight, py::handle dbias, uintptr_t stream, py::handle scratch) {
  const Array in = tensor(x, "x", f.size(), false);
  expect_loops(f);
  const int64_t c = f.channels(), s = f.statistics();
  const Vector w(weight, "weight", c, in), b(bias, "bias", c, in), dw(dweight, "dweight", c, in, true),
      db(dbias, "dbias", c, in, true);
  call(in, &Backend::grad_sums,
       GradSumsArgs{f, tensor(dy, "dy", f.size(), false, &in), in, statistics(mean, "mean", s, false, in, false),
                    statistics(rstd, "rstd", s, false, in), w.array(), b.array(),
                    epilogue(activation, slope, tensor(residual, "residual", f.size(), false, &in)),
                    statistics(s1, "s1", s, true, in), statistics(s2, "s2", s, true, in), dw.array(), db.array(),
                    queue_of(in, f, stream, scratch)});
  dw.write_back();
  db.write_back();
}

void grad_input(const Fold& f, py::handle dy, py::handle x, py::handle mean, py::handle rstd, py::handle weight,
                py::handle bias, py::handle residual, int activation, double slope, py::handle cx, py::handle c0,
                py::handle mask, py::handle dx, py::handle dresidual, uintptr_t stream, py::handle scratch) {
  const Array in = tensor(x, "x", f.size(), false);
  expect_loops(f);
  const int64_t c = f.channels(), s = f.statistics();
  const Vector w(weight, "weight", c, in), b(bias, "bias", c, in);
  call(in, &Backend::grad_input,
       GradInputArgs{f, tensor(dy, "dy", f.size(), false, &in), in, statistics(mean, "mean", s, false, in, false),
                     statistics(rstd, "rstd", s, false, in), w.array(), b.array(),
                     epilogue(activation, slope, tensor(residual, "residual", f.size(), false, &in)),
                     statistics(cx, "cx", s, false, in, false), statistics(c0, "c0", s, false, in, false),
                     mask_of(mask, f, in), tensor(dx, "out", f.size(), true, &in),
                     tensor(dresidual, "dresidual", f.size(), true, &in), queue_of(in, f, stream, scratch)});
}

void copy(py::handle to, py::handle from, uintptr_t stream) {
  const View target = view_of(to, "to"), source = view_of(from, "from");
  const Array x = tensor(from, "from", source.size(), false), y = tensor(to, "to", target.size(), true);
  expect_device("to", y.device, x);
  expect(target.nbytes() == source.nbytes(), "copy needs arrays of as many bytes");
  call(x, &Backend::copy, CopyArgs{y.data, x.data, target.nbytes(), {x.device, reinterpret_cast<void*>(stream)}});
}

// Whether the extent of `out` meets none of the others' (None: not given). What is no array is told by whoever reads it.
bool apart(py::handle out, const py::tuple& others) {
  const auto extent = [](py::handle h) {
    if (py::isinstance<py::array>(h)) return Extent(py::reinterpret_borrow<py::array>(h));
    return cuda::backend() && !device_data(h).is_none() ? Extent(view_of(h, "array")) : Extent();
  };
  const Extent written = extent(out);
  for (py::handle h : others)
    if (written.meets(extent(h))) return false;
  return true;
}

// Memory of the output pool as a Python buffer; it goes back when the last array on it is gone.
class PoolMemory {
 public:
  explicit PoolMemory(size_t bytes) : block_(cpu::pool_take(bytes)), bytes_(bytes) {}
  ~PoolMemory() { cpu::pool_give(block_); }
  PoolMemory(const PoolMemory&) = delete;
  PoolMemory& operator=(const PoolMemory&) = delete;
  py::buffer_info buffer() const {
    return py::buffer_info(block_.data, 1, py::format_descriptor<uint8_t>::format(), 1, {py::ssize_t(bytes_)}, {1});
  }

 private:
  cpu::Block block_;
  size_t bytes_;
};

py::dict build_info() {
  py::list built, runnable;
  for (const cpu::Level& level : cpu::levels()) {
    built.append(level.backend->name);
    if (level.runs_here) runnable.append(level.backend->name);
  }
  py::dict info;
  info["version"] = FUSEDNORM_VERSION;
  info["compiler"] = FUSEDNORM_COMPILER;
  info["isa_built"] = built;
  info["isa_runnable"] = runnable;
  info["isa"] = cpu::backend().name;
  info["isa_best"] = cpu::best_level();
#if defined(_OPENMP)
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = py::none();
#endif
  info["threads"] = cpu::threads();
  info["cuda"] = cuda::state();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Verbs over Folds. The public functions of fusednorm are built on these.";

  py::class_<Fold>(m, "Fold", "Which elements share a statistic and which a parameter; see fusednorm.fold.")
      .def(py::init([](int64_t batch, int64_t outer, int64_t groups, int64_t inner, int64_t span) {
             expect(batch >= 0 && outer >= 0 && groups >= 0 && inner >= 0 && span >= 0, "sizes must not be negative");
             expect(span == 0 ? inner == 0 : groups * inner % span == 0, "span must divide groups·inner");
             return Fold{batch, outer, groups, inner, span};
           }),
           py::arg("batch"), py::arg("outer"), py::arg("groups"), py::arg("inner"), py::arg("span"))
      .def_readonly("batch", &Fold::batch)
      .def_readonly("outer", &Fold::outer)
      .def_readonly("groups", &Fold::groups)
      .def_readonly("inner", &Fold::inner)
      .def_readonly("span", &Fold::span)
      .def_property_readonly("size", [](const Fold& f) { return f.size(); })
      .def_property_readonly("statistics", [](const Fold& f) { return f.statistics(); })
      .def_property_readonly("per_statistic", [](const Fold& f) { return f.per_statistic(); })
      .def_property_readonly("channels", [](const Fold& f) { return f.channels(); })
      .def("__repr__", [](const Fold& f) {
        return "Fold(batch=" + std::to_string(f.batch) + ", outer=" + std::to_string(f.outer) +
               ", groups=" + std::to_string(f.groups) + ", inner=" + std::to_string(f.inner) +
               ", span=" + std::to_string(f.span) + ")";
      });

  py::class_<PoolMemory>(m, "PoolMemory", py::buffer_protocol(), "Memory of the output pool.")
      .def(py::init<size_t>(), py::arg("bytes"))
      .def_buffer(&PoolMemory::buffer);
  m.attr("POOL_BYTES") = cpu::kPoolBytes;

  using py::arg;
  m.def("moments", &moments, arg("fold"), arg("x"), arg("mask"), arg("center"), arg("count"), arg("mean"), arg("m2"),
        arg("stream") = 0, arg("scratch") = py::none());
  m.def("merge", &merge, arg("before"), arg("axis"), arg("after"), arg("count"), arg("mean"), arg("m2"),
        arg("merged_count"), arg("merged_mean"), arg("merged_m2"), arg("stream") = 0);
  m.def("normalize", &normalize, arg("fold"), arg("x"), arg("mean"), arg("rstd"), arg("weight"), arg("bias"),
        arg("residual"), arg("activation"), arg("slope"), arg("y"), arg("stream") = 0, arg("scratch") = py::none());
  m.def("forward", &forward, arg("fold"), arg("x"), arg("weight"), arg("bias"), arg("running_mean"), arg("running_var"),
        arg("residual"), arg("mask"), arg("y"), arg("mean"), arg("rstd"), arg("training"), arg("momentum"),
        arg("counted"), arg("averaged"), arg("correction"), arg("eps"), arg("activation"), arg("slope"),
        arg("stream") = 0, arg("scratch") = py::none());
  m.def("backward", &backward, arg("fold"), arg("dy"), arg("x"), arg("mean"), arg("rstd"), arg("weight"), arg("bias"),
        arg("residual"), arg("mask"), arg("constant"), arg("activation"), arg("slope"), arg("dx"), arg("dresidual"),
        arg("dweight"), arg("dbias"), arg("stream") = 0, arg("scratch") = py::none());
  m.def("grad_sums", &grad_sums, arg("fold"), arg("dy"), arg("x"), arg("mean"), arg("rstd"), arg("weight"), arg("bias"),
        arg("residual"), arg("activation"), arg("slope"), arg("s1"), arg("s2"), arg("dweight"), arg("dbias"),
        arg("stream") = 0, arg("scratch") = py::none());
  m.def("grad_input", &grad_input, arg("fold"), arg("dy"), arg("x"), arg("mean"), arg("rstd"), arg("weight"),
        arg("bias"), arg("residual"), arg("activation"), arg("slope"), arg("cx"), arg("c0"), arg("mask"), arg("dx"),
        arg("dresidual"), arg("stream") = 0, arg("scratch") = py::none());

  m.def("copy", &copy, arg("to"), arg("from"), arg("stream") = 0);
  m.def(
      "scratch_bytes",
      [](const Fold& f, py::handle x) {  // x may be a larger tensor than the fold's
        const Array all = tensor(x, "x", view_of(x, "x").size(), false);
        return scratch_bytes(f, all);
      },
      arg("fold"), arg("x"));
  m.def("cuda_built", [] { return cuda::backend() != nullptr; });
  m.def("cuda_devices", &cuda::devices);
  m.def("capturing", [](uintptr_t stream) { return cuda::capturing(reinterpret_cast<void*>(stream)); }, arg("stream"));
  m.def("apart", &apart, arg("out"), arg("others"));
  m.def("xla_handlers", &xla_handlers);

  m.def("build_info", &build_info);
  m.def("select_isa", &cpu::select, arg("name"));
  m.def("set_num_threads", &cpu::set_threads, arg("n"));
  m.def("get_num_threads", &cpu::threads);
  m.def("empty_cache", &cpu::pool_empty);

  cpu::backend();  // an impossible FUSEDNORM_ISA fails the import, not the first call
}

}  // namespace fusednorm
