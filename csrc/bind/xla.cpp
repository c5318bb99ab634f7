// JAX's calls without Python: the handlers that XLA's foreign function interface calls with its buffers, where jaxlib's
// headers were at hand when this was built. What is wrong with a call is said when JAX traces it (fusednorm/jax.py);
// here it is checked once more what the verbs index with.
#include <pybind11/pybind11.h>

#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "bind/xla.h"
#include "cpu/isa.h"
#include "xla/ffi/api/ffi.h"

namespace py = pybind11;
namespace ffi = xla::ffi;

namespace fusednorm {
namespace {

std::optional<DType> dtype_of(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::F32: return DType::f32;
    case ffi::DataType::F64: return DType::f64;
    case ffi::DataType::F16: return DType::f16;
    case ffi::DataType::BF16: return DType::bf16;
    default: return std::nullopt;
  }
}

struct Wrong {
  std::string message;
};

void expect(bool condition, const char* message) {
  if (!condition) throw Wrong{message};
}

// The arguments or the results of a call, one after the other; those that `given` has no bit for are left out.
template <class Buffers>
class InTurn {
 public:
  InTurn(const Buffers& buffers, int64_t given) : buffers_(buffers), given_(given) {}

  Array array(int64_t size, const Array* x = nullptr) {
    const auto buffer = next();
    if (!buffer) return {};
    const auto dtype = dtype_of(buffer->element_type());
    expect(dtype && (!x || *dtype == x->dtype), "an array of another dtype than was traced");
    expect(int64_t(buffer->element_count()) == size, "an array of another size than was traced");
    return {buffer->untyped_data(), *dtype};
  }
  template <class T>
  T* numbers(ffi::DataType dtype, int64_t size) {
    const auto buffer = next();
    if (!buffer) return nullptr;
    expect(buffer->element_type() == dtype && int64_t(buffer->element_count()) == size, "an array of another kind");
    return static_cast<T*>(buffer->untyped_data());
  }

 private:
  std::optional<ffi::AnyBuffer> next() {
    const bool is_given = given_ & 1;
    given_ >>= 1;
    if (!is_given) return std::nullopt;
    auto buffer = buffers_.template get<ffi::AnyBuffer>(taken_++);
    expect(buffer.has_value(), "fewer arrays than were traced");
    if constexpr (std::is_same_v<Buffers, ffi::RemainingRets>)
      return **buffer;
    else
      return *buffer;
  }

  const Buffers& buffers_;
  int64_t given_;
  size_t taken_ = 0;
};

// Attributes of both handlers, by name.
struct Norm {
  Fold fold;
  bool center, training;
  double eps, momentum;
  int64_t correction;
  EpilogueArgs epilogue;
  int64_t arguments, results;  // which are given

  explicit Norm(const ffi::Dictionary& all)
      : fold{of<int64_t>(all, "batch"), of<int64_t>(all, "outer"), of<int64_t>(all, "groups"),
             of<int64_t>(all, "inner"), of<int64_t>(all, "span")},
        center(of<int64_t>(all, "center")),
        training(of<int64_t>(all, "training")),
        eps(of<double>(all, "eps")),
        momentum(of<double>(all, "momentum")),
        correction(of<int64_t>(all, "correction")),
        epilogue{Activation(of<int64_t>(all, "activation")), of<double>(all, "slope"), {}},
        arguments(of<int64_t>(all, "arguments")),
        results(of<int64_t>(all, "results")) {
    const Fold& f = fold;
    expect(f.batch > 0 && f.outer > 0 && f.groups > 0 && f.inner > 0 && f.span > 0 && f.inner % f.span == 0,
           "sizes that no kernel takes");
    expect(epilogue.activation >= Activation::identity && epilogue.activation <= Activation::tanh,
           "unknown activation");
    expect(correction == 0 || correction == 1, "correction must be 0 or 1");
  }

 private:
  template <class T>
  static T of(const ffi::Dictionary& all, const char* name) {
    const auto value = all.get<T>(name);
    if (!value.has_value()) throw Wrong{std::string(name) + " is missing"};
    return *value;
  }
};

// Saved statistics: the bits of float64 means, if there are any, and after them those of rstd.
struct Saved {
  double *mean, *rstd;

