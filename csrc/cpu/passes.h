// What a loop nest is asked to do. A verb is one of the two passes with parts left out, so each nest (rows.h,
// columns.h) is written once: `moments` is a forward that stores no y, `normalize` one that takes no statistics, and so
// on.
#pragma once

#include "core/backend.h"
#include "core/grad_sums.h"
#include "core/moments.h"
#include "cpu/simd.h"

namespace fusednorm::cpu::FUSEDNORM_ISA {

// `cell`: what a statistic and a channel have in common (core/fold.h); where `share` is 1, there is one a statistic.
struct ForwardPass {
  Fold fold;
  Array x, weight = {}, bias = {}, y = {};  // no y: statistics only
  EpilogueArgs epilogue = {};
  const uint8_t* mask = nullptr;                              // of the statistics
  const double *given_mean = nullptr, *given_rstd = nullptr;  // no rstd: taken from x; no mean: 0
  Moments* found = nullptr;                                   // [S] out, unless given
  bool center = true;
  double eps = 0;
  int64_t share = fold.share(), channels = fold.channels();

  FN_INLINE bool takes_statistics() const { return !given_rstd; }
  FN_INLINE double mean(int64_t s) const {
    if (given_rstd) return given_mean ? given_mean[s] : 0;
    return found[s].mean;
  }
  FN_INLINE double rstd(int64_t s) const {
    if (given_rstd) return given_rstd[s];
    return 1 / __builtin_sqrt((found[s].n > 0 ? found[s].m2 / found[s].n : 0) + eps);
  }
  // Of `count` cells from number `cell` on.
  template <class R>
  FN_INLINE void affine(int64_t cell, int64_t count, Affine<R>* to) const {
    int64_t s = cell / share, left = share - cell % share, c = cell % channels;
    for (int64_t k = 0; k < count; ++s, left = share) {
      const double own_mean = mean(s), own_rstd = rstd(s);
      for (; left > 0 && k < count; --left, ++k) {
        to[k] = fusednorm::affine<R>(own_mean, own_rstd, weight.get_or(c, 1), bias.get_or(c, 0));
        if (++c == channels) c = 0;
      }
    }
  }
  template <class R>
  FN_INLINE Affine<R> affine(int64_t cell) const {
    Affine<R> one;
    affine(cell, 1, &one);
    return one;
  }
};

template <class R>
struct GradCoefficients {
  R hi, rstd, scale, slope, shift;  // GradAffine
  R pre_shift;                      // Affine's, for the activation's derivative; the scale is the same
};

struct BackwardPass {
  Fold fold;
  Array dy, x;
  const double *mean, *rstd;  // no mean: 0, and no constant
  Array weight = {}, bias = {};
  EpilogueArgs epilogue = {};
  GradSums *found = nullptr, *s12 = nullptr;  // out: Σu, Σu·z [cells] and Σw·u, Σw·u·x̂ [S]; null: not taken
  const double *cx = nullptr, *c0 = nullptr;  // [S]; null: from the sums (batch statistics), unless constant
  bool constant = false;
  const uint8_t* mask = nullptr;    // where cx and c0 apply
  const double* counted = nullptr;  // [batch]: positions that the mask counts; null: all
  Array dx = {}, dresidual = {};    // no dx: sums only
  int64_t share = fold.share(), channels = fold.channels();

  // Between the sweeps: the sums over `count` statistics from number `first` on, of those of their cells.
  template <class R>
  FN_INLINE void sum_cells(int64_t first, int64_t count) const {
    int64_t cell = first * share, c = cell % channels;
    for (int64_t s = first; s < first + count; ++s) {
      const double own_lo = lo<R>(s);
      GradSums sum;
      for (const int64_t end = cell + share; cell < end; ++cell) {
        const double w = weight.get_or(c, 1);
        sum.merge({w * found[cell].u, w * found[cell].ux(own_lo, rstd[s])});
        if (++c == channels) c = 0;
      }
      s12[s] = sum;
    }
  }

