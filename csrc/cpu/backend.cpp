// The CPU's table of verbs: what each asks of the two passes. Compiled once per instruction set, each time into its own
// namespace FUSEDNORM_ISA; the loop nests are compiled beside it (nests.cpp).
#include "cpu/nests.h"
#include "cpu/team.h"

#define FN_STRING(x) #x
#define FN_NAME(x) FN_STRING(x)

namespace fusednorm::cpu::FUSEDNORM_ISA {
namespace {

const Nests& nests(DType dtype) {
  switch (dtype) {
    case DType::f32: return nests_f32;
    case DType::f64: return nests_f64;
    case DType::f16: return nests_f16;
    case DType::bf16: break;
  }
  return nests_bf16;
}

// Whether the loops of lines.h do it, which are quicker than columns and know neither masks nor epilogues.
template <class Pass>
bool as_lines(const Pass& pass) {
  return pass.fold.is_lines() && !pass.mask && !pass.epilogue.residual &&
         pass.epilogue.activation == Activation::identity;
}
// Of lines, `mean` and `rstd` are out, as the nests have them; of others pass.found says them.
void run(const ForwardPass& pass, double* mean = nullptr, double* rstd = nullptr) {
  const Nests& nest = nests(pass.x.dtype);
  as_lines(pass) ? nest.forward_lines(pass, mean, rstd) : nest.forward(pass);
}

void moments(const MomentsArgs& a) {
  const int64_t s = a.fold.statistics();
  Scratch<Moments> found(s);
  for (int64_t i = 0; i < s; ++i) found[i] = Moments();
  if (a.fold.size() > 0)
    run(ForwardPass{.fold = a.fold, .x = a.x, .mask = a.mask, .found = found.get(), .center = a.center});
  for (int64_t i = 0; i < s; ++i) {
    a.count[i] = found[i].n;
    a.mean[i] = found[i].mean;
    a.m2[i] = found[i].m2;
  }
}

void merge(const MergeArgs& a) {
  for (int64_t i = 0; i < a.before; ++i)
    for (int64_t k = 0; k < a.after; ++k) {
      Moments m;
      for (int64_t j = 0; j < a.axis; ++j) {
        const int64_t from = (i * a.axis + j) * a.after + k;
        m.merge({a.count[from], a.mean[from], a.m2[from]});
      }
      a.merged_count[i * a.after + k] = m.n;
      a.merged_mean[i * a.after + k] = m.mean;
      a.merged_m2[i * a.after + k] = m.m2;
    }
}

void normalize(const NormalizeArgs& a) {
  if (a.fold.size() == 0) return;
  run(ForwardPass{.fold = a.fold,
                  .x = a.x,
                  .weight = a.weight,
                  .bias = a.bias,
                  .y = a.y,
                  .epilogue = a.epilogue,
                  .given_mean = a.mean,
                  .given_rstd = a.rstd});
}

void forward(const ForwardArgs& a) {
  const int64_t s = a.fold.statistics();
  if (!a.training) {
    for (int64_t i = 0; i < s; ++i) {
      a.mean[i] = a.running.mean.get(i % a.fold.groups);
      a.rstd[i] = 1 / __builtin_sqrt(a.running.var.get(i % a.fold.groups) + a.eps);
    }
    return normalize({a.fold, a.x, a.mean, a.rstd, a.weight, a.bias, a.epilogue, a.y});
  }
  if (a.fold.size() == 0) {
    for (int64_t i = 0; i < s; ++i) {
      if (a.mean) a.mean[i] = 0;
      a.rstd[i] = 1 / __builtin_sqrt(a.eps);
    }
    return;
  }
  ForwardPass pass{.fold = a.fold,
                   .x = a.x,
                   .weight = a.weight,
                   .bias = a.bias,
                   .y = a.y,
                   .epilogue = a.epilogue,
                   .mask = a.mask,
                   .center = bool(a.mean),
                   .eps = a.eps};
  if (as_lines(pass)) return run(pass, a.mean, a.rstd);
  const Scratch<Moments> found(s);
  pass.found = found.get();
  // float64 in place: y must not be written before it is known that no variance overflowed.
  const bool twice = a.x.dtype == DType::f64 && a.x.data == a.y.data;
  if (twice) pass.y = {};
  run(pass);
  bool again = twice;
  for (int64_t i = 0; i < s; ++i) {
    if (a.mean) a.mean[i] = pass.mean(i);
    a.rstd[i] = pass.rstd(i);
    if (a.x.dtype == DType::f64 && found[i].m2 > kLargest) {
      a.rstd[i] = rstd_wide(a.fold, a.x.as<const double>(), a.mask, i, a.mean, a.eps);
      again = true;
    }
  }
  if (again) normalize({a.fold, a.x, a.mean, a.rstd, a.weight, a.bias, a.epilogue, a.y});
  for (int64_t c = 0; a.running.mean && c < a.fold.groups; ++c)
    a.running.update_by_entries(c, a.fold.batch, [&](int64_t b) { return found[b * a.fold.groups + c]; });
}

// Per-channel gradients: the batch entries' sums, in order.
void parameter_gradients(const BackwardPass& pass, const Array& dweight, const Array& dbias) {
  const Scratch<double> u(pass.channels), ux(pass.channels);
  for (int64_t c = 0; c < pass.channels; ++c) u[c] = ux[c] = 0;
  for (int64_t s = 0, cell = 0, c = 0; s < pass.fold.statistics(); ++s) {
    const double lo = pass.x.dtype == DType::f64 ? pass.lo<double>(s) : pass.lo<float>(s);
    for (const int64_t end = cell + pass.share; cell < end; ++cell, ++c) {
      if (c == pass.channels) c = 0;
      u[c] += pass.found[cell].u;
      ux[c] += pass.found[cell].ux(lo, pass.rstd[s]);
    }
  }
  for (int64_t c = 0; c < pass.channels; ++c) {
    dweight.set(c, ux[c]);
    dbias.set(c, u[c]);
  }
}

void clear_gradients(const Fold& f, const Array& dweight, const Array& dbias) {
  for (int64_t c = 0; c < f.channels(); ++c) {
    dweight.set(c, 0);
    dbias.set(c, 0);
  }
}

// What the verbs of the backward have in common.
template <class Args>
BackwardPass backward_of(const Args& a) {
  return {.fold = a.fold,
          .dy = a.dy,
          .x = a.x,
          .mean = a.mean,
          .rstd = a.rstd,
          .weight = a.weight,
          .bias = a.bias,
          .epilogue = a.epilogue};
}
// With s12 the gradients of the parameters are taken as well; cells are given room here.
void run(BackwardPass pass, const Array& dweight = {}, const Array& dbias = {}) {
  const Nests& nest = nests(pass.x.dtype);
  if (as_lines(pass)) return nest.backward_lines(pass, dweight, dbias);
  // Without an activation u is dy: the residual need not be read.
  if (!pass.needs_pre()) pass.epilogue.residual = {};
  if (!pass.s12) return nest.backward(pass);
  const Scratch<GradSums> found(pass.fold.cells().statistics());
  pass.found = found.get();
  nest.backward(pass);
  parameter_gradients(pass, dweight, dbias);
}

void grad_sums(const GradSumsArgs& a) {
  const Fold& f = a.fold;
  const int64_t s = f.statistics();
  if (f.size() == 0) {
    for (int64_t i = 0; i < s; ++i) a.s1[i] = a.s2[i] = 0;
    return clear_gradients(f, a.dweight, a.dbias);
  }
  const Scratch<GradSums> s12(s);
  BackwardPass pass = backward_of(a);
  pass.s12 = s12.get();
  pass.constant = true;
  run(pass, a.dweight, a.dbias);
  for (int64_t i = 0; i < s; ++i) {
    a.s1[i] = s12[i].u;
    a.s2[i] = s12[i].uz;
  }
}

void grad_input(const GradInputArgs& a) {
  if (a.fold.size() == 0) return;
  BackwardPass pass = backward_of(a);
  pass.cx = a.cx;
  pass.c0 = a.c0;
  pass.constant = !a.cx && !a.c0;
  pass.mask = a.mask;
  pass.dx = a.dx;
  pass.dresidual = a.dresidual;
  run(pass);
}

void backward(const BackwardArgs& a) {
  if (a.fold.size() == 0) return clear_gradients(a.fold, a.dweight, a.dbias);
  const Scratch<GradSums> s12(a.fold.statistics());
  const Scratch<double> counted(a.mask ? a.fold.batch : 0);
  const int64_t positions = a.fold.outer * a.fold.span;  // of a batch entry
  for (int64_t b = 0; a.mask && b < a.fold.batch; ++b) {
    counted[b] = 0;
    for (int64_t i = 0; i < positions; ++i) counted[b] += a.mask[b * positions + i] != 0;
  }
  BackwardPass pass = backward_of(a);
  pass.s12 = s12.get();
  pass.constant = a.constant;
  pass.mask = a.mask;
  pass.counted = counted.get();
  pass.dx = a.dx;
  pass.dresidual = a.dresidual;
  run(pass, a.dweight, a.dbias);
}

void copy(const CopyArgs& a) {
  constexpr int64_t piece = 1 << 18;
  const int64_t pieces = (a.bytes + piece - 1) / piece;
  parallel(threads_for(a.bytes / 4, pieces), [&](const Team& team) {
    team.each(pieces, [&](int64_t i) {
      const int64_t at = i * piece, n = a.bytes - at < piece ? a.bytes - at : piece;
      stream_elements(static_cast<char*>(a.to) + at, static_cast<const char*>(a.from) + at, n);
    });
    stream_fence();
  });
}

}  // namespace

extern const Backend backend;
const Backend backend{
    FN_NAME(FUSEDNORM_ISA), moments, merge, normalize, grad_sums, grad_input, forward, backward, copy, nullptr};

}  // namespace fusednorm::cpu::FUSEDNORM_ISA
