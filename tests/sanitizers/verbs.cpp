// Every verb over folds that take every path of the loops, each tensor in memory that ends where it ends. Built by the
// sanitizer sessions of noxfile.py; fails by itself only if the bits depend on the number of threads.
//
// `verbs PLANT` does one thing that is wrong instead, to show that the sanitizer would see it. Then the exit code must not
// be 0.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "core/backend.h"
#include "cpu/host.h"
#include "cpu/pool.h"
#if defined(FN_RACE)
#include "threads.h"
#endif

namespace fusednorm::cpu::FUSEDNORM_ISA {
extern const Backend backend;
}

namespace {

using namespace fusednorm;
const Backend& verbs = cpu::FUSEDNORM_ISA::backend;

constexpr double kEps = 1e-5;

// Owns exactly size·item bytes.
class Tensor {
 public:
  Tensor(DType dtype, int64_t size) : memory_(size_t(size * item_size(dtype))), dtype_(dtype) {}
  Array array() { return {memory_.data(), dtype_, kCpu}; }
  double* doubles() { return array().as<double>(); }
  const std::vector<unsigned char>& memory() const { return memory_; }

 private:
  std::vector<unsigned char> memory_;
  DType dtype_;
};

Tensor drawn(DType dtype, int64_t size, double mean, unsigned seed) {
  Tensor t(dtype, size);
  std::minstd_rand random(seed);
  for (int64_t i = 0; i < size; ++i) t.array().set(i, mean + double(random() % 4096) / 1024 - 2);
  return t;
}

struct Call {
  Fold fold;
  DType dtype;
  Activation activation;
  bool residual;
  bool extreme;  // one element whose square overflows
  bool masked;
};

struct Inputs {
  Tensor x, dy, residual, weight, bias, mean, rstd;
  std::vector<uint8_t> counts;  // the mask; empty: none

