// The CPU's table of verbs. Compiled once per instruction set, each time into its own namespace FUSEDNORM_ISA.
#include "cpu/columns.h"
#include "cpu/lines.h"
#include "cpu/rows.h"

#define FN_STRING(x) #x
#define FN_NAME(x) FN_STRING(x)

namespace fusednorm::cpu::FUSEDNORM_ISA {
namespace {

// Only the loops that a pass needs are compiled: statistics alone know no epilogue.
void run(const ForwardPass& pass, const EpilogueArgs& epilogue) {
  with_dtype(pass.x.dtype, [&](auto element) {
    using T = decltype(element);
    const auto with = [&](const auto& e) {
      if (pass.fold.is_columns())
        forward_columns(e, pass);
      else
        forward_rows(e, pass);
    };
    with_epilogue<T>(epilogue, with);
  });
}

void run(const BackwardPass& pass, EpilogueArgs epilogue) {
  // Without an activation u is dy: the residual need not be read.
  if (epilogue.activation == Activation::identity) epilogue.residual = Array();
  with_dtype(pass.x.dtype, [&](auto element) {
    using T = decltype(element);
    with_epilogue<T>(epilogue, [&](const auto& e) {
      if (pass.fold.is_columns())
        backward_columns(e, pass);
      else
        backward_rows(e, pass);
    });
  });
}

// Whether the loops of lines.h do it, which are quicker than columns and know neither masks nor epilogues.
bool as_lines(const Fold& f, const uint8_t* mask, const EpilogueArgs& epilogue) {
  return f.is_lines() && !mask && !epilogue.residual && epilogue.activation == Activation::identity;
}
void run_lines(const ForwardPass& pass, double* mean, double* rstd) {
  with_dtype(pass.x.dtype, [&](auto element) { forward_lines<decltype(element)>(pass, mean, rstd); });
}
void run_lines(const BackwardPass& pass, const Array& dweight, const Array& dbias) {
  with_dtype(pass.x.dtype, [&](auto element) { backward_lines<decltype(element)>(pass, dweight, dbias); });
}

void moments(const MomentsArgs& a) {
  const int64_t s = a.fold.statistics();
  Scratch<Moments> found(s);
  for (int64_t i = 0; i < s; ++i) found[i] = Moments();
  const ForwardPass pass{a.fold, a.x, {}, {}, {}, a.mask, nullptr, nullptr, found.get(), a.center, 0};
  if (a.fold.size() > 0 && as_lines(a.fold, a.mask, {}))
    run_lines(pass, nullptr, nullptr);
  else if (a.fold.size() > 0)
    run(pass, {});
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
  const ForwardPass pass{a.fold, a.x, a.weight, a.bias, a.y, nullptr, a.mean, a.rstd, nullptr, true, 0};
  if (as_lines(a.fold, nullptr, a.epilogue)) return run_lines(pass, nullptr, nullptr);
  run(pass, a.epilogue);
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
  if (as_lines(a.fold, a.mask, a.epilogue))
    return run_lines(
        ForwardPass{a.fold, a.x, a.weight, a.bias, a.y, nullptr, nullptr, nullptr, nullptr, bool(a.mean), a.eps},
        a.mean, a.rstd);
  Scratch<Moments> found(s);
  // float64 in place: y must not be written before it is known that no variance overflowed.
  const bool twice = a.x.dtype == DType::f64 && a.x.data == a.y.data;
  const ForwardPass pass{a.fold,  a.x,         a.weight,     a.bias, twice ? Array() : a.y, a.mask, nullptr,
                         nullptr, found.get(), bool(a.mean), a.eps};
  run(pass, a.epilogue);
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

// Of a pass with s12, but without cells as yet.
void run_sums(BackwardPass pass, const EpilogueArgs& epilogue, const Array& dweight, const Array& dbias) {
  if (as_lines(pass.fold, pass.mask, epilogue)) return run_lines(pass, dweight, dbias);
  const Scratch<GradSums> found(pass.fold.cells().statistics());
  pass.found = found.get();
  run(pass, epilogue);
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
  const BackwardPass pass{f,         a.dy,    a.x,     a.mean, a.rstd,  a.weight, a.bias, nullptr,
                          s12.get(), nullptr, nullptr, true,   nullptr, nullptr,  {},     {}};
  run_sums(pass, a.epilogue, a.dweight, a.dbias);
  for (int64_t i = 0; i < s; ++i) {
    a.s1[i] = s12[i].u;
    a.s2[i] = s12[i].uz;
  }
}

void grad_input(const GradInputArgs& a) {
  if (a.fold.size() == 0) return;
  const BackwardPass pass{a.fold,  a.dy, a.x,  a.mean,         a.rstd, a.weight, a.bias, nullptr,
                          nullptr, a.cx, a.c0, !a.cx && !a.c0, a.mask, nullptr,  a.dx,   a.dresidual};
  if (as_lines(a.fold, a.mask, a.epilogue)) return run_lines(pass, {}, {});
  run(pass, a.epilogue);
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
  const BackwardPass pass{a.fold,    a.dy,    a.x,     a.mean,     a.rstd, a.weight,      a.bias, nullptr,
                          s12.get(), nullptr, nullptr, a.constant, a.mask, counted.get(), a.dx,   a.dresidual};
  run_sums(pass, a.epilogue, a.dweight, a.dbias);
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
