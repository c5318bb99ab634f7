#include "cuda/kernels_of.h"

namespace fusednorm::cuda {

template <>
const Kernels& kernels<f16>() {
  return kernels_of<f16>;
}

}  // namespace fusednorm::cuda