  explicit Inputs(const Call& c)
      : x(drawn(c.dtype, c.fold.size(), 3, 1)),
        dy(drawn(c.dtype, c.fold.size(), 0, 2)),
        residual(drawn(c.dtype, c.fold.size(), 0, 3)),
        weight(drawn(DType::f32, c.fold.channels(), 1, 4)),
        bias(drawn(DType::bf16, c.fold.channels(), 0, 5)),
        mean(drawn(DType::f64, c.fold.statistics(), 3, 6)),
        rstd(drawn(DType::f64, c.fold.statistics(), 3, 7)) {
    if (c.masked) {
      counts.resize(size_t(c.fold.batch * c.fold.outer * c.fold.span));
      for (size_t i = 0; i < counts.size(); ++i) counts[i] = i % 3 != 1;
    }
    if (c.extreme) x.array().set(c.fold.size() / 2, c.dtype == DType::f64 ? 1e200 : 1e30);
  }
};

// What all verbs wrote.
std::vector<Tensor> run(const Call& c, Inputs& in) {
  const Fold& f = c.fold;
  const int64_t size = f.size(), s = f.statistics(), channels = f.channels();
  std::vector<Tensor> out;
  const auto fresh = [&](DType dtype, int64_t n) { return out.emplace_back(dtype, n).array(); };
  const auto numbers = [&](int64_t n) { return fresh(DType::f64, n).as<double>(); };
  const auto tensor = [&] { return fresh(c.dtype, size); };
  const EpilogueArgs epilogue{
      .activation = c.activation, .slope = 0.01, .residual = c.residual ? in.residual.array() : Array()};
  const Array x = in.x.array(), dy = in.dy.array(), weight = in.weight.array(), bias = in.bias.array();
  const double *mean = in.mean.doubles(), *rstd = in.rstd.doubles();
  const uint8_t* mask = c.masked ? in.counts.data() : nullptr;

  for (const bool center : {true, false}) {
    const MomentsArgs moments{
        .fold = f, .x = x, .mask = mask, .center = center, .count = numbers(s), .mean = numbers(s), .m2 = numbers(s)};
    verbs.moments(moments);
    verbs.merge({.before = 1,
                 .axis = f.batch,
                 .after = f.groups,
                 .count = moments.count,
                 .mean = moments.mean,
                 .m2 = moments.m2,
                 .merged_count = numbers(f.groups),
                 .merged_mean = numbers(f.groups),
                 .merged_m2 = numbers(f.groups)});
  }
  verbs.normalize({.fold = f,
                   .x = x,
                   .mean = mean,
                   .rstd = rstd,
                   .weight = weight,
                   .bias = bias,
                   .epilogue = epilogue,
                   .y = tensor()});

  const RunningArgs running{
      .mean = fresh(DType::f32, channels), .var = fresh(DType::f16, channels), .momentum = 0.1, .counted = -1};
  for (const bool training : {true, false}) {
    const ForwardArgs forward{.fold = f,
                              .x = x,
                              .weight = weight,
                              .bias = bias,
                              .epilogue = epilogue,
                              .mask = mask,
                              .eps = kEps,
                              .training = training,
                              .running = running,
                              .mean = numbers(s),
                              .rstd = numbers(s),
                              .y = tensor()};
    verbs.forward(forward);
    verbs.backward({.fold = f,
                    .dy = dy,
                    .x = x,
                    .mean = forward.mean,
                    .rstd = forward.rstd,
                    .weight = weight,
                    .bias = bias,
                    .epilogue = epilogue,
                    .mask = mask,
                    .constant = !training,
                    .dx = tensor(),
                    .dresidual = c.residual ? tensor() : Array(),
                    .dweight = fresh(DType::f32, channels),
                    .dbias = fresh(DType::f16, channels)});
  }

  const GradSumsArgs sums{.fold = f,
                          .dy = dy,
                          .x = x,
                          .mean = mean,
                          .rstd = rstd,
                          .weight = weight,
                          .bias = bias,
                          .epilogue = epilogue,
                          .s1 = numbers(s),
                          .s2 = numbers(s),
                          .dweight = fresh(DType::f32, channels),
                          .dbias = fresh(DType::f64, channels)};
  verbs.grad_sums(sums);
  verbs.grad_input({.fold = f,
                    .dy = dy,
                    .x = x,
                    .mean = mean,
                    .rstd = rstd,
                    .weight = weight,
                    .bias = bias,
                    .epilogue = epilogue,
                    .cx = sums.s1,
                    .c0 = sums.s2,
                    .mask = mask,
                    .dx = tensor(),
                    .dresidual = tensor()});
  verbs.copy({.to = tensor().data, .from = x.data, .bytes = size * item_size(c.dtype)});
  return out;
}

bool same_bits_on_one_thread_and_on(int threads, const Call& c) {
  Inputs in(c);
  cpu::set_threads(1);
  const std::vector<Tensor> one = run(c, in);
  cpu::set_threads(threads);
  const std::vector<Tensor> many = run(c, in);
  for (size_t i = 0; i < one.size(); ++i)
    if (one[i].memory() != many[i].memory()) {
      std::printf("output %zu of Fold(%ld, %ld, %ld, %ld) depends on the number of threads\n", i, long(c.fold.batch),
                  long(c.fold.outer), long(c.fold.groups), long(c.fold.inner));
      return false;
    }
  return true;
}

Fold rows(int64_t batch, int64_t outer, int64_t groups, int64_t inner) { return {batch, outer, groups, inner, inner}; }
Fold columns(int64_t batch, int64_t outer, int64_t groups) { return {batch, outer, groups, 1, 1}; }

constexpr DType kDtypes[] = {DType::f32, DType::f64, DType::f16, DType::bf16};

std::vector<Call> calls() {
  std::vector<Call> all;
  // Every length of a tail, on one thread.
  for (const DType dtype : kDtypes)
    for (int64_t n = 1; n <= 35; ++n)
      for (const bool residual : {false, true}) {
        all.push_back({rows(1, 2, 3, n), dtype, Activation::relu, residual, false, n % 2 == 0});
        all.push_back({columns(1, 2 + n / 2, n), dtype, Activation::relu, residual, false, n % 2 == 1});
        all.push_back({columns(2, n + 1, 3), dtype, Activation::silu, residual, false, n % 4 == 0});
      }
  const Fold folds[] = {
      rows(1, 4, 3, 1025),  rows(2, 3, 2, 777),   columns(1, 70, 300),  columns(1, 5, 1100),  // on one thread
      rows(1, 8, 32, 1100),                                                                   // a slab a task
      rows(1, 40, 130, 61),                                                                   // short runs, staged
      rows(1, 3, 3, 40000),                                                                   // a slab shared
      rows(4, 8, 10, 1030), columns(1, 4500, 64), columns(1, 45001, 7), columns(1, 150, 2051), columns(3, 1500, 67)};
  for (const DType dtype : kDtypes)
    for (const Fold& fold : folds)
      for (const bool residual : {false, true})
        for (const Activation activation : {Activation::identity, Activation::relu, Activation::tanh})
          all.push_back({fold, dtype, activation, residual, residual, activation == Activation::relu});
  // Large enough to be streamed past the caches.
  for (const Fold& fold : {rows(1, 16, 16, 17001), rows(1, 64, 700, 97), columns(1, 70001, 62)})
    all.push_back({fold, DType::f32, Activation::relu, true, false, false});
  return all;
}

// Python threads in kernels at once, each with outputs of its own, and in the output pool.
bool callers() {
  const Call c{rows(1, 8, 32, 1100), DType::f32, Activation::relu, true, false, false};
  Inputs in(c);
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i)
    threads.emplace_back([&] {
      for (int k = 0; k < 3; ++k) {
        run(c, in);
        const cpu::Block block = cpu::pool_take(cpu::kPoolBytes);
        std::memset(block.data, k, 4096);
        cpu::pool_give(block);
        cpu::set_threads(2 + k);
      }
    });
  for (std::thread& thread : threads) thread.join();
  return cpu::pool_empty() > 0;
}

