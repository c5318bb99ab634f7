// The kernels of each element type, compiled in files of their own (f32.cu, …): half a minute each.
#pragma once

#include "cuda/lines.h"

namespace fusednorm::cuda {

template <class Pass, class J = Job>
using Kernel = void (*)(const Pass, const J);

// float64 has no plain kernels, which are a third of its time to compile: the general ones stand in their place.
template <class T>
constexpr bool kHasPlain = sizeof(T) < 8;

// [columns][general]: rows or columns; epilogues of all kinds, or (plain) identity and ReLU alone. [several]: of lines.
struct Kernels {
  Kernel<ForwardPass> forward[2][2];
  Kernel<BackwardPass> backward[2][2];
  Kernel<ForwardPass, LineJob> forward_lines[2];
  Kernel<BackwardPass, LineJob> backward_lines[2];
};
template <class T>
const Kernels& kernels();

}  // namespace fusednorm::cuda
