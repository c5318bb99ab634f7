#include "cuda/kernels_of.h"

namespace fusednorm::cuda {

template <>
const Kernels& kernels<bf16>() {
  return kernels_of<bf16>;
}

}  // namespace fusednorm::cuda
