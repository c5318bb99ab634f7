// The loop nests of one instruction set, a table for each element type. Each is compiled on its own (nests.cpp), so that
// cores share the work.
#pragma once

#include "cpu/passes.h"

namespace fusednorm::cpu::FUSEDNORM_ISA {

struct Nests {
  void (*forward)(const ForwardPass&);
  void (*backward)(const BackwardPass&);
  // Of a fold of lines, without mask and epilogue. `mean`, `rstd`: out [S], each may be null.
  void (*forward_lines)(const ForwardPass&, double* mean, double* rstd);
  // `dweight`, `dbias`: out [C], not used without pass.s12.
  void (*backward_lines)(const BackwardPass&, const Array& dweight, const Array& dbias);
};
extern const Nests nests_f32, nests_f64, nests_f16, nests_bf16;

}  // namespace fusednorm::cpu::FUSEDNORM_ISA
