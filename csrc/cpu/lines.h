// Lines: each run of `inner` elements has one statistic, and each of them a channel of its own (layer norm, RMS norm).
//
// A line comes from memory once: the sweep that writes finds it in cache (but for panels: LineShape). Gradients of
// parameters run across the lines: kLinesAtOnce of them are swept side by side, so that one sum in a register serves
// them all. What is added in which order is decided by the shape alone: tiles of lines, float32 for kChunkLines of them,
// float64 above.
#pragma once

#include "cpu/columns.h"
#include "cpu/passes.h"
#include "cpu/rows.h"
#include "cpu/team.h"

namespace fusednorm::cpu::FUSEDNORM_ISA {
namespace {

constexpr int kLinesAtOnce = 4;
constexpr int64_t kChunkLines = 256, kChunkPacks = 64;  // that are added in float32
constexpr int64_t kLineTiles = 32, kLineTileNumbers = 1 << 19, kLeastTile = 32;
constexpr int64_t kLinePanel = 4096, kFewTiles = 4;  // elements of a line; tiles that are too few to share
constexpr int64_t kLineTaskElements = 16384;

// One number a channel, in the loops' type, from which a pack's lanes are loaded wherever in the line it begins. Types
// whose packs hold even and odd elements apart (simd.h) are kept so. Loops take it by value: stores may alias what a
// reference names.
template <class T>
struct LaneNumbers {
  using R = Real<T>;
  using V = Vector<R>;
  static constexpr bool kOwnType = sizeof(T) == sizeof(R);
  static constexpr bool kSplit = Pack<T>::parts == 2 && Pack<T>::order(0, 1) == 2;
  R* all;
  int64_t half;

  // Room for a pack that begins at the last of n.
  static int64_t size(int64_t n) { return (n + 2 * Pack<T>::width) / 2 * 2; }
  int64_t size() const { return 2 * half; }
  // Where the i-th is, of `size`.
  static FN_INLINE int64_t place(int64_t i, int64_t size) { return kSplit ? i / 2 + (i & 1) * (size / 2) : i; }
  R& operator[](int64_t i) const { return all[place(i, 2 * half)]; }
  FN_INLINE R* at(int64_t i, int part) const {
    return all + (kSplit ? place(i + part, 2 * half) : i + part * kLanes<R>);
  }
  FN_INLINE V load(int64_t i, int part) const {
    V v;
    memcpy(&v, at(i, part), sizeof v);
    return v;
  }
  template <class There>
  FN_INLINE V load(int64_t i, int part, There there) const {
    if constexpr (kOwnType)
      return FUSEDNORM_ISA::load(reinterpret_cast<const T*>(all) + i, there).v[0];
    else
      return load(i, part);
  }
  FN_INLINE void add(int64_t i, int part, V more) const {
    const V sum = load(i, part) + more;
    memcpy(at(i, part), &sum, sizeof sum);
  }
  void clear() const { memset(all, 0, size_t(size()) * sizeof(R)); }
};

template <class T>
class OwnLaneNumbers {
 public:
  using R = Real<T>;

  explicit OwnLaneNumbers(int64_t n) : own_(LaneNumbers<T>::size(n)), view_{own_.get(), LaneNumbers<T>::size(n) / 2} {}
  // Those of an array, `absent` where there is none. They stay where they are if they are of the loops' type.
  OwnLaneNumbers(const Array& from, int64_t n, double absent) : OwnLaneNumbers(in_place(from) ? 0 : n) {
    if (in_place(from))
      view_.all = static_cast<R*>(from.data);
    else
      set(from, n, absent);
  }
  const LaneNumbers<T>& view() const { return view_; }

