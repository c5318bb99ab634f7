// Lines: each run of `inner` elements has one statistic, and each of them a channel of its own (layer norm, RMS norm).
//
// A line comes from memory once: the sweep that writes finds it in cache. Gradients of parameters run across the lines:
// kLinesAtOnce of them are swept side by side, so that one sum in a register serves them all. What is added in which
// order is decided by the shape alone: tiles of lines, float32 for kChunkLines of them, float64 above.
#pragma once

#include "cpu/columns.h"
#include "cpu/passes.h"
#include "cpu/rows.h"
#include "cpu/team.h"

namespace fusednorm::cpu::FUSEDNORM_ISA {
namespace {

constexpr int kLinesAtOnce = 4;
constexpr int64_t kChunkLines = 256, kChunkPacks = 64;  // that are added in float32
constexpr int64_t kLineTiles = 32, kLineTileNumbers = 1 << 19, kLeastTile = 64;
constexpr int64_t kLineTaskElements = 16384;

// One number a channel, in the loops' type, from which a pack's lanes are loaded wherever in the line it begins. Types
// whose packs hold even and odd elements apart (simd.h) are kept so.
template <class T>
class LaneNumbers {
 public:
  using R = Real<T>;
  using V = Vector<R>;
  static constexpr bool kSplit = Pack<T>::parts == 2 && Pack<T>::order(0, 1) == 2;

  // Room for a pack that begins at the last of n.
  explicit LaneNumbers(int64_t n) : half_((n + 2 * Pack<T>::width) / 2), own_(2 * half_), all_(own_.get()) {}
  // Those of an array, `absent` where there is none. They stay where they are if they are of the loops' type.
  LaneNumbers(const Array& from, int64_t n, double absent) : LaneNumbers(kOwnType && is_own(from) ? 0 : n) {
    if (kOwnType && is_own(from))
      all_ = static_cast<R*>(from.data);
    else
      set(from, n, absent);
  }

  // Where the i-th is among all().
  FN_INLINE int64_t place(int64_t i) const { return place(i, 2 * half_); }
  static FN_INLINE int64_t place(int64_t i, int64_t size) { return kSplit ? i / 2 + (i & 1) * (size / 2) : i; }
  R& operator[](int64_t i) const { return all_[place(i)]; }
  FN_INLINE R* at(int64_t i, int part) const { return all_ + (kSplit ? place(i + part) : i + part * kLanes<R>); }
  FN_INLINE V load(int64_t i, int part) const {
    V v;
    memcpy(&v, at(i, part), sizeof v);
    return v;
  }
  template <class There>
  FN_INLINE V load(int64_t i, int part, There there) const {
    if constexpr (kOwnType)
      return FUSEDNORM_ISA::load(reinterpret_cast<const T*>(all_) + i, there).v[0];
    else
      return load(i, part);
  }
  FN_INLINE void add(int64_t i, int part, V more) const {
    const V sum = load(i, part) + more;
    memcpy(at(i, part), &sum, sizeof sum);
  }
  int64_t size() const { return 2 * half_; }
  static int64_t size(int64_t n) { return (n + 2 * Pack<T>::width) / 2 * 2; }
  R* all() const { return all_; }
  void clear() const { memset(all(), 0, size_t(size()) * sizeof(R)); }

 private:
  static constexpr bool kOwnType = sizeof(T) == sizeof(R);

  static bool is_own(const Array& from) { return from && from.dtype == (sizeof(R) == 4 ? DType::f32 : DType::f64); }
  void set(const Array& from, int64_t n, double absent) const {
    if (!from) {
      for (int64_t i = 0; i < size(); ++i) all()[i] = R(absent);
      return;
    }
    clear();
    if (!kSplit && is_own(from))
      memcpy(all(), from.data, size_t(n) * sizeof(R));
    else
      for (int64_t i = 0; i < n; ++i) (*this)[i] = R(from.get(i));
  }

  int64_t half_;
  Scratch<R> own_;
  R* all_;
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
[[gnu::noinline]] void apply_line(const T* x, T* y, int64_t n, const LineAffine<Real<T>>& a,
                                  const LaneNumbers<T>& weight, const LaneNumbers<T>& bias, int64_t channel,
                                  bool streamed) {
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

struct LineShape {
  int64_t groups, inner, tile_entries, tiles;  // tiles: of batch entries

  explicit LineShape(const Fold& f) : groups(f.groups), inner(f.inner) {
    const int64_t channels = groups * inner, most = kLineTileNumbers / channels;
    const int64_t wanted = most < 8 ? 8 : most > kLineTiles ? kLineTiles : most;
    const int64_t entries = (f.batch + wanted - 1) / wanted;
    tile_entries = entries < kLeastTile ? kLeastTile : (entries + kLinesAtOnce - 1) / kLinesAtOnce * kLinesAtOnce;
    tiles = (f.batch + tile_entries - 1) / tile_entries;
  }
};

// `mean`, `rstd`: out [S], each may be null.
template <class T>
void forward_lines(const ForwardPass& pass, double* mean, double* rstd) {
  const Fold& f = pass.fold;
  const RowTree tree(f);
  const T* x = pass.x.template as<const T>();
  T* y = pass.y.template as<T>();
  const bool is_affine = y && (pass.weight || pass.bias), streamed = f.size() * int64_t(sizeof(T)) >= kStreamBytes;
  const int64_t lines = f.statistics(), each = kLineTaskElements / f.inner + 1, tasks = (lines + each - 1) / each;
  const int64_t channels = is_affine ? f.channels() : 0;
  const LaneNumbers<T> weight(pass.weight, channels, 1), bias(pass.bias, channels, 0);
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
          apply_line<true>(x + at, y + at, f.inner, a, weight, bias, channel, streamed);
        else
          apply_line<false>(x + at, y + at, f.inner, a, weight, bias, channel, streamed);
      }
    });
    stream_fence();
  });
}

