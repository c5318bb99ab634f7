// One call of every verb, and what it must write: what cpu.cpp and cuda.cpp share.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/backend.h"

namespace fusednorm::check {

constexpr double kEps = 1e-5, kMomentum = 0.1, kSlope = 0.01;
constexpr DType kDtypes[] = {DType::f32, DType::f64, DType::f16, DType::bf16};

// Memory that ends where the tensor ends, which begins `offset` elements behind a border of 16 bytes. All of it is NaN
// at first.
class Tensor {
 public:
  Tensor(DType dtype, int64_t size, int64_t offset = 0)
      : memory_(size_t((offset + size) * item_size(dtype)), 0xff), dtype_(dtype), size_(size), offset_(offset) {}
  Array array() { return {memory_.data() + offset_ * item_size(dtype_), dtype_, kCpu}; }
  double* doubles() { return array().as<double>(); }
  int64_t size() const { return size_; }
  const std::vector<unsigned char>& memory() const { return memory_; }
  bool overrun() const;  // something was written before it

 private:
  std::vector<unsigned char> memory_;
  DType dtype_;
  int64_t size_, offset_;
};

struct Call {
  Fold fold;
  DType dtype = DType::f32;
  Activation activation = Activation::identity;
  bool residual = false;
  bool extreme = false;  // one element whose square overflows
  bool masked = false;
  bool centered = true;  // else there is no mean
  int64_t offset = 0, offset_of_outputs = 0;

  // Running statistics go with one channel a statistic, and with a mean.
  bool evaluates() const { return fold.share() == 1 && centered; }
  std::string name() const;
};

inline Fold rows(int64_t batch, int64_t outer, int64_t groups, int64_t inner) {
  return {batch, outer, groups, inner, inner};
}
inline Fold columns(int64_t batch, int64_t outer, int64_t groups) { return {batch, outer, groups, 1, 1}; }
inline Fold lines(int64_t batch, int64_t groups, int64_t inner) { return {batch, 1, groups, inner, 1}; }

// What the verbs read. The statistics are those of x.
struct Inputs {
  Tensor x, dy, residual, weight, bias, mean, rstd, cx, c0, running_mean, running_var, counts, means, m2s;
  std::vector<uint8_t> mask;  // empty: none

  explicit Inputs(const Call&);
};

struct Output {
  const char* name;
  Tensor tensor;
};

// Everything that all verbs wrote, on that device.
std::vector<Output> run(const Backend&, const Call&, Inputs&, int device = kCpu);
// What is wrong with it, in words, by a plain computation; empty: nothing.
std::string wrong(const Call&, Inputs&, std::vector<Output>&);

}  // namespace fusednorm::check