 private:
  static bool is_own(const Array& from) { return from && from.dtype == (sizeof(R) == 4 ? DType::f32 : DType::f64); }
  static bool in_place(const Array& from) { return LaneNumbers<T>::kOwnType && is_own(from); }
  void set(const Array& from, int64_t n, double absent) const {
    if (!from) {
      for (int64_t i = 0; i < view_.size(); ++i) view_.all[i] = R(absent);
      return;
    }
    view_.clear();
    if (!LaneNumbers<T>::kSplit && is_own(from))
      memcpy(view_.all, from.data, size_t(n) * sizeof(R));
    else
      for (int64_t i = 0; i < n; ++i) view_[i] = R(from.get(i));
  }

  Scratch<R> own_;
  LaneNumbers<T> view_;
};

// x̂ = (x − hi)·rstd + shift of a line.
template <class R>
struct LineAffine {
  R hi, rstd, shift;

  LineAffine() = default;
  LineAffine(double mean, double rstd_) {
    const Affine<R> a = affine<R>(mean, rstd_, 1, 0);
    hi = a.hi;
    rstd = a.scale;
    shift = a.shift;
  }
};

template <bool kAffine, class T>
[[gnu::noinline]] void apply_line(const T* x, T* y, int64_t n, LineAffine<Real<T>> a, LaneNumbers<T> weight,
                                  LaneNumbers<T> bias, int64_t channel, bool streamed) {
  using V = Vector<Real<T>>;
  sweep_out(y, n, streamed, [&](int64_t i, auto there, bool past) FN_LAMBDA {
    Lanes<T> v = load(x + i, there);
    for (int p = 0; p < Pack<T>::parts; ++p) {
      v.v[p] = fma(v.v[p] - a.hi, V{} + a.rstd, V{} + a.shift);
      if constexpr (kAffine) v.v[p] = fma(v.v[p], weight.load(channel + i, p, there), bias.load(channel + i, p, there));
    }
    put(y + i, v, there, past);
  });
}

// How backward is cut: into tiles of batch entries, and where these are too few to share, into panels, pieces of the
// lines. Then dx waits for the sums of all of a line's panels, and reads x and dy from memory again.
struct LineShape {
  int64_t tile_entries, tiles, panel, panels;

