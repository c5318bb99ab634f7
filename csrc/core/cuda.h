// The door to the CUDA half, which may be absent: csrc/cuda/none.cpp is linked in its place.
#pragma once

#include "core/backend.h"

namespace fusednorm::cuda {

// Null where this build has no CUDA kernels.
const Backend* backend();
// What is built, or why it is not.
const char* state();
// Devices that can be used now; 0 where there is no driver or no GPU. The first call initializes CUDA.
int devices();
// Whether work sent to this stream is recorded into a graph: what the recorded calls use must outlive its replays.
bool capturing(void* stream);

}  // namespace fusednorm::cuda
