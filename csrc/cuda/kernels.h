// The kernels of each element type, compiled in files of their own (f32.cu, …): half a minute each.
#pragma once

#include "cuda/passes.h"

namespace fusednorm::cuda {

template <class Pass>
using Kernel = void (*)(const Pass, const Job);

// [columns][general]: rows or columns; epilogues of all kinds, or identity and ReLU alone.
struct Kernels {
  Kernel<ForwardPass> forward[2][2];
  Kernel<BackwardPass> backward[2][2];
};
template <class T>
const Kernels& kernels();

}  // namespace fusednorm::cuda