  explicit LineShape(const Fold& f) {
    const int64_t most = kLineTileNumbers / (f.groups * f.inner);
    const int64_t wanted = most < 8 ? 8 : most > kLineTiles ? kLineTiles : most;
    const int64_t entries = (f.batch + wanted - 1) / wanted;
    tile_entries = entries < kLeastTile ? kLeastTile : (entries + kLinesAtOnce - 1) / kLinesAtOnce * kLinesAtOnce;
    tiles = (f.batch + tile_entries - 1) / tile_entries;
    panel = tiles < kFewTiles && f.inner > kLinePanel ? kLinePanel : f.inner;
    panels = (f.inner + panel - 1) / panel;
  }
};

template <class T>
void forward_lines(const ForwardPass& pass, double* mean, double* rstd) {
  const Fold& f = pass.fold;
  const RowTree tree(f);
  const T* x = pass.x.template as<const T>();
  T* y = pass.y.template as<T>();
  const bool is_affine = y && (pass.weight || pass.bias), streamed = is_streamed(f.size() * int64_t(sizeof(T)), 1);
  const int64_t lines = f.statistics(), each = kLineTaskElements / f.inner + 1, tasks = (lines + each - 1) / each;
  const int64_t channels = is_affine ? f.channels() : 0;
  const OwnLaneNumbers<T> weight(pass.weight, channels, 1), bias(pass.bias, channels, 0);
  const int64_t at_once = f.inner <= kLongSlab<T> ? kLanes<Real<T>> : 1;
  const auto statistics = [&](int64_t s, int64_t count, Moments* m) {
    if (f.inner <= kLongSlab<T>) return short_moments(x + s * f.inner, count, f.inner, pass.center, m);
    sum_block(tree, 1, f.inner, m, [&](int64_t, const Runs& r, int64_t ahead, Moments& more) {
      add_chunk(x + s * f.inner, r, pass.center, ahead, more);
    });
  };
  parallel(threads_for(f.size(), tasks), [&](const Team& team) {
    team.each(tasks, [&](int64_t i) {
      Moments found[kLanes<Real<T>>];
      for (int64_t s = i * each, end = s + each < lines ? s + each : lines, first = s, known = s; s < end; ++s) {
        const int64_t at = s * f.inner, channel = s % f.groups * f.inner;
        double own_mean = 0, own_rstd = 0;
        if (pass.takes_statistics()) {
          if (s == known) {
            first = s;
            known = s + at_once < end ? s + at_once : end;
            statistics(first, known - first, found);
          }
          const Moments& m = found[s - first];
          if (pass.found) pass.found[s] = m;
          own_mean = m.mean;
          own_rstd = 1 / __builtin_sqrt(m.m2 / m.n + pass.eps);
          if constexpr (sizeof(T) == 8)
            if (m.m2 > kLargest) own_rstd = rstd_wide(f, x, nullptr, s, pass.center, pass.eps);
        } else {
          own_mean = pass.mean(s);
          own_rstd = pass.rstd(s);
        }
        if (mean) mean[s] = own_mean;
        if (rstd) rstd[s] = own_rstd;
        if (!y) continue;
        const LineAffine<Real<T>> a(own_mean, own_rstd);
        if (is_affine)
          apply_line<true>(x + at, y + at, f.inner, a, weight.view(), bias.view(), channel, streamed);
        else
          apply_line<false>(x + at, y + at, f.inner, a, weight.view(), bias.view(), channel, streamed);
      }
    });
    stream_fence();
  });
}

// Sums over n elements of kLines lines a `stride` apart: Σw·dy and Σw·dy·x̂ of each, and down the columns those of dy and
// dy·x̂, which are added to u and ux from number `column` on.
template <int kLines, class T>
[[gnu::noinline]] void sum_lines_of(const T* dy, const T* x, int64_t n, int64_t stride,
                                    const LineAffine<Real<T>>* given, LaneNumbers<T> weight, int64_t channel,
                                    GradSums* found, LaneNumbers<T> u, LaneNumbers<T> ux, int64_t column) {
  using R = Real<T>;
  using V = Vector<R>;
  constexpr int64_t width = Pack<T>::width;
  constexpr int wide = kWide<R>;
  LineAffine<R> a[kLines];
  for (int k = 0; k < kLines; ++k) a[k] = given[k];
  D total[kLines][2][wide] = {};
  const auto step = [&](int64_t i, auto there, V(&s)[kLines], V(&q)[kLines]) FN_LAMBDA {
    V down[Pack<T>::parts] = {}, down_x[Pack<T>::parts] = {}, w[Pack<T>::parts];
    for (int p = 0; p < Pack<T>::parts; ++p) w[p] = weight.load(channel + i, p, there);
#pragma GCC unroll 4
    for (int k = 0; k < kLines; ++k) {
      const Lanes<T> g = load(dy + k * stride + i, there), v = load(x + k * stride + i, there);
      for (int p = 0; p < Pack<T>::parts; ++p) {
        const V own = live<T>(g.v[p], p, there), x_hat = fma(v.v[p] - a[k].hi, V{} + a[k].rstd, V{} + a[k].shift);
        const V weighted = w[p] * own;
        down[p] += own;
        down_x[p] = fma(own, x_hat, down_x[p]);
        s[k] += weighted;
        q[k] = fma(weighted, x_hat, q[k]);
      }
    }
    for (int p = 0; p < Pack<T>::parts; ++p) {
      u.add(column + i, p, down[p]);
      ux.add(column + i, p, down_x[p]);
    }
  };
  for (int64_t begin = 0; begin < n; begin += kChunkPacks * width) {
    const int64_t end = begin + kChunkPacks * width < n ? begin + kChunkPacks * width : n;
    V s[kLines] = {}, q[kLines] = {};
    int64_t i = begin;
    for (; i + width <= end; i += width) step(i, Whole{}, s, q);
    if (i < end) step(i, Part{int(end - i)}, s, q);
    for (int k = 0; k < kLines; ++k) {
      D more[wide];
      widen(s[k], more);
      for (int w = 0; w < wide; ++w) total[k][0][w] += more[w];
      widen(q[k], more);
      for (int w = 0; w < wide; ++w) total[k][1][w] += more[w];
    }
  }
  for (int k = 0; k < kLines; ++k)
    for (int w = 0; w < wide; ++w) found[k].merge({sum_lanes(total[k][0][w]), sum_lanes(total[k][1][w])});
}

template <class T>
[[gnu::noinline]] void grad_line(const T* dy, const T* x, T* dx, int64_t n, LineAffine<Real<T>> a, Real<T> slope,
                                 Real<T> shift, LaneNumbers<T> weight, int64_t channel, bool streamed) {
  using V = Vector<Real<T>>;
  sweep_out(dx, n, streamed, [&](int64_t i, auto there, bool past) FN_LAMBDA {
    const Lanes<T> g = load(dy + i, there);
    Lanes<T> v = load(x + i, there);
    for (int p = 0; p < Pack<T>::parts; ++p) {
      const V x_hat = fma(v.v[p] - a.hi, V{} + a.rstd, V{} + a.shift);
      v.v[p] = fma(V{} + a.rstd, weight.load(channel + i, p, there) * g.v[p], fma(V{} + slope, x_hat, V{} + shift));
    }
    put(dx + i, v, there, past);
  });
}

template <class T>
void backward_lines(const BackwardPass& pass, const Array& dweight, const Array& dbias) {
  using R = Real<T>;
  const Fold& f = pass.fold;
  const LineShape shape(f);
  const int64_t channels = f.channels(), row = f.groups * f.inner;
  const T *dy = pass.dy.template as<const T>(), *x = pass.x.template as<const T>();
  T* dx = pass.dx.template as<T>();
  const bool streamed = is_streamed(f.size() * int64_t(sizeof(T)), 2);
  const OwnLaneNumbers<T> own_weight(pass.weight, channels, 1);
  const LaneNumbers<T> weight = own_weight.view();
  const int64_t columns = f.groups * shape.panel, numbers = LaneNumbers<T>::size(columns);
  Scratch<double> part(pass.s12 ? shape.tiles * shape.panels * 2 * numbers : 0);
  Scratch<GradSums> of_panel(pass.s12 && shape.panels > 1 ? shape.panels * f.statistics() : 0);

  const auto affine_of = [&](int64_t s) { return LineAffine<R>(pass.mean_of(s), pass.rstd[s]); };
  const auto length = [&](int64_t panel) {
    const int64_t left = f.inner - panel * shape.panel;
    return left < shape.panel ? left : shape.panel;
  };
  const auto write = [&](int64_t s, int64_t begin, int64_t n) {
    double x_hat = pass.cx ? pass.cx[s] : 0, one = pass.c0 ? pass.c0[s] : 0;
    if (!pass.cx && !pass.c0 && !pass.constant) {
      x_hat = -pass.s12[s].uz / double(f.inner);
      one = pass.mean ? -pass.s12[s].u / double(f.inner) : 0;
    }
    const int64_t at = s * f.inner + begin;
    grad_line(dy + at, x + at, dx + at, n, affine_of(s), coefficient<R>(pass.rstd[s] * x_hat), R(pass.rstd[s] * one),
              weight, s % f.groups * f.inner + begin, streamed);
  };
  parallel(threads_for(2 * f.size(), shape.tiles * shape.panels), [&](const Team& team) {
    if (!pass.s12) {
      team.each(f.batch, [&](int64_t b) {
        for (int64_t g = 0; g < f.groups; ++g) write(b * f.groups + g, 0, f.inner);
      });
      stream_fence();
      return;
    }
    const OwnLaneNumbers<T> down(columns), down_x(columns);
    team.each(shape.tiles * shape.panels, [&](int64_t i) {
      double *own = part.get() + i * 2 * numbers, *own_x = own + numbers;
      const int64_t panel = i % shape.panels, tile = i / shape.panels, n = length(panel);
      const int64_t begin = tile * shape.tile_entries,
                    end = begin + shape.tile_entries < f.batch ? begin + shape.tile_entries : f.batch;
      for (int64_t chunk = begin; chunk < end; chunk += kChunkLines) {
        const int64_t chunk_end = chunk + kChunkLines < end ? chunk + kChunkLines : end;
        down.view().clear();
        down_x.view().clear();
        for (int64_t b = chunk; b < chunk_end;) {
          const bool several = b + kLinesAtOnce <= chunk_end;
          for (int64_t g = 0; g < f.groups; ++g) {
            LineAffine<R> a[kLinesAtOnce];
            GradSums sums[kLinesAtOnce];
            const int64_t count = several ? kLinesAtOnce : 1, channel = g * f.inner + panel * shape.panel,
                          at = b * row + channel;
            for (int64_t k = 0; k < count; ++k) a[k] = affine_of((b + k) * f.groups + g);
            if (several)
              sum_lines_of<kLinesAtOnce>(dy + at, x + at, n, row, a, weight, channel, sums, down.view(), down_x.view(),
                                         g * shape.panel);
            else
              sum_lines_of<1>(dy + at, x + at, n, row, a, weight, channel, sums, down.view(), down_x.view(),
                              g * shape.panel);
            for (int64_t k = 0; k < count; ++k) {
              const int64_t s = (b + k) * f.groups + g;
              if (shape.panels > 1) {
                of_panel[s * shape.panels + panel] = sums[k];
                continue;
              }
              pass.s12[s] = sums[k];
              if (dx) write(s, 0, n);
            }
          }
          b += several ? kLinesAtOnce : 1;
        }
        const auto add = [&](double* to, const R* more) {
          if (chunk == begin)
            for (int64_t k = 0; k < numbers; ++k) to[k] = double(more[k]);
          else
            for (int64_t k = 0; k < numbers; ++k) to[k] += double(more[k]);
        };
        add(own, down.view().all);
        add(own_x, down_x.view().all);
      }
    });
    if (shape.panels > 1) {
      team.each(f.statistics(), [&](int64_t s) { pass.s12[s] = sum_of(&of_panel[s * shape.panels], shape.panels); });
      if (dx)
        team.each(f.statistics() * shape.panels, [&](int64_t i) {
          const int64_t panel = i % shape.panels;
          write(i / shape.panels, panel * shape.panel, length(panel));
        });
    }
    constexpr int64_t some = 512;
    team.each((channels + some - 1) / some, [&](int64_t i) {
      const int64_t end = (i + 1) * some < channels ? (i + 1) * some : channels;
      for (int64_t c = i * some, n; c < end; c += n) {  // of one line's panel
        const int64_t in_line = c % f.inner, panel = in_line / shape.panel, in_panel = in_line % shape.panel;
        const int64_t left = length(panel) - in_panel, column = c / f.inner * shape.panel + in_panel;
        double u[some] = {}, ux[some] = {};
        n = left < end - c ? left : end - c;
        for (int64_t tile = 0; tile < shape.tiles; ++tile) {
          const double* own = part.get() + (tile * shape.panels + panel) * 2 * numbers;
          for (int64_t k = 0; k < n; ++k) {
            const int64_t at = LaneNumbers<T>::place(column + k, numbers);
            u[k] += own[at];
            ux[k] += own[numbers + at];
          }
        }
        for (int64_t k = 0; k < n; ++k) dweight.set(c + k, ux[k]);
        for (int64_t k = 0; k < n; ++k) dbias.set(c + k, u[k]);
      }
    });
    stream_fence();
  });
}

}  // namespace
}  // namespace fusednorm::cpu::FUSEDNORM_ISA
