// Every verb of the emulated CUDA kernels, on every device that the emulator has, under every schedule that is asked for;
// tests/test_cuda_sanitizers.py builds it. Fails where a result is wrong, depends on the schedule, or a way of sharing the
// work was taken nowhere.
//
// `verbs PLANT SEED…`: PLANT is the number of a planted error, 0 for none.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iterator>
#include <set>

#include "core/cuda.h"
#include "verbs.h"

// Of the planted errors that are compiled in, the one that is switched on.
int planted = 0;

extern "C" {  // tests/cuda_emulator/runtime.cpp
struct Launch {
  int device, cooperative;
  unsigned grid[3], block[3], cluster;
  size_t shared;
  void* stream;
};
size_t fn_emu_launches(Launch*, size_t most);
void fn_emu_seed(unsigned long);
}

namespace {

using namespace fusednorm;
using namespace fusednorm::check;

// The ways that were taken: which pass, of what, by which team (csrc/cuda/plan.h).
std::set<std::string> taken;
void take(const char* pass, const Fold& f) {
  Launch launches[16];
  const size_t n = fn_emu_launches(launches, std::size(launches));
  if (f.is_lines()) {  // more kernels follow
    taken.insert(std::string(pass) + " lines " + (n > 2 ? "cut" : launches[0].cluster > 1 ? "cluster" : "block"));
    return;
  }
  if (f.batch != 1 || f.share() != 1) return;
  taken.insert(std::string(pass) + (f.is_columns() ? " columns " : " rows ") +
               (n == 2                    ? "two launches"
                : launches[0].cooperative ? "grid"
                : launches[0].cluster > 1 ? "cluster"
                                          : "block"));
}

Backend watched() {
  Backend verbs = *cuda::backend();
  verbs.forward = [](const ForwardArgs& a) {
    fn_emu_launches(nullptr, 0);
    cuda::backend()->forward(a);
    if (a.training) take("forward", a.fold);
  };
  verbs.backward = [](const BackwardArgs& a) {
    fn_emu_launches(nullptr, 0);
    cuda::backend()->backward(a);
    take("backward", a.fold);
  };
  return verbs;
}

// Float32 in every way, other types in some; ThreadSanitizer takes a second for each call, and longer.
bool wanted(size_t fold, size_t dtype, size_t kind) {
#if defined(__SANITIZE_THREAD__)
  return fold % 2 == 0 && dtype == fold / 2 % 4 && kind == fold / 2 % 7;
#else
  return dtype == 0 || (fold + dtype + kind) % 3 == 0;
#endif
}

std::vector<Call> calls() {
  const Fold folds[] = {rows(1, 2, 3, 9),    rows(1, 2, 3, 1),   rows(1, 1, 1, 6001), rows(1, 2, 3, 3),
                        rows(1, 3, 9, 70),   rows(1, 3, 2, 8),   rows(1, 2, 2, 1504), rows(2, 3, 2, 201),
                        columns(1, 64, 3),   rows(1, 2, 3, 16),  columns(1, 300, 64), rows(1, 2, 3, 23),
                        columns(1, 2000, 3), rows(1, 4, 2, 300), columns(3, 33, 67),  columns(1, 40, 5),
                        columns(1, 999, 16), columns(2, 32, 3),  columns(1, 7, 200)};
  const Call kinds[] = {
      {.fold = {}},
      {.fold = {}, .activation = Activation::relu},
      {.fold = {}, .activation = Activation::relu, .residual = true, .masked = true},
      {.fold = {}, .activation = Activation::silu, .residual = true, .extreme = true},
      {.fold = {}, .activation = Activation::tanh, .masked = true, .offset = 1, .offset_of_outputs = 1},
      {.fold = {}, .activation = Activation::relu, .offset = 1, .offset_of_outputs = 1},
      {.fold = {}, .activation = Activation::leaky_relu, .residual = true, .offset_of_outputs = 1},
  };
  // Lines: those of clusters or cut, a warp's, several of a warp, a block's.
  const Fold of_lines[] = {lines(3, 1, 3000), lines(13, 1, 37), lines(37, 1, 8),  lines(5, 1, 300),
                           lines(5, 2, 1000), lines(9, 2, 64),  lines(9, 1, 132), lines(2, 1, 5003)};
  const Call line_kinds[] = {{.fold = {}},
                             {.fold = {}, .centered = false},
                             {.fold = {}, .offset = 1},
                             {.fold = {}, .extreme = true},
                             {.fold = {}, .offset_of_outputs = 1}};
  // Statistics of several channels, and lines that must go that way.
  const Fold of_cells[] = {{2, 1, 3, 36, 9}, {2, 30, 3, 4, 1}, {3, 2, 2, 320, 160}, lines(5, 1, 24)};
  const Call cell_kinds[] = {{.fold = {}, .activation = Activation::relu},
                             {.fold = {}, .activation = Activation::silu, .residual = true, .masked = true},
                             {.fold = {}, .residual = true, .centered = false},
                             {.fold = {}, .activation = Activation::relu, .extreme = true, .masked = true}};
  // Groups of channels, as lines.
  const Fold of_groups[] = {{5, 1, 3, 36, 9}, {70, 1, 1, 48, 16}, {3, 1, 2, 3000, 1500}, {9, 1, 2, 400, 2}};
  const auto each_of = [](const auto& some_folds, const auto& some_kinds) {
    std::vector<Call> all;
    for (size_t fold = 0; fold < std::size(some_folds); ++fold)
      for (size_t dtype = 0; dtype < std::size(kDtypes); ++dtype)
        for (size_t kind = 0; kind < std::size(some_kinds); ++kind)
          if (wanted(fold, dtype, kind)) {
            all.push_back(some_kinds[kind]);
            all.back().fold = some_folds[fold];
            all.back().dtype = kDtypes[dtype];
          }
    return all;
  };
  const std::vector<Call> every[] = {each_of(folds, kinds), each_of(of_lines, line_kinds),
                                     each_of(of_cells, cell_kinds), each_of(of_groups, line_kinds)};
  // In turns: an error is met soon, whichever it is in.
  std::vector<Call> all;
  for (size_t i = 0, before = 1; all.size() != before; ++i) {
    before = all.size();
    for (const std::vector<Call>& some : every)
      if (i < some.size()) all.push_back(some[i]);
  }
#if !defined(__SANITIZE_THREAD__)  // it takes minutes
  // So many lines a block that the sums across them go through several chunks.
  all.push_back({.fold = lines(400, 1, 1040)});
#endif
  // Columns and rows without a mean. A thread's packs in several chunks; a grid of two teams for seven slabs.
  all.push_back({.fold = rows(2, 3, 3, 50), .activation = Activation::relu, .centered = false});
  all.push_back({.fold = columns(1, 40, 20), .dtype = DType::bf16, .centered = false});
  all.push_back({.fold = rows(1, 1, 1, 40001), .dtype = DType::f64, .activation = Activation::relu});
  all.push_back({.fold = columns(1, 3000, 16), .dtype = DType::f64, .activation = Activation::relu, .residual = true});
  all.push_back({.fold = rows(1, 4, 7, 5000), .activation = Activation::relu});
  return all;
}

// What is wrong on a device: under one schedule, or in the bits under several.
std::string wrong_on(int device, const Call& c, const std::vector<unsigned long>& seeds) {
  static const Backend verbs = watched();
  Inputs in(c);
  std::vector<Output> first;
  for (const unsigned long seed : seeds) {
    fn_emu_seed(seed);
    std::vector<Output> out = run(verbs, c, in, device);
    if (seed == seeds.front()) {
      first = std::move(out);
      if (const std::string what = wrong(c, in, first); !what.empty()) return what;
      continue;
    }
    for (size_t i = 0; i < out.size(); ++i)
      if (out[i].tensor.memory() != first[i].tensor.memory())
        return std::string(out[i].name) + " depends on the schedule: seed " + std::to_string(seed);
  }
  return "";
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) return std::printf("verbs PLANT SEED…\n"), 2;
  planted = std::atoi(arguments[1]);
  std::vector<unsigned long> seeds;
  for (int i = 2; i < count; ++i) seeds.push_back(std::strtoul(arguments[i], nullptr, 10));
  const std::vector<Call> all = calls();
  for (int device = 0; device < cuda::devices(); ++device)
    for (const Call& c : all) {
      std::string what;
      try {
        what = wrong_on(device, c, seeds);
      } catch (const std::exception& e) {
        what = e.what();
      }
      if (what.empty()) continue;
      std::printf("device %d, %s: %s\n", device, c.name().c_str(), what.c_str());
      return 2;
    }
  for (const std::string& way : taken) std::printf("%s\n", way.c_str());
  std::printf("%zu calls\n", all.size());
  return taken.size() == 22 ? 0 : 3;
}