// Wrong on purpose.
int plant(const std::string& what) {
  const Fold f = rows(1, 64, 8, 1030);
  Inputs in({f, DType::f32, Activation::relu, true, false, false});
  Tensor y(DType::f32, f.size()), saved_mean(DType::f64, 8), saved_rstd(DType::f64, 8);
  NormalizeArgs normalize{.fold = f,
                          .x = in.x.array(),
                          .mean = in.mean.doubles(),
                          .rstd = in.rstd.doubles(),
                          .weight = in.weight.array(),
                          .bias = in.bias.array(),
                          .epilogue = {},
                          .y = y.array()};
  if (what == "overread") {  // x is short by one element
    Tensor x(DType::f32, f.size() - 1);
    normalize.x = x.array();
    verbs.normalize(normalize);
  } else if (what == "overwrite") {  // y is
    Tensor short_y(DType::f32, f.size() - 1);
    normalize.y = short_y.array();
    verbs.normalize(normalize);
  } else if (what == "misaligned") {
    normalize.fold.groups = 7;
    normalize.weight.data = normalize.weight.as<char>() + 1;
    verbs.normalize(normalize);
  } else if (what == "overlap") {  // a slab of dresidual is the next slab of dx
    Tensor both(DType::f32, f.size() + f.inner), dweight(DType::f32, 8), dbias(DType::f32, 8);
    Array dresidual = both.array();
    dresidual.data = dresidual.as<float>() + f.inner;
    verbs.backward({.fold = f,
                    .dy = in.dy.array(),
                    .x = in.x.array(),
                    .mean = in.mean.doubles(),
                    .rstd = in.rstd.doubles(),
                    .weight = {},
                    .bias = {},
                    .epilogue = {},
                    .mask = nullptr,
                    .constant = false,
                    .dx = both.array(),
                    .dresidual = dresidual,
                    .dweight = dweight.array(),
                    .dbias = dbias.array()});
#if defined(FN_RACE)
  } else if (what == "barrier") {
    barriers_left_out = true;
    verbs.forward({.fold = rows(1, 2, 2, f.size() / 4),
                   .x = in.x.array(),
                   .weight = {},
                   .bias = {},
                   .epilogue = {},
                   .mask = nullptr,
                   .eps = kEps,
                   .running = {},
                   .mean = saved_mean.doubles(),
                   .rstd = saved_rstd.doubles(),
                   .y = y.array()});
#endif
  } else {
    std::printf("no such plant: %s\n", what.c_str());
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) return plant(arguments[1]);
  const std::vector<Call> all = calls();
  int wrong = 0;
  for (const Call& c : all) wrong += !same_bits_on_one_thread_and_on(3, c);
  wrong += !callers();
  std::printf("%zu folds, %d wrong\n", all.size(), wrong);
  return wrong ? 2 : 0;
}
