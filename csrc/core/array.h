// Array: a borrowed pointer with its element type and device. Null data means "not given". The caller of a verb owns
// the memory and keeps it alive until the verb returns (on a GPU: until the stream has passed it).
#pragma once

#include "core/dtype.h"

namespace fusednorm {

constexpr int kCpu = -1;

struct Array {
  void* data = nullptr;
  DType dtype = DType::f32;
  int device = kCpu;  // kCpu, or the ordinal of a CUDA device

  FN_INLINE explicit operator bool() const { return data != nullptr; }

  template <class T>
  FN_INLINE T* as() const {
    return static_cast<T*>(data);
  }

  // One element of a parameter or statistic, whatever its type. For arithmetic on S or C numbers, never for a tensor.
  FN_INLINE double get(int64_t i) const {
    switch (dtype) {
      case DType::f32: return as<float>()[i];
      case DType::f64: return as<double>()[i];
      case DType::f16: return to_real(as<f16>()[i]);
      case DType::bf16: return to_real(as<bf16>()[i]);
    }
    return 0;
  }
  FN_INLINE double get_or(int64_t i, double absent) const { return data ? get(i) : absent; }

  FN_INLINE void set(int64_t i, double value) const {
    switch (dtype) {
      case DType::f32: as<float>()[i] = float(value); break;
      case DType::f64: as<double>()[i] = value; break;
      case DType::f16: as<f16>()[i] = from_real<f16>(float(value)); break;
      case DType::bf16: as<bf16>()[i] = from_real<bf16>(float(value)); break;
    }
  }
};

}  // namespace fusednorm
