#include "cuda/kernels_of.h"

namespace fusednorm::cuda {

template <>
const Kernels& kernels<double>() {
  return kernels_of<double>;
}

}  // namespace fusednorm::cuda