// Sums over kLines lines a `stride` apart: Σw·dy and Σw·dy·x̂ of each, and those of dy and dy·x̂ down the columns.
template <int kLines, class T>
[[gnu::noinline]] void sum_lines_of(const T* dy, const T* x, int64_t n, int64_t stride, const LineAffine<Real<T>>* a,
                                    const LaneNumbers<T>& weight, int64_t channel, GradSums* found,
                                    const LaneNumbers<T>& u, const LaneNumbers<T>& ux) {
  using R = Real<T>;
  using V = Vector<R>;
  constexpr int64_t width = Pack<T>::width;
  constexpr int wide = kWide<R>;
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
      u.add(channel + i, p, down[p]);
      ux.add(channel + i, p, down_x[p]);
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
[[gnu::noinline]] void grad_line(const T* dy, const T* x, T* dx, int64_t n, const LineAffine<Real<T>>& a, Real<T> slope,
                                 Real<T> shift, const LaneNumbers<T>& weight, int64_t channel, bool streamed) {
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

// `u`, `ux`: out [C], Σdy and Σdy·x̂ of the channels.
template <class T>
void backward_lines(const BackwardPass& pass, double* u, double* ux) {
  using R = Real<T>;
  const Fold& f = pass.fold;
  const LineShape shape(f);
  const int64_t channels = f.channels(), row = f.groups * f.inner;
  const T *dy = pass.dy.template as<const T>(), *x = pass.x.template as<const T>();
  T* dx = pass.dx.template as<T>();
  const bool streamed = f.size() * int64_t(sizeof(T)) >= kStreamBytes;
  const LaneNumbers<T> weight(pass.weight, channels, 1);
  const int64_t numbers = LaneNumbers<T>::size(channels);
  Scratch<double> part(pass.s12 ? shape.tiles * 2 * numbers : 0);

  const auto affine_of = [&](int64_t s) { return LineAffine<R>(pass.mean_of(s), pass.rstd[s]); };
  const auto write = [&](int64_t s) {
    double x_hat = pass.cx ? pass.cx[s] : 0, one = pass.c0 ? pass.c0[s] : 0;
    if (!pass.cx && !pass.c0 && !pass.constant) {
      x_hat = -pass.s12[s].uz / double(f.inner);
      one = pass.mean ? -pass.s12[s].u / double(f.inner) : 0;
    }
    grad_line(dy + s * f.inner, x + s * f.inner, dx + s * f.inner, f.inner, affine_of(s),
              coefficient<R>(pass.rstd[s] * x_hat), R(pass.rstd[s] * one), weight, s % f.groups * f.inner, streamed);
  };
  parallel(threads_for(2 * f.size(), shape.tiles), [&](const Team& team) {
    if (!pass.s12) {
      team.each(f.batch, [&](int64_t b) {
        for (int64_t g = 0; g < f.groups; ++g) write(b * f.groups + g);
      });
      stream_fence();
      return;
    }
    const LaneNumbers<T> down(channels), down_x(channels);
    team.each(shape.tiles, [&](int64_t tile) {
      double *own = part.get() + tile * 2 * numbers, *own_x = own + numbers;
      const int64_t begin = tile * shape.tile_entries,
                    end = begin + shape.tile_entries < f.batch ? begin + shape.tile_entries : f.batch;
      for (int64_t chunk = begin; chunk < end; chunk += kChunkLines) {
        const int64_t chunk_end = chunk + kChunkLines < end ? chunk + kChunkLines : end;
        down.clear();
        down_x.clear();
        for (int64_t b = chunk; b < chunk_end;) {
          const bool several = b + kLinesAtOnce <= chunk_end;
          for (int64_t g = 0; g < f.groups; ++g) {
            LineAffine<R> a[kLinesAtOnce];
            GradSums sums[kLinesAtOnce];
            const int64_t count = several ? kLinesAtOnce : 1, at = b * row + g * f.inner;
            for (int64_t k = 0; k < count; ++k) a[k] = affine_of((b + k) * f.groups + g);
            if (several)
              sum_lines_of<kLinesAtOnce>(dy + at, x + at, f.inner, row, a, weight, g * f.inner, sums, down, down_x);
            else
              sum_lines_of<1>(dy + at, x + at, f.inner, row, a, weight, g * f.inner, sums, down, down_x);
            for (int64_t k = 0; k < count; ++k) {
              pass.s12[(b + k) * f.groups + g] = sums[k];
              if (dx) write((b + k) * f.groups + g);
            }
          }
          b += several ? kLinesAtOnce : 1;
        }
        const auto add = [&](double* to, const R* more) {
          if (chunk == begin)
            for (int64_t i = 0; i < numbers; ++i) to[i] = double(more[i]);
          else
            for (int64_t i = 0; i < numbers; ++i) to[i] += double(more[i]);
        };
        add(own, down.all());
        add(own_x, down_x.all());
      }
    });
    constexpr int64_t some = 1024;
    team.each((channels + some - 1) / some, [&](int64_t i) {
      for (int64_t c = i * some; c < (i + 1) * some && c < channels; ++c) {
        u[c] = ux[c] = 0;
        for (int64_t tile = 0; tile < shape.tiles; ++tile) {
          u[c] += part[tile * 2 * numbers + LaneNumbers<T>::place(c, numbers)];
          ux[c] += part[tile * 2 * numbers + numbers + LaneNumbers<T>::place(c, numbers)];
        }
      }
    });
    stream_fence();
  });
}

}  // namespace
}  // namespace fusednorm::cpu::FUSEDNORM_ISA
