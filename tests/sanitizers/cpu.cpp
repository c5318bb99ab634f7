// Every verb over folds that take every path of the loops, each tensor in memory that ends where it ends. Built by the
// sanitizer sessions of noxfile.py; fails by itself where a result is wrong or its bits depend on the number of threads.
//
// `verbs PLANT` does one thing that is wrong instead, to show that the sanitizer would see it. Then the exit code must not
// be 0.
#include <cstdio>
#include <cstring>
#include <thread>

#include "cpu/host.h"
#include "cpu/pool.h"
#include "verbs.h"
#if defined(FN_RACE)
#include "threads.h"
#endif

namespace fusednorm::cpu::FUSEDNORM_ISA {
extern const Backend backend;
}

namespace {

using namespace fusednorm;
using namespace fusednorm::check;
const Backend& verbs = cpu::FUSEDNORM_ISA::backend;

// Larger ones would take minutes.
constexpr int64_t kComputed = 20000;

// What is wrong: on one thread, or in the bits on several.
std::string wrong_on(int threads, const Call& c) {
  Inputs in(c);
  cpu::set_threads(1);
  std::vector<Output> one = run(verbs, c, in);
  cpu::set_threads(threads);
  const std::vector<Output> many = run(verbs, c, in);
  for (size_t i = 0; i < one.size(); ++i)
    if (one[i].tensor.memory() != many[i].tensor.memory())
      return std::string(one[i].name) + " depends on the number of threads";
  // The plain computation knows one channel a statistic.
  return c.fold.size() <= kComputed && c.fold.share() == 1 ? wrong(c, in, one) : "";
}

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
  for (const DType dtype : kDtypes)
    for (const Fold& fold :
         {lines(7, 1, 33), lines(9, 2, 65), lines(700, 1, 500), lines(70, 3, 1500), lines(3, 1, 100001)})
      all.push_back({fold, dtype});
  // Group norm: a task in several blocks, a group shared, groups that are lines.
  const Fold groups[] = {{4, 1, 5, 3 * 49, 49}, {8, 1, 4, 70 * 81, 81}, {1, 1, 2, 9 * 5001, 5001},
                         {3, 5, 2, 4 * 33, 33}, {3, 65, 4, 5, 1},       {4, 800, 3, 40, 1},
                         {2, 9, 2, 550, 1},     {7, 1, 3, 21, 1}};
  for (const DType dtype : kDtypes)
    for (const Fold& fold : groups)
      for (const bool masked : {false, true})
        all.push_back({fold, dtype, masked ? Activation::relu : Activation::identity, masked, masked, masked});
  // Large enough to be streamed past the caches.
  for (const Fold& fold : {rows(1, 16, 16, 17001), rows(1, 64, 700, 97), columns(1, 70001, 62)})
    all.push_back({fold, DType::f32, Activation::relu, true, false, false});
  all.push_back({lines(4500, 1, 1000), DType::f32});
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
        run(verbs, c, in);
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
  Inputs in({f, DType::f32, Activation::relu, true});
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
  int failed = 0;
  for (const Call& c : all)
    if (const std::string what = wrong_on(3, c); !what.empty()) {
      std::printf("%s: %s\n", c.name().c_str(), what.c_str());
      ++failed;
    }
  failed += !callers();
  std::printf("%zu calls, %d wrong\n", all.size(), failed);
  return failed ? 2 : 0;
}