  // The pre-activation is recomputed, for the activation's derivative.
  FN_INLINE bool needs_pre() const { return epilogue.activation != Activation::identity; }
  // Of `count` cells from number `cell` on. `sums_only`: without what follows from the sums.
  template <class R>
  FN_INLINE void coefficients(int64_t cell, int64_t count, bool sums_only, GradCoefficients<R>* to) const {
    int64_t s = cell / share, left = share - cell % share, c = cell % channels;
    for (int64_t k = 0; k < count; ++s, left = share) {
      const double n = counted ? counted[s / fold.groups] * double(share) : double(fold.per_statistic());
      double x_hat = 0, one = 0;
      if (cx || c0) {
        x_hat = cx ? cx[s] : 0;
        one = c0 ? c0[s] : 0;
      } else if (!constant && !sums_only && n > 0) {
        x_hat = -s12[s].uz / n;
        one = mean ? -s12[s].u / n : 0;
      }
      const GradAffine<R> g = fusednorm::grad_affine<R>(mean_of(s), rstd[s], 1, x_hat, one);
      for (; left > 0 && k < count; --left, ++k) {
        to[k] = {g.hi, g.rstd, 0, g.slope, g.shift, 0};
        if (needs_pre() || !sums_only) {
          const Affine<R> a =
              fusednorm::affine<R>(mean_of(s), rstd[s], weight.get_or(c, 1), needs_pre() ? bias.get_or(c, 0) : 0);
          to[k].scale = a.scale;
          if (needs_pre()) to[k].pre_shift = a.shift;
        }
        if (++c == channels) c = 0;
      }
    }
  }
  template <class R>
  FN_INLINE GradCoefficients<R> coefficients(int64_t cell, bool sums_only = false) const {
    GradCoefficients<R> one;
    coefficients(cell, 1, sums_only, &one);
    return one;
  }
  FN_INLINE double mean_of(int64_t s) const { return mean ? mean[s] : 0; }
  template <class R>
  FN_INLINE double lo(int64_t s) const {
    return mean_of(s) - double(pivot<R>(mean_of(s), rstd[s]));
  }
};

namespace {

// A mask cuts a run of positions into stretches that count and stretches that do not: call(begin, length, counted).
template <class Call>
FN_INLINE void stretches(const uint8_t* mask, int64_t n, Call&& call) {
  for (int64_t begin = 0, end; begin < n; begin = end) {
    for (end = begin + 1; end < n && !mask[end] == !mask[begin]; ++end) {
    }
    call(begin, end - begin, mask[begin] != 0);
  }
}

// The coefficients of a pack, one for each lane (Affine and GradAffine in core/).
template <class T>
struct PackAffine {
  using V = Vector<Real<T>>;
  using One = Affine<Real<T>>;
  struct {
    V hi, scale, shift;
  } part[Pack<T>::parts];

  template <class Lanes>
  static FN_INLINE PackAffine of(Lanes&& lanes) {
    PackAffine pack;
    for (int p = 0; p < Pack<T>::parts; ++p)
      pack.part[p] = {lanes(p, &One::hi), lanes(p, &One::scale), lanes(p, &One::shift)};
    return pack;
  }
};
template <class T>
struct PackGrad {
  using V = Vector<Real<T>>;
  using One = GradCoefficients<Real<T>>;
  struct {
    V hi, rstd, scale, slope, shift, pre_shift;
  } part[Pack<T>::parts];

  template <class Lanes>
  static FN_INLINE PackGrad of(Lanes&& lanes) {
    PackGrad pack;
    for (int p = 0; p < Pack<T>::parts; ++p)
      pack.part[p] = {lanes(p, &One::hi),    lanes(p, &One::rstd),  lanes(p, &One::scale),
                      lanes(p, &One::slope), lanes(p, &One::shift), lanes(p, &One::pre_shift)};
    return pack;
  }
};
// All lanes alike.
template <class Coefficients>
FN_INLINE Coefficients all_lanes(const typename Coefficients::One& one) {
  using V = typename Coefficients::V;
  return Coefficients::of([&](int, auto member) FN_LAMBDA { return V{} + one.*member; });
}
// `own` for the pack's first elements, `next` for the others.
template <class T, class Coefficients>
FN_INLINE Coefficients mixed_lanes(const typename Coefficients::One& own, const typename Coefficients::One& next,
                                   Part first) {
  using V = typename Coefficients::V;
  return Coefficients::of([&](int part, auto member) FN_LAMBDA {
    return Math::select(lanes_of<T>(part, first), V{} + own.*member, V{} + next.*member);
  });
}

// The epilogue as the drivers of the loops see it. `residual` may be null.
template <class T>
struct Epilogue {
  Activation activation;
  Real<T> slope;
  const T* residual;

