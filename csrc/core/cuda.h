// The door to the CUDA half, which may be absent: csrc/cuda/none.cpp is linked in its place.
#pragma once

#include "core/backend.h"

namespace fusednorm::cuda {

// Null where this build has no CUDA kernels.
const Backend* backend();
// What is built, or why it is not.
const char* state();

}  // namespace fusednorm::cuda
