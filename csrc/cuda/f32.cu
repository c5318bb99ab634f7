#include "cuda/kernels_of.h"

namespace fusednorm::cuda {

template <>
const Kernels& kernels<float>() {
  return kernels_of<float>;
}

}  // namespace fusednorm::cuda