  explicit Epilogue(const EpilogueArgs& e)
      : activation(e.activation), slope(Real<T>(e.slope)), residual(e.residual.template as<const T>()) {}
  // For pointers that are moved on by `offset` elements.
  FN_INLINE Epilogue at(int64_t offset) const {
    Epilogue moved = *this;
    if (residual) moved.residual += offset;
    return moved;
  }
};

// And as the loops do: what there is to compute for a vector, known when they are compiled where that pays. `any` finds
// out for each vector, and calls for what is neither identity nor ReLU. float64, whose loops wait for twice as much
// memory, and the instruction set that only has to run have few: all but identity is `any`.
enum class Kind { identity, relu, any };
#if defined(FUSEDNORM_GENERIC)
template <class T>
constexpr bool kFewEpilogues = true;
#else
template <class T>
constexpr bool kFewEpilogues = sizeof(T) == 8;
#endif

template <class V, class R>
[[gnu::noinline]] V activate_any(Activation activation, R slope, V pre) {
  return activate<Math>(activation, slope, pre);
}
template <class V, class R>
[[gnu::noinline]] V activation_gradient_any(Activation activation, R slope, V dy, V pre) {
  return activation_gradient<Math>(activation, slope, dy, pre);
}

template <class T, Kind kKind, bool kResidual>
struct KnownEpilogue : Epilogue<T> {
  using Element = T;
  using V = Vector<Real<T>>;
  static constexpr bool kNeedsPre = kKind != Kind::identity;  // for the derivative

  FN_INLINE explicit KnownEpilogue(const Epilogue<T>& e) : Epilogue<T>(e) {}

  FN_INLINE bool has_residual() const { return kKind == Kind::any ? this->residual != nullptr : kResidual; }
  template <class There>
  FN_INLINE Lanes<T> load_residual(int64_t i, There there) const {
    if (has_residual()) return load(this->residual + i, there);
    return {};
  }
  // The same operations in the same order wherever pre is needed.
  FN_INLINE V pre(V centered, V scale, V shift, V added) const {
    const V p = fma(centered, scale, shift);
    return has_residual() ? p + added : p;
  }
  FN_INLINE bool is(Kind kind, Activation which) const {
    return kKind == kind || (kKind == Kind::any && kFewEpilogues<T> && this->activation == which);
  }
  FN_INLINE V value(V p) const {
    if (is(Kind::identity, Activation::identity)) return p;
    if (is(Kind::relu, Activation::relu)) return relu<Math>(p);
    return activate_any(this->activation, this->slope, p);
  }
  FN_INLINE V gradient(V dy, V p) const {
    if (kKind == Kind::identity) return dy;
    if (is(Kind::relu, Activation::relu)) return relu_gradient<Math>(dy, p);
    return activation_gradient_any(this->activation, this->slope, dy, p);
  }
};

// Loops are reached through a table for each epilogue, so that what drives them is compiled once. Loops: a table for
// elements T; `of<E>()`, the one for a KnownEpilogue; kBackward, where a residual plays no part without an activation.
template <class Loops>
Loops loops_for(const EpilogueArgs& e) {
  using T = typename Loops::Element;
  const bool is_plain = e.activation == Activation::identity;
  if (is_plain && (Loops::kBackward || !e.residual))
    return Loops::template of<KnownEpilogue<T, Kind::identity, false>>();
  if constexpr (!kFewEpilogues<T>) {
    if constexpr (!Loops::kBackward)
      if (is_plain) return Loops::template of<KnownEpilogue<T, Kind::identity, true>>();
    if (e.activation == Activation::relu) {
      if (e.residual) return Loops::template of<KnownEpilogue<T, Kind::relu, true>>();
      return Loops::template of<KnownEpilogue<T, Kind::relu, false>>();
    }
  }
  return Loops::template of<KnownEpilogue<T, Kind::any, true>>();
}

template <class T, class There>
FN_INLINE void put(T* p, const Lanes<T>& v, There there, bool) {
  store(p, v, there);
}
template <class T>
FN_INLINE void put(T* p, const Lanes<T>& v, Whole there, bool past) {
  past ? stream(p, v) : store(p, v, there);
}

// y of the pack at element i.
template <class E, class T, class There>
FN_INLINE void apply_pack(const E& e, const T* x, T* y, int64_t i, const PackAffine<T>& a, There there, bool past) {
  const Lanes<T> added = e.load_residual(i, there);
  Lanes<T> v = load(x + i, there);
  for (int p = 0; p < Pack<T>::parts; ++p)
    v.v[p] = e.value(e.pre(v.v[p] - a.part[p].hi, a.part[p].scale, a.part[p].shift, added.v[p]));
  put(y + i, v, there, past);
}

// u = dy·act'(pre) and z = (x − hi)·rstd of the pack at element i.
template <class T>
struct GradPack {
  Lanes<T> u, z;
};
template <class E, class T, class There>
FN_INLINE GradPack<T> load_grad_pack(const E& e, const T* dy, const T* x, int64_t i, const PackGrad<T>& g,
                                     There there) {
  GradPack<T> at{load(dy + i, there), load(x + i, there)};
  const Lanes<T> added = E::kNeedsPre ? e.load_residual(i, there) : Lanes<T>{};
  for (int p = 0; p < Pack<T>::parts; ++p) {
    const auto& c = g.part[p];
    auto &u = at.u.v[p], &z = at.z.v[p];
    z = z - c.hi;
    if constexpr (E::kNeedsPre) u = e.gradient(u, e.pre(z, c.scale, c.pre_shift, added.v[p]));
    z = z * c.rstd;
  }
  return at;
}

template <class T>
struct GradOut {
  T *dx, *dresidual;  // dresidual may be null

