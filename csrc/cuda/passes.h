// What a kernel is asked to do, as in cpu/passes.h: a verb is one of the two passes with parts left out.
#pragma once

#include <array>

#include "core/backend.h"
#include "core/grad_sums.h"
#include "core/moments.h"
#include "cuda/team.h"

namespace fusednorm::cuda {

// Packs of a thread that are summed in float32.
constexpr int kChunk = 64;

// A statistic of several cells (core/fold.h) is taken in turns: the cells' own, of a fold of cells; what they make
// together; and with that given, the cells once more.
constexpr int64_t kLongGroup = 32768;
// Folds for the loops of lines.h, as far as these know what else is asked for. Groups of channels that a cluster cannot
// hold are better off as rows.
inline bool fits_lines(const Fold& f) {
  return f.is_lines() || (f.outer == 1 && f.share() > 1 && f.inner <= kLongGroup);
}

struct ForwardPass {
  Fold fold;
  Divisor share;             // cells that have a given statistic in common
  Array x, weight, bias, y;  // no y: statistics only
  EpilogueArgs epilogue;
  const uint8_t* mask;                    // of the statistics
  const double *given_mean, *given_rstd;  // no rstd: taken from x; no mean: 0
  bool evaluation;                        // or from the running statistics
  bool center;
  double eps;
  RunningArgs running;
  bool updates;                      // the running statistics, here and now
  double update_weight;              // of the new value
  double *count, *mean, *m2, *rstd;  // out [S]; each may be null
  void* sums;                        // out Sums [S], or null

  FN_INLINE bool takes_statistics() const { return !given_rstd && !evaluation; }
  // Threads that fit into an SM's registers: 96 for each, or 128 where residuals, masks and exponentials need them.
  static constexpr int resident(bool general) { return general ? 512 : 640; }
  static constexpr int kLineThreads = 512;  // in lines.h
  // Epilogues that the plain kernel knows.
  bool is_plain() const { return epilogue.activation <= Activation::relu && !epilogue.residual && !mask; }

  // The loops of lines.h know neither masks nor epilogues.
  bool is_lines() const {
    return fits_lines(fold) && !mask && !epilogue.residual && epilogue.activation == Activation::identity;
  }
  FN_INLINE bool takes_line_sums() const { return takes_statistics(); }
  FN_INLINE bool takes_columns() const { return false; }
  int line_parameters() const { return y ? 2 : 0; }

  std::array<const void*, 3> tensors() const { return {x.data, y.data, epilogue.residual.data}; }
  Work work() const {
    const bool takes = takes_statistics();
    return {.read = 1 + bool(epilogue.residual), .written = bool(y), .keeps = 1, .merges = takes, .again = takes && y};
  }
};

struct BackwardPass {
  Fold fold;
  Divisor share;
  Array dy, x;
  const double *mean, *rstd;  // no mean: 0
  Array weight, bias;
  EpilogueArgs epilogue;
  bool sums;              // Σu, Σu·x̂ are taken
  const double *cx, *c0;  // [S]; null: from the sums (batch statistics), unless constant
  bool constant;
  double n;                 // elements of a statistic, where there is no mask
  const uint8_t* mask;      // where cx and c0 apply
  Array dx, dresidual;      // no dx: sums only
  double *s1, *s2;          // out [S]: Σw·u, Σw·u·x̂; may be null
  double *u, *ux;           // out [S]: Σu, Σu·x̂; may be null
  double *own_cx, *own_c0;  // out [S]: what the sums bring into dx; may be null
  Array dweight, dbias;     // written by the pass itself where there is one batch entry; may be null

  // dx does not wait for the sums.
  FN_INLINE bool known() const { return constant || cx || c0; }
  static constexpr int resident(bool) { return 512; }
  static constexpr int kLineThreads = 512;  // in lines.h
  bool is_lines() const {
    return fits_lines(fold) && !mask && !dresidual && epilogue.activation == Activation::identity;
  }
  // Of lines: along them, and across.
  FN_INLINE bool takes_line_sums() const { return s1 || s2 || (dx && !known()); }
  FN_INLINE bool takes_columns() const { return sums; }
  int line_parameters() const { return 1; }
  // What the plain kernel knows: neither both at once nor a dx of dy alone.
  bool is_plain() const {
    return epilogue.activation <= Activation::relu && !epilogue.residual && !mask && !dresidual &&
           !(dx && (constant || (sums && known())));
  }

  std::array<const void*, 5> tensors() const {
    return {x.data, dy.data, epilogue.residual.data, dx.data, dresidual.data};
  }
  Work work() const {
    return {.read = 2 + bool(epilogue.residual),
            .written = bool(dx) + bool(dresidual),
            .keeps = 2,
            .merges = sums,
            .again = sums && dx && !known()};
  }
};

// How the tensors of a pass are cut into slabs.
template <class T, class Pass>
Layout layout_of(const Pass& pass, int sms) {
  constexpr uintptr_t width = kWidth<T>;
  const auto anchor = [](const void* p) { return int(reinterpret_cast<uintptr_t>(p) / sizeof(T) % width); };
  const auto tensors = pass.tensors();
  const int first = anchor(tensors[0]);
  bool alike = true;
  for (const void* p : tensors) alike = alike && (!p || anchor(p) == first);
  if (pass.fold.is_columns()) return column_layout<T>(pass.fold, alike && first == 0, pass.mask, 2 * sms);
  return row_layout<T>(pass.fold, first, alike);
}

template <class T, class Pass>
Plan plan_of(const Pass& pass, const Layout& layout, const Device& device) {
  Work work = pass.work();
  work.slabs = layout.slabs;
  work.packs = layout.runs * layout.packs.by;
  work.together = layout.together();
  work.columns = layout.columns;
  work.real = sizeof(Real<T>);
  return plan(work, device);
}

// Whose column an owner's is. `first`: not a further copy of it.
struct Column {
  bool there, first;
  int64_t statistic, channel;

  template <bool kColumns>
  FN_DEVICE static Column of(const Layout& l, int slab) {
    const int64_t entry = l.per_entry.divide(uint32_t(slab)), s = slab - entry * l.per_entry.by, c = thread();
    if (!kColumns) return {c == 0, true, slab, s};
    const int64_t v = s * l.pitch + c, channel = l.repeat == 1 ? v : uint32_t(v) % uint32_t(l.groups);
    const bool there = c < l.columns && c < l.pitch && v < l.row;
    return {there, v < l.groups, entry * l.groups + channel, channel};
  }
};

// Coefficients of `kSome` neighbouring columns from number `from` on; of rows there is one column.
template <bool kColumns, class R, int kCount>
FN_DEVICE void take_coefficients(const R* row, int from, R (&v)[kCount]) {
  if constexpr (kColumns) {
    take_some(row + from, v);
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) v[j] = *row;
  }
}

}  // namespace fusednorm::cuda
