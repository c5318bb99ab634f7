#include "core/cuda.h"

namespace fusednorm::cuda {

const Backend* backend() { return nullptr; }
const char* state() { return FUSEDNORM_CUDA_REASON; }

}  // namespace fusednorm::cuda
