// The loop nests of elements FUSEDNORM_DTYPE (f32, f64, f16, bf16) for instruction set FUSEDNORM_ISA.
#include "cpu/nests.h"

#include "cpu/columns.h"
#include "cpu/lines.h"
#include "cpu/rows.h"

#define FN_JOIN(a, b) a##b
#define FN_NESTS_OF(dtype) FN_JOIN(nests_, dtype)

namespace fusednorm::cpu::FUSEDNORM_ISA {
namespace {

using T = FUSEDNORM_DTYPE;

void forward(const ForwardPass& pass) { pass.fold.is_columns() ? forward_columns<T>(pass) : forward_rows<T>(pass); }
void backward(const BackwardPass& pass) { pass.fold.is_columns() ? backward_columns<T>(pass) : backward_rows<T>(pass); }

}  // namespace

const Nests FN_NESTS_OF(FUSEDNORM_DTYPE){forward, backward, forward_lines<T>, backward_lines<T>};

}  // namespace fusednorm::cpu::FUSEDNORM_ISA