  FN_INLINE GradOut at(int64_t offset) const { return {dx + offset, dresidual ? dresidual + offset : nullptr}; }
  // Both are streamed only where they are aligned alike.
  FN_INLINE bool alike() const { return !dresidual || to_alignment(dx) == to_alignment(dresidual); }
};

// dx, and dresidual, of the pack at element i. kConstant: the statistics were constants.
template <bool kConstant, class E, class T, class There>
FN_INLINE void grad_pack(const E& e, const T* dy, const T* x, const GradOut<T>& out, int64_t i, const PackGrad<T>& g,
                         There there, bool past) {
  GradPack<T> at = load_grad_pack(e, dy, x, i, g, there);
  for (int p = 0; p < Pack<T>::parts; ++p) {
    const auto& c = g.part[p];
    if constexpr (kConstant)
      at.z.v[p] = c.scale * at.u.v[p];
    else
      at.z.v[p] = fma(c.scale, at.u.v[p], fma(c.slope, at.z.v[p], c.shift));
  }
  put(out.dx + i, at.z, there, past);
  if (out.dresidual) put(out.dresidual + i, at.u, there, past);
}

// Sums of a chunk that overflowed, met NaN or lost digits to underflow: the chunk is done again, wider.
template <class T>
FN_INLINE bool out_of_range(double sum, double squares) {
  if (sizeof(Real<T>) == 8) return !(squares < 1e300);
  return !(squares > 1e-28 && squares < 1e38) && !(sum == 0 && squares == 0);
}

constexpr double kLargest = 1.7976931348623157e308;

// 1/√(variance + eps) of a statistic whose variance is beyond float64 though its square root is not.
[[gnu::noinline, maybe_unused]] double rstd_wide(const Fold& f, const double* x, const uint8_t* mask, int64_t s,
                                                 bool center, double eps) {
  const double* first = x + (s / f.groups * f.outer * f.groups + s % f.groups) * f.inner;
  const uint8_t* first_position = mask ? mask + s / f.groups * f.outer * f.span : nullptr;
  long double n = 0, mean = 0, m2 = 0;
  const auto each = [&](auto&& add) {
    for (int64_t o = 0; o < f.outer; ++o)
      for (int64_t i = 0; i < f.inner; ++i)
        if (!mask || first_position[o * f.span + i % f.span])
          add(static_cast<long double>(first[o * f.groups * f.inner + i]));
  };
  each([&](long double v) {
    n += 1;
    if (center) mean += v;
  });
  mean /= n;
  each([&](long double v) { m2 += (v - mean) * (v - mean); });
  return double(1 / __builtin_sqrtl(m2 / n + eps));
}

}  // namespace
}  // namespace fusednorm::cpu::FUSEDNORM_ISA
