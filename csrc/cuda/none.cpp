#include "core/cuda.h"

namespace fusednorm::cuda {

const Backend* backend() { return nullptr; }
const char* state() { return FUSEDNORM_CUDA_STATE; }
int devices() { return 0; }
bool capturing(void*) { return false; }

}  // namespace fusednorm::cuda
