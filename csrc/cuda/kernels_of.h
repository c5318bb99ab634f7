// Included by the file of each element type: where its kernels are compiled.
#pragma once

#include "cuda/backward.h"
#include "cuda/forward.h"
#include "cuda/kernels.h"

namespace fusednorm::cuda {

template <class T>
const Kernels kernels_of{
    {{forward<T, false, !kHasPlain<T>>, forward<T, false, true>},
     {forward<T, true, !kHasPlain<T>>, forward<T, true, true>}},
    {{backward<T, false, !kHasPlain<T>>, backward<T, false, true>},
     {backward<T, true, !kHasPlain<T>>, backward<T, true, true>}},
    {forward_lines<T, 1, kLinePacks<T, ForwardPass>>, forward_lines<T, kLinesAtOnce<T, ForwardPass>, 1>},
    {backward_lines<T, 1, kLinePacks<T, BackwardPass>>, backward_lines<T, kLinesAtOnce<T, BackwardPass>, 1>}};

}  // namespace fusednorm::cuda