  template <class Buffers>
  Saved(InTurn<Buffers>& from, const Norm& norm) {
    const int64_t s = norm.fold.statistics();
    double* const all = from.template numbers<double>(ffi::DataType::U32, 2 * (1 + norm.center) * s);
    expect(all, "the statistics are missing");
    mean = norm.center ? all : nullptr;
    rstd = norm.center ? all + s : all;
  }
};

void copy_numbers(const Array& from, const Array& to, int64_t n) {
  for (int64_t i = 0; from && i < n; ++i) to.set(i, from.get(i));
}

void forward(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets, const Norm& norm) {
  const Fold& f = norm.fold;
  const int64_t channels = f.channels();
  InTurn in(args, norm.arguments);
  InTurn out(rets, norm.results);
  const Array x = in.array(f.size()), weight = in.array(channels), bias = in.array(channels);
  EpilogueArgs epilogue = norm.epilogue;
  epilogue.residual = in.array(f.size(), &x);
  Array mean = in.array(channels), var = in.array(channels);
  const uint8_t* mask = in.numbers<uint8_t>(ffi::DataType::PRED, f.batch * f.outer * f.span);
  const Array y = out.array(f.size(), &x);
  const Saved saved(out, norm);
  expect(bool(mean) == bool(var) && (norm.training || mean), "running statistics are missing");
  if (norm.training) {  // which writes new ones
    const Array new_mean = out.array(channels, &mean), new_var = out.array(channels, &var);
    expect(bool(new_mean) == bool(mean) && bool(new_var) == bool(var), "running statistics are missing");
    copy_numbers(mean, new_mean, channels);
    copy_numbers(var, new_var, channels);
    mean = new_mean;
    var = new_var;
  }
  expect(x && y, "x or y is missing");
  cpu::backend().forward({f, x, weight, bias, epilogue, mask, norm.eps, norm.training,
                          RunningArgs{mean, var, norm.momentum, -1, false, double(norm.correction)}, saved.mean,
                          saved.rstd, y});
}

void backward(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets, const Norm& norm) {
  const Fold& f = norm.fold;
  const int64_t channels = f.channels();
  InTurn in(args, norm.arguments);
  InTurn out(rets, norm.results);
  const Array dy = in.array(f.size()), x = in.array(f.size(), &dy), weight = in.array(channels),
              bias = in.array(channels);
  EpilogueArgs epilogue = norm.epilogue;
  epilogue.residual = in.array(f.size(), &dy);
  const uint8_t* mask = in.numbers<uint8_t>(ffi::DataType::PRED, f.batch * f.outer * f.span);
  const Saved saved(in, norm);
  const Array dx = out.array(f.size(), &dy), dweight = out.array(channels), dbias = out.array(channels),
              dresidual = out.array(f.size(), &dy);
  expect(dy && x && dx, "dy, x or dx is missing");
  std::vector<float> unwanted(size_t(dweight && dbias ? 0 : channels));
  const Array nobodys{unwanted.data(), DType::f32};
  cpu::backend().backward({f, dy, x, saved.mean, saved.rstd, weight, bias, epilogue, mask, !norm.training, dx,
                           dresidual, dweight ? dweight : nobodys, dbias ? dbias : nobodys});
}

template <void (*verb)(const ffi::RemainingArgs&, const ffi::RemainingRets&, const Norm&)>
ffi::Error called(ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary attributes) {
  try {
    verb(args, rets, Norm(attributes));
    return ffi::Error::Success();
  } catch (const Wrong& wrong) {
    return ffi::Error::InvalidArgument("fusednorm: " + wrong.message);
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("fusednorm: ") + error.what());
  }
}

XLA_FFI_DEFINE_HANDLER(forward_handler, called<forward>, ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs());
XLA_FFI_DEFINE_HANDLER(backward_handler, called<backward>, ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs());

}  // namespace

py::dict xla_handlers() {
  py::dict all;
  all["forward"] = py::capsule(reinterpret_cast<void*>(+forward_handler));
  all["backward"] = py::capsule(reinterpret_cast<void*>(+backward_handler));
  return all;
}

}  // namespace fusednorm
