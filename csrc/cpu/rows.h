// Rows: memory in which each run of `inner` elements has one statistic, and each run of `span` one channel (channels
// first).
//
// A slab is what one statistic is taken over: `outer` runs. For gradients it is a cell, where these differ (group norm):
// the sums of a statistic's cells are added up between the sweeps. It is cut, by its shape alone, into chunks of some
// thousand elements (float32 sums) and tiles of 32 chunks (the unit of work when a slab is shared among threads). The tree of
// merges follows that cut, not the threads, so the bits do too.
//
// Fused: a thread takes a whole slab, and the second sweep finds x in cache; memory is read once. Where there are too
// few slabs for the threads, the tiles are shared instead, with a barrier between the sweeps.
//
// Where a slab's runs lie apart, what comes next is fetched ahead. A slab of one run is left to the hardware, which does
// that by itself: instructions on top made it slower, by half where it lies in L3.
#pragma once

#include "cpu/passes.h"
#include "cpu/team.h"

namespace fusednorm::cpu::FUSEDNORM_ISA {
namespace {

// A chunk's float32 sums run in four registers: each lane adds 64 numbers.
constexpr int64_t kChunk = 64 * 4 * kLanes<float>, kTile = 32;
// Shorter runs than this are written together with those of the neighbouring slabs, as memory lies: run by run, each in
// another page, they cost up to 4 times as much. Tensors below kNeighboursFrom bytes lie in L2 anyway.
constexpr int64_t kShortRunBytes = 3072, kNeighbourBytes = 8192, kNeighboursFrom = 1 << 20;
constexpr int64_t kWriteElements = 32768;  // a task's share of a sweep that only writes
constexpr int64_t kAheadBytes = 4096;      // that a sweep of writes fetches ahead
constexpr int64_t kMaxBlock = 32;          // slabs a thread takes at once, neighbours in memory

struct Runs {
  int64_t offset, stride, count, length;  // elements
};

class RowTree {
 public:
  explicit RowTree(const Fold& f) : outer_(f.outer), inner_(f.inner), stride_(f.groups * f.inner) {
    pieces_ = (inner_ + kChunk - 1) / kChunk;
    length_ = ((inner_ + pieces_ - 1) / pieces_ + 63) / 64 * 64;
    pieces_ = (inner_ + length_ - 1) / length_;
    // Not more runs than this: one shorter than a register adds all of them into the same lanes, in float32.
    runs_ = pieces_ > 1 || inner_ > kChunk / 2 ? 1 : kChunk / inner_ < 32 ? kChunk / inner_ : 32;
    chunks_ = pieces_ > 1 ? outer_ * pieces_ : (outer_ + runs_ - 1) / runs_;
  }
  bool one_run() const { return outer_ == 1; }
  int64_t tiles() const { return (chunks_ + kTile - 1) / kTile; }
  int64_t chunk_begin(int64_t tile) const { return tile * kTile; }
  int64_t chunk_end(int64_t tile) const { return tile * kTile + kTile < chunks_ ? tile * kTile + kTile : chunks_; }

  // Offsets count from the slab's first element.
  FN_INLINE Runs chunk(int64_t c) const {
    if (pieces_ == 1) {
      const int64_t first = c * runs_, left = outer_ - first;
      return {first * stride_, stride_, left < runs_ ? left : runs_, inner_};
    }
    const int64_t run = c / pieces_, start = c % pieces_ * length_, left = inner_ - start;
    return {run * stride_ + start, 0, 1, left < length_ ? left : length_};
  }
  // Elements from chunk c to the next, to fetch ahead; 0: none.
  FN_INLINE int64_t ahead(int64_t c) const { return one_run() ? 0 : chunk(c + 1).offset - chunk(c).offset; }
  FN_INLINE int64_t ahead_of_writes(int64_t item) const { return one_run() ? 0 : kAheadBytes / item; }

  // The tile's elements in runs as long as they get.
  template <class Call>
  FN_INLINE void segments(int64_t tile, Call&& call) const {
    const int64_t begin = chunk_begin(tile), end = chunk_end(tile);
    if (pieces_ == 1) {
      const int64_t first = begin * runs_, last = end * runs_ < outer_ ? end * runs_ : outer_;
      return call(Runs{first * stride_, stride_, last - first, inner_});
    }
    for (int64_t c = begin; c < end;) {
      const int64_t piece = c % pieces_, take = pieces_ - piece < end - c ? pieces_ - piece : end - c;
      const int64_t left = inner_ - piece * length_;
      call(Runs{chunk(c).offset, 0, 1, take * length_ < left ? take * length_ : left});
      c += take;
    }
  }

 private:
  int64_t outer_, inner_, stride_, pieces_, length_, runs_, chunks_;
};

// Calls step(index, slot, Whole or Part) for every pack of the runs; neighbours get different slots, for accumulators.
template <class T, int kSlots, class Step>
FN_INLINE void sweep(const Runs& r, Step&& step) {
  constexpr int64_t width = Pack<T>::width;
  for (int64_t k = 0; k < r.count; ++k) {
    int64_t i = r.offset + k * r.stride;
    const int64_t end = i + r.length;
    for (; i + kSlots * width <= end; i += kSlots * width)
#pragma GCC unroll 4
      for (int slot = 0; slot < kSlots; ++slot) step(i + slot * width, slot, Whole{});
    const int64_t left = end - i;
#pragma GCC unroll 4
    for (int slot = 0; slot < kSlots - 1; ++slot)
      if (left >= (slot + 1) * width) step(i + slot * width, slot, Whole{});
    if (left % width) step(end - left % width, kSlots - 1, Part{int(left % width)});
  }
}

// Sums run in several registers, so that an addition need not wait for the one before. Short runs are over before that
// pays: one register a part.
template <class T>
constexpr int kSlots = 4 / Pack<T>::parts;
template <class T>
constexpr int64_t kLongRun = 16 * Pack<T>::width;
// Up to this, slabs that are one run are swept side by side (below): a lane of one of two registers adds 64 numbers at
// most.
template <class T>
constexpr int64_t kLongSlab = 64 * Pack<T>::width;

template <class T, int kOwnSlots = kSlots<T>>
struct Accumulators {
  Vector<Real<T>> v[kOwnSlots][Pack<T>::parts] = {};

  FN_INLINE double sum() const {
    Vector<Real<T>> total = v[0][0];
    for (int slot = 0; slot < kOwnSlots; ++slot)
      for (int part = 0; part < Pack<T>::parts; ++part)
        if (slot + part > 0) total += v[slot][part];
    return sum_lanes(total);
  }
};

FN_INLINE bool is_finite(double v) { return v - v == 0; }

// Takes k numbers into moments that are no longer finite: `sum` is that of those numbers that are not finite themselves.
FN_INLINE void add_not_finite(double k, double sum, bool center, Moments& m) {
  m.n += k;
  m.m2 = center ? __builtin_nan("") : m.m2 + sum * sum;
  if (center) m.mean += sum;
}

// The chunk again, in a type that holds the squares and sums of any of its numbers: float64 for 16- and 32-bit elements,
// long double for float64.
template <class T>
[[gnu::noinline]] Moments chunk_moments_wide(const T* x, const Runs& r, bool center) {
  const double n = double(r.count * r.length);
  if constexpr (sizeof(T) == 8) {
    using Wide = long double;
    Wide mean = 0, m2 = 0;
    const auto each = [&](auto&& add) {
      for (int64_t k = 0; k < r.count; ++k)
        for (int64_t i = 0; i < r.length; ++i) add(Wide(x[r.offset + k * r.stride + i]));
    };
    if (center) each([&](Wide v) { mean += v; });
    mean /= Wide(n);
    each([&](Wide v) { m2 += (v - mean) * (v - mean); });
    return {n, double(mean), double(m2)};
  } else {
    double mean = 0;
    // Of f(number in float64), the sum.
    const auto sum = [&](auto&& f) FN_LAMBDA {
      D sums[2] = {};
      sweep<T, 1>(r, [&](int64_t i, int, auto there) FN_LAMBDA {
        const Lanes<T> v = load(x + i, there);
        for (int p = 0; p < Pack<T>::parts; ++p) {
          D wide[2], counts[2];
          widen(v.v[p], wide[0], wide[1]);
          widen(live<T>(F{} + 1, p, there), counts[0], counts[1]);
          for (int w = 0; w < 2; ++w) sums[w] += counts[w] * f(wide[w]);
        }
      });
      return sum_lanes(sums[0] + sums[1]);
    };
    if (center) mean = sum([](D v) FN_LAMBDA { return v; }) / n;
    return {n, mean, sum([&](D v) FN_LAMBDA { return (v - mean) * (v - mean); })};
  }
}

// The sum of the numbers that are not finite, NaN or infinite itself; 0 where there are none.
template <class T>
[[gnu::noinline]] double sum_not_finite(const T* x, const Runs& r) {
  Vector<Real<T>> sum{};
  sweep<T, 1>(r, [&](int64_t i, int, auto there) FN_LAMBDA {
    const Lanes<T> v = load(x + i, there);
    for (int p = 0; p < Pack<T>::parts; ++p) sum += Math::select(v.v[p] - v.v[p] == 0, Vector<Real<T>>{}, v.v[p]);
  });
  return sum_lanes(sum);
}

// Σ(x − hi) and Σ(x − hi)² over the runs. `ahead`: distance in elements to the chunk that is read next, fetched while
// this one is.
struct Deviations {
  double sum, squares;
};
template <int kOwnSlots, class T>
[[gnu::noinline]] Deviations deviations_in(const T* x, const Runs& r, Real<T> hi, int64_t ahead) {
  Accumulators<T, kOwnSlots> sum, squares;
  sweep<T, kOwnSlots>(r, [&](int64_t i, int slot, auto there) FN_LAMBDA {
    prefetch(x + i + ahead);
    const Lanes<T> v = load(x + i, there);
    for (int p = 0; p < Pack<T>::parts; ++p) {
      const auto d = live<T>(v.v[p] - hi, p, there);
      sum.v[slot][p] += d;
      squares.v[slot][p] = fma(d, d, squares.v[slot][p]);
    }
  });
  return {sum.sum(), squares.sum()};
}

template <class T>
FN_INLINE Deviations deviations(const T* x, const Runs& r, Real<T> hi, int64_t ahead) {
  return r.count * r.length < kLongRun<T> ? deviations_in<1>(x, r, hi, ahead)
                                          : deviations_in<kSlots<T>>(x, r, hi, ahead);
}

// Whether deviations whose sums are nothing are so because they underflowed.
template <class T>
FN_INLINE bool underflown(const T* x, const Runs& r, Real<T> hi, const Deviations& d) {
  if (sizeof(Real<T>) == 8 || d.sum != 0 || d.squares != 0) return false;
  MaskOf<Real<T>> differs{};
  sweep<T, 1>(r, [&](int64_t i, int, auto there) FN_LAMBDA {
    const Lanes<T> v = load(x + i, there);
    for (int p = 0; p < Pack<T>::parts; ++p) differs |= live<T>(v.v[p] - hi, p, there) != 0;
  });
  return any(differs);
}

template <class T>
FN_INLINE Real<T> mean_of_first_pack(const T* x, const Runs& r) {
  constexpr int64_t width = Pack<T>::width;
  const Lanes<T> first = r.length < width ? load(x + r.offset, Part{int(r.length)}) : load(x + r.offset, Whole{});
  Vector<Real<T>> sum = first.v[0];
  for (int p = 1; p < Pack<T>::parts; ++p) sum += first.v[p];
  return Real<T>(sum_lanes(sum) / double(r.length < width ? r.length : width));
}

// Takes a chunk into the moments of those before it in its tile. The first one's deviations are from the mean of its
// first pack; again from its own mean where the two lie apart, so that the subtraction takes away half at most
// (core/moments.h).
template <class T>
FN_INLINE void add_chunk(const T* x, const Runs& r, bool center, int64_t ahead, Moments& m) {
  using R = Real<T>;
  const double k = double(r.count * r.length);
  if (!is_finite(m.mean)) return add_not_finite(k, sum_not_finite(x, r), center, m);
  const auto wide = [&] {
    const double sum = sum_not_finite(x, r);
    sum == 0 ? m.merge(chunk_moments_wide(x, r, center)) : add_not_finite(k, sum, center, m);
  };
  if (center && m.n < k) {
    R hi = mean_of_first_pack(x, r);
    Deviations d = deviations(x, r, hi, ahead);
    if (!(d.sum * d.sum <= 0.5 * k * d.squares)) {
      hi = R(double(hi) + d.sum / k);
      d = deviations(x, r, hi, ahead);
    }
    if (out_of_range<T>(d.sum, d.squares) || underflown(x, r, hi, d)) return wide();
    const double m2 = d.squares - d.sum * d.sum / k;
    return m.merge({k, double(hi) + d.sum / k, m2 < 0 ? 0 : m2});
  }
  const R hi = R(m.mean);
  const Deviations d = deviations(x, r, hi, ahead);
  if (out_of_range<T>(d.sum, d.squares) || underflown(x, r, hi, d)) return wide();
  if (center) return m.add(k, double(hi), d.sum, d.squares);
  m.n += k;
  m.m2 += d.squares;
}

template <int kOwnSlots, class E, class T>
[[gnu::noinline]] void add_grad_chunk_in(const Epilogue<T>& epilogue, const T* dy, const T* x, const Runs& r,
                                         const GradCoefficients<Real<T>>& own, int64_t ahead, GradSums& sums) {
  const E e(epilogue);
  const PackGrad<T> g = all_lanes<PackGrad<T>>(own);
  Accumulators<T, kOwnSlots> sum, product;
  sweep<T, kOwnSlots>(r, [&](int64_t i, int slot, auto there) FN_LAMBDA {
    prefetch(x + i + ahead);
    prefetch(dy + i + ahead);
    const GradPack<T> at = load_grad_pack(e, dy, x, i, g, there);
    for (int p = 0; p < Pack<T>::parts; ++p) {
      const auto u = live<T>(at.u.v[p], p, there);
      sum.v[slot][p] += u;
      product.v[slot][p] = fma(u, at.z.v[p], product.v[slot][p]);
    }
  });
  sums.u += sum.sum();
  sums.uz += product.sum();
}
template <class E, class T = typename E::Element>
void add_grad_chunk(const Epilogue<T>& e, const T* dy, const T* x, const Runs& r, const GradCoefficients<Real<T>>& own,
                    int64_t ahead, GradSums& sums) {
  r.count* r.length < kLongRun<T> ? add_grad_chunk_in<1, E>(e, dy, x, r, own, ahead, sums)
                                  : add_grad_chunk_in<kSlots<T>, E>(e, dy, x, r, own, ahead, sums);
}

// Sums over short slabs, each one run, that follow each other in memory. A register of them at once: what it takes to add
// up lanes would be most of the time.
// step(index, which of two registers a part, Whole or Part).
template <class T, class Step>
FN_INLINE void sweep_short(int64_t start, int64_t length, Step&& step) {
  constexpr int64_t width = Pack<T>::width;
  const int64_t end = start + length;
  int64_t i = start;
  for (; i + 2 * width <= end; i += 2 * width) {
    step(i, 0, Whole{});
    step(i + width, 1, Whole{});
  }
  if (i + width <= end) {
    step(i, 0, Whole{});
    i += width;
  }
  if (i < end) step(i, 1, Part{int(end - i)});
}

template <class T>
[[gnu::noinline]] void short_moments(const T* x, int64_t count, int64_t length, bool center, Moments* found) {
  using R = Real<T>;
  using V = Vector<R>;
  constexpr int lanes = kLanes<R>;
  const double k = double(length);
  for (int64_t from = 0; from < count; from += lanes) {
    const int some = count - from < lanes ? int(count - from) : lanes;
    const T* first = x + from * length;
    R hi[lanes] = {};
    V sum[lanes] = {}, squares[lanes] = {};
    if (center) {
      const int64_t width = Pack<T>::width < length ? Pack<T>::width : length;
      for (int slab = 0; slab < some; ++slab)
        sweep_short<T>(slab * length, width, [&](int64_t i, int, auto there) FN_LAMBDA {
          const Lanes<T> v = load(first + i, there);
          for (int p = 0; p < Pack<T>::parts; ++p) sum[slab] += v.v[p];
        });
      const V means = sums_of_lanes(sum) / R(width);
      memcpy(hi, &means, sizeof hi);
    }
    for (int slab = 0; slab < some; ++slab) {
      V s[2] = {}, q[2] = {};
      sweep_short<T>(slab * length, length, [&](int64_t i, int slot, auto there) FN_LAMBDA {
        const Lanes<T> v = load(first + i, there);
        for (int p = 0; p < Pack<T>::parts; ++p) {
          const V d = live<T>(v.v[p] - hi[slab], p, there);
          s[slot] += d;
          q[slot] = fma(d, d, q[slot]);
        }
      });
      sum[slab] = s[0] + s[1];
      squares[slab] = q[0] + q[1];
    }
    const V all = sums_of_lanes(sum), all_squares = sums_of_lanes(squares);
    for (int slab = 0; slab < some; ++slab) {
      const double s = double(all[slab]), q = double(all_squares[slab]);
      Moments& m = found[from + slab];
      m = Moments();
      const Runs run{slab * length, 0, 1, length};
      if (out_of_range<T>(s, q) || (center && !(s * s <= 0.5 * k * q)) || underflown(first, run, hi[slab], {s, q})) {
        add_chunk(first, run, center, 0, m);
        continue;
      }
      const double m2 = center ? q - s * s / k : q;
      m = {k, center ? double(hi[slab]) + s / k : 0, m2 < 0 ? 0 : m2};
    }
  }
}

template <class E, class T = typename E::Element>
void short_grad_sums(const Epilogue<T>& epilogue, const T* dy, const T* x, int64_t count, int64_t length,
                     const GradCoefficients<Real<T>>* own, GradSums* found) {
  const E e(epilogue);
  using V = Vector<Real<T>>;
  constexpr int lanes = kLanes<Real<T>>, most = lanes / 2;
  for (int64_t from = 0; from < count; from += most) {
    const int some = count - from < most ? int(count - from) : most;
    V sums[lanes];  // the slabs' Σu, then their Σu·z
    for (int slab = some; slab < most; ++slab) sums[slab] = sums[most + slab] = V{};
    for (int slab = 0; slab < some; ++slab) {
      const PackGrad<T> g = all_lanes<PackGrad<T>>(own[from + slab]);
      V s[2] = {}, q[2] = {};
      sweep_short<T>((from + slab) * length, length, [&](int64_t i, int slot, auto there) FN_LAMBDA {
        const GradPack<T> at = load_grad_pack(e, dy, x, i, g, there);
        for (int p = 0; p < Pack<T>::parts; ++p) {
          const V u = live<T>(at.u.v[p], p, there);
          s[slot] += u;
          q[slot] = fma(u, at.z.v[p], q[slot]);
        }
      });
      sums[slab] = s[0] + s[1];
      sums[most + slab] = q[0] + q[1];
    }
    const V all = sums_of_lanes(sums);
    for (int slab = 0; slab < some; ++slab) found[from + slab] = {double(all[slab]), double(all[most + slab])};
  }
}

// Calls step(index, Whole or Part, streamed?) over n elements, with full registers from the first aligned address of
// `out` on.
template <class T, class Step>
FN_INLINE void sweep_out(const T* out, int64_t n, bool streamed, Step&& step) {
  constexpr int64_t width = Pack<T>::width;
  const int64_t head = streamed || n >= 16 * width ? to_alignment(out) : 0;
  int64_t i = 0;
  if (head > 0 && head < n) {
    step(i, Part{int(head)}, false);
    i = head;
  }
  if (streamed && head >= 0) {
#pragma GCC unroll 4
    for (; i + width <= n; i += width) step(i, Whole{}, true);
  }
#pragma GCC unroll 4
  for (; i + width <= n; i += width) step(i, Whole{}, false);
  if (i < n) step(i, Part{int(n - i)}, false);
}

// Calls step(index, coefficients, Whole or Part, streamed?) over `count` runs that follow each other in memory and each
// have one of `own`, with full registers across their borders: there a lane takes what its own run has.
template <class Coefficients, class T, class Step>
FN_INLINE void sweep_neighbours(const T* out, int64_t count, int64_t length, const typename Coefficients::One* own,
                                bool streamed, Step&& step) {
  constexpr int64_t width = Pack<T>::width;
  if (length < width) {  // a register would lie across more than two
    for (int64_t k = 0; k < count; ++k) step(k * length, all_lanes<Coefficients>(own[k]), Part{int(length)}, false);
    return;
  }
  const int64_t head = to_alignment(out);
  const bool past = streamed && head >= 0;
  int64_t i = head > 0 ? head : 0;
  if (i > 0) step(0, all_lanes<Coefficients>(own[0]), Part{int(i)}, false);
  for (int64_t k = 0; k < count; ++k) {
    const int64_t end = (k + 1) * length;
    const Coefficients all = all_lanes<Coefficients>(own[k]);
    if (past) {
#pragma GCC unroll 4
      for (; i + width <= end; i += width) step(i, all, Whole{}, true);
    } else {
#pragma GCC unroll 4
      for (; i + width <= end; i += width) step(i, all, Whole{}, false);
    }
    if (i == end) continue;
    const Part left{int(end - i)};
    if (k + 1 == count) return step(i, all, left, false);
    step(i, mixed_lanes<T, Coefficients>(own[k], own[k + 1], left), Whole{}, past);
    i += width;
  }
}

// What is `ahead` elements from p; 0: nothing. Where all lies in cache, a fetch for nothing takes as long as a load.
template <class T>
FN_INLINE void fetch_ahead(const T* p, int64_t ahead) {
  if (ahead != 0) prefetch(p + ahead);
}

template <class E, class T = typename E::Element>
void apply_runs(const Epilogue<T>& epilogue, const T* x, T* y, const Runs& runs, const PackAffine<T>& given,
                bool streamed, int64_t ahead) {
  const E e(epilogue);
  const PackAffine<T> a = given;  // in registers: stores may alias what a reference names
  for (int64_t k = 0; k < runs.count; ++k) {
    const int64_t at = runs.offset + k * runs.stride;
    sweep_out(y + at, runs.length, streamed, [&](int64_t j, auto there, bool past) FN_LAMBDA {
      fetch_ahead(x + at + j, ahead);
      apply_pack(e, x, y, at + j, a, there, past);
    });
  }
}
template <class E, class T = typename E::Element>
void apply_neighbours(const Epilogue<T>& epilogue, const T* x, T* y, int64_t count, int64_t length,
                      const Affine<Real<T>>* a, bool streamed, int64_t ahead) {
  const E e(epilogue);
  sweep_neighbours<PackAffine<T>>(y, count, length, a, streamed,
                                  [&](int64_t i, const PackAffine<T>& own, auto there, bool past) FN_LAMBDA {
                                    fetch_ahead(x + i, ahead);
                                    apply_pack(e, x, y, i, own, there, past);
                                  });
}

template <bool kConstant, class E, class T = typename E::Element>
void grad_runs(const Epilogue<T>& epilogue, const T* dy, const T* x, const GradOut<T>& to, const Runs& runs,
               const PackGrad<T>& given, bool streamed, int64_t ahead) {
  const E e(epilogue);
  const PackGrad<T> g = given;
  const GradOut<T> out = to;
  for (int64_t k = 0; k < runs.count; ++k) {
    const int64_t at = runs.offset + k * runs.stride;
    sweep_out(out.dx + at, runs.length, streamed && out.alike(), [&](int64_t j, auto there, bool past) FN_LAMBDA {
      fetch_ahead(x + at + j, ahead);
      fetch_ahead(dy + at + j, ahead);
      grad_pack<kConstant>(e, dy, x, out, at + j, g, there, past);
    });
  }
}
template <bool kConstant, class E, class T = typename E::Element>
void grad_neighbours(const Epilogue<T>& epilogue, const T* dy, const T* x, const GradOut<T>& to, int64_t count,
                     int64_t length, const GradCoefficients<Real<T>>* g, bool streamed, int64_t ahead) {
  const E e(epilogue);
  const GradOut<T> out = to;
  sweep_neighbours<PackGrad<T>>(out.dx, count, length, g, streamed && out.alike(),
                                [&](int64_t i, const PackGrad<T>& own, auto there, bool past) FN_LAMBDA {
                                  fetch_ahead(x + i, ahead);
                                  fetch_ahead(dy + i, ahead);
                                  grad_pack<kConstant>(e, dy, x, out, i, own, there, past);
                                });
}

// The loops that know an epilogue (loops_for).
template <class T>
struct ForwardRowLoops {
  using Element = T;
  using Any = KnownEpilogue<T, Kind::any, true>;
  static constexpr bool kBackward = false;
  decltype(&apply_runs<Any>) runs;
  decltype(&apply_neighbours<Any>) neighbours;

  template <class E>
  static ForwardRowLoops of() {
    return {apply_runs<E>, apply_neighbours<E>};
  }
};
template <class T>
struct BackwardRowLoops {
  using Element = T;
  using Any = KnownEpilogue<T, Kind::any, true>;
  static constexpr bool kBackward = true;
  decltype(&add_grad_chunk<Any>) add_chunk;
  decltype(&short_grad_sums<Any>) short_sums;
  // [constant]: the statistics were constants.
  decltype(&grad_runs<false, Any>) runs[2];
  decltype(&grad_neighbours<false, Any>) neighbours[2];

  template <class E>
  static BackwardRowLoops of() {
    return {add_grad_chunk<E>,
            short_grad_sums<E>,
            {grad_runs<false, E>, grad_runs<true, E>},
            {grad_neighbours<false, E>, grad_neighbours<true, E>}};
  }
};

// How the slabs are handed to threads.
struct RowPlan {
  int64_t block;  // slabs that are swept side by side
  int64_t task;   // slabs that a thread takes at once: whole statistics, blocks of them
  bool fused, streamed, neighbours;
  int threads;

  // `share`: slabs that make a statistic; `tensors`: how many are read.
  RowPlan(const Fold& f, int64_t share, int64_t item, int64_t tensors, bool stores) {
    const int64_t slabs = f.statistics();
    streamed = stores && is_streamed(f.size() * item, tensors);
    const int64_t run = f.span * item;
    const bool contiguous = f.outer == 1 && run < kNeighbourBytes;  // one after the other, as memory lies
    neighbours = stores && (contiguous || (run < kShortRunBytes && f.size() * item >= kNeighboursFrom));
    block = 1;
    if (neighbours || contiguous) {
      block = kNeighbourBytes / (f.inner * item);
      if (block > kMaxBlock) block = kMaxBlock;
      if (block > f.groups) block = f.groups;
      if (block < 1) block = 1;
    }
    task = block < share ? share : block / share * share;
    const int64_t blocks = f.batch * ((f.groups + task - 1) / task);
    const int available = threads_for(tensors * f.size(), INT64_MAX);
    const int64_t rounds = (blocks + available - 1) / available;
    fused = blocks >= 4 * available || blocks * 10 >= rounds * available * 9 || slabs == 0;
    if (!fused) {
      neighbours = false;
      block = 1;
      task = share;
    }
    threads = fused ? threads_for(tensors * f.size(), blocks) : available;
  }
};

// `count` neighbouring slabs from number `first` on.
struct RowBlock {
  int64_t first, count, offset;  // offset: element of the first slab's first run

  // The i-th `size` of them; a batch entry's last may be fewer.
  RowBlock(const Fold& f, int64_t size, int64_t i) {
    const int64_t per_batch = (f.groups + size - 1) / size, b = i / per_batch, g = i % per_batch * size;
    first = b * f.groups + g;
    count = f.groups - g < size ? f.groups - g : size;
    offset = slab_offset(f, first);
  }
  RowBlock(int64_t first_, int64_t count_, int64_t offset_) : first(first_), count(count_), offset(offset_) {}

  int64_t parts(int64_t size) const { return (count + size - 1) / size; }
  RowBlock part(const Fold& f, int64_t size, int64_t i) const {
    const int64_t left = count - i * size;
    return {first + i * size, left < size ? left : size, offset + i * size * f.inner};
  }
  static FN_INLINE int64_t slab_offset(const Fold& f, int64_t s) {
    return (s / f.groups * f.outer * f.groups + s % f.groups) * f.inner;
  }
  static FN_INLINE int64_t blocks(const Fold& f, int64_t block) { return f.batch * ((f.groups + block - 1) / block); }
};

// Runs of a slab, cut where the channel changes: call(channel within the slab, Runs).
template <class Call>
FN_INLINE void channel_runs(const Fold& f, const Runs& runs, Call&& call) {
  if (f.span == f.inner) return call(0, runs);
  const int64_t row = f.groups * f.inner;
  for (int64_t k = 0; k < runs.count; ++k)
    for (int64_t begin = 0, length; begin < runs.length; begin += length) {
      const int64_t at = runs.offset + k * runs.stride + begin, i = at % row, left = f.span - i % f.span;
      length = left < runs.length - begin ? left : runs.length - begin;
      call(i / f.span, Runs{at, 0, 1, length});
    }
}

// And where the mask changes: call(Runs, counted).
template <class Call>
FN_INLINE void counted_runs(const uint8_t* mask, const Fold& f, int64_t s, const Runs& all, Call&& call) {
  const int64_t row = f.groups * f.inner;
  channel_runs(f, all, [&](int64_t, const Runs& runs) {
    for (int64_t k = 0; k < runs.count; ++k) {
      const int64_t at = runs.offset + k * runs.stride, o = s / f.groups * f.outer + at / row;
      stretches(mask + o * f.span + at % row % f.span, runs.length,
                [&](int64_t begin, int64_t length, bool counted) { call(Runs{at + begin, 0, 1, length}, counted); });
    }
  });
}

// Sums over all tiles of a block, merged tile by tile as the split path merges them. chunk(k, runs, ahead, Sum&) adds
// one.
template <class Sum, class Chunk>
FN_INLINE void sum_block(const RowTree& tree, int64_t count, int64_t slab_distance, Sum* total, Chunk&& chunk) {
  Sum part[kMaxBlock];
  for (int64_t k = 0; k < count; ++k) total[k] = Sum();
  for (int64_t tile = 0; tile < tree.tiles(); ++tile) {
    Sum* of_tile = tree.tiles() == 1 ? total : part;
    for (int64_t k = 0; k < count; ++k) of_tile[k] = Sum();
    for (int64_t c = tree.chunk_begin(tile), end = tree.chunk_end(tile); c < end; ++c) {
      const Runs r = tree.chunk(c);
      const int64_t next = tree.ahead(c);
      for (int64_t k = 0; k < count; ++k)
        chunk(k, r, next == 0 ? 0 : k + 1 < count ? slab_distance : next - k * slab_distance, of_tile[k]);
    }
    for (int64_t k = 0; of_tile == part && k < count; ++k) total[k].merge(part[k]);
  }
}
template <class Sum, class Chunk>
FN_INLINE Sum sum_tile(const RowTree& tree, int64_t tile, Chunk&& chunk) {
  Sum sum;
  for (int64_t c = tree.chunk_begin(tile), end = tree.chunk_end(tile); c < end; ++c) {
    chunk(tree.chunk(c), tree.ahead(c), sum);
  }
  return sum;
}
template <class Sum>
FN_INLINE Sum sum_of(const Sum* part, int64_t n) {
  Sum sum;
  for (int64_t i = 0; i < n; ++i) sum.merge(part[i]);
  return sum;
}

// With given statistics memory is walked as it lies: the runs of neighbouring slabs, one after the other.
template <class T>
void normalize_rows(const ForwardPass& pass) {
  const Epilogue<T> e(pass.epilogue);
  const auto loops = loops_for<ForwardRowLoops<T>>(pass.epilogue);
  const Fold f = pass.fold.cells();
  const T* x = pass.x.template as<const T>();
  T* y = pass.y.template as<T>();
  const bool streamed = is_streamed(f.size() * int64_t(sizeof(T)), 1);
  // A task: some neighbours, or a piece of one run.
  int64_t neighbours = kWriteElements / f.inner;
  neighbours = neighbours < 1 ? 1 : neighbours > f.groups ? f.groups : neighbours;
  const int64_t blocks = (f.groups + neighbours - 1) / neighbours;
  const int64_t length = neighbours > 1 || f.inner < kWriteElements ? f.inner : kWriteElements;
  const int64_t pieces = (f.inner + length - 1) / length, tasks = f.batch * f.outer * blocks * pieces;
  Scratch<Affine<Real<T>>> affine(f.statistics());

  parallel(threads_for(f.size(), tasks), [&](const Team& team) {
    constexpr int64_t some = 64;
    team.each((f.statistics() + some - 1) / some, [&](int64_t i) {
      const int64_t left = f.statistics() - i * some;
      pass.affine(i * some, left < some ? left : some, affine.get() + i * some);
    });
    team.each(tasks, [&](int64_t i) {
      const int64_t piece = i % pieces, g = i / pieces % blocks * neighbours, o = i / pieces / blocks;
      const int64_t count = f.groups - g < neighbours ? f.groups - g : neighbours;
      const int64_t start = (o * f.groups + g) * f.inner + piece * length, left = f.inner - piece * length;
      loops.neighbours(e.at(start), x + start, y + start, count, length < left ? length : left,
                       affine.get() + o / f.outer * f.groups + g, streamed, 0);
    });
    stream_fence();
  });
}

template <class T>
void forward_rows(const ForwardPass& pass) {
  if (!pass.takes_statistics()) return normalize_rows<T>(pass);
  const Epilogue<T> e(pass.epilogue);
  const auto loops = loops_for<ForwardRowLoops<T>>(pass.epilogue);
  const Fold& f = pass.fold;
  const RowTree tree(f);
  const int64_t slabs = f.statistics(), tiles = tree.tiles(), row = f.groups * f.inner;
  const RowPlan plan(f, 1, sizeof(T), 1, bool(pass.y));
  const bool brief = f.outer == 1 && f.inner <= kLongSlab<T> && !pass.mask;
  const T* x = pass.x.template as<const T>();
  T* y = pass.y.template as<T>();

  const auto add = [&](int64_t s, int64_t slab, const Runs& r, int64_t ahead, Moments& m) {
    if (!pass.mask) return add_chunk(x + slab, r, pass.center, ahead, m);
    counted_runs(pass.mask, f, s, r, [&](const Runs& stretch, bool counted) {
      if (counted) add_chunk(x + slab, stretch, pass.center, 0, m);
    });
  };
  const auto apply_tile = [&](int64_t s, int64_t tile) {
    const int64_t slab = RowBlock::slab_offset(f, s);
    tree.segments(tile, [&](const Runs& runs) {
      channel_runs(f, runs, [&](int64_t channel, const Runs& r) {
        const auto a = all_lanes<PackAffine<T>>(pass.affine<Real<T>>(s * pass.share + channel));
        loops.runs(e.at(slab), x + slab, y + slab, r, a, plan.streamed, tree.ahead_of_writes(sizeof(T)));
      });
    });
  };
  const int64_t next = tree.one_run() ? 0 : -row;  // what is written after this
  const auto apply_block = [&](const RowBlock& block) {
    Affine<Real<T>> a[kMaxBlock];
    const int64_t cells = block.count * pass.share;
    for (int64_t from = (cells - 1) / kMaxBlock * kMaxBlock; from >= 0; from -= kMaxBlock) {
      const int64_t count = cells - from < kMaxBlock ? cells - from : kMaxBlock;
      pass.affine(block.first * pass.share + from, count, a);
      for (int64_t o = f.outer; o-- > 0;) {
        const int64_t start = block.offset + o * row + from * f.span;
        loops.neighbours(e.at(start), x + start, y + start, count, f.span, a, plan.streamed, next);
      }
    }
  };

  if (plan.fused) {
    parallel(plan.threads, [&](const Team& team) {
      team.each(RowBlock::blocks(f, plan.task), [&](int64_t i) {
        const RowBlock block(f, plan.task, i);
        if (brief)
          short_moments(x + block.offset, block.count, f.inner, pass.center, pass.found + block.first);
        else
          sum_block(tree, block.count, f.inner, pass.found + block.first,
                    [&](int64_t k, const Runs& r, int64_t ahead, Moments& m) {
                      add(block.first + k, block.offset + k * f.inner, r, ahead, m);
                    });
        if (y && plan.neighbours) apply_block(block);
        if (y && !plan.neighbours)  // backwards: what was read last is still in cache
          for (int64_t tile = tiles; tile-- > 0;) apply_tile(block.first, tile);
      });
      stream_fence();
    });
    return;
  }
  Scratch<Moments> part(slabs * tiles);
  parallel(plan.threads, [&](const Team& team) {
    team.each(slabs * tiles, [&](int64_t i) {
      const int64_t slab = RowBlock::slab_offset(f, i / tiles);
      if (brief) return short_moments(x + slab, 1, f.inner, pass.center, part.get() + i);
      part[i] = sum_tile<Moments>(tree, i % tiles,
                                  [&](const Runs& r, int64_t ahead, Moments& m) { add(i / tiles, slab, r, ahead, m); });
    });
    team.each(slabs, [&](int64_t s) { pass.found[s] = sum_of(part.get() + s * tiles, tiles); });
    if (y) team.each_backwards(slabs * tiles, [&](int64_t i) { apply_tile(i / tiles, i % tiles); });
    stream_fence();
  });
}

template <class T>
void backward_rows(const BackwardPass& pass) {
  using R = Real<T>;
  const Epilogue<T> e(pass.epilogue);
  const auto loops = loops_for<BackwardRowLoops<T>>(pass.epilogue);
  const Fold f = pass.fold.cells();
  const RowTree tree(f);
  const int64_t slabs = f.statistics(), tiles = tree.tiles(), row = f.groups * f.inner, share = pass.share;
  const RowPlan plan(f, share, sizeof(T), 2, bool(pass.dx));
  const bool brief = f.outer == 1 && f.inner <= kLongSlab<T>;
  const T *dy = pass.dy.template as<const T>(), *x = pass.x.template as<const T>();
  const GradOut<T> out{pass.dx.template as<T>(), pass.dresidual.template as<T>()};

  const auto add = [&](int64_t s, int64_t slab, const Runs& r, int64_t ahead, GradSums& sums) {
    loops.add_chunk(e.at(slab), dy + slab, x + slab, r, pass.template coefficients<R>(s, true), ahead, sums);
  };
  const bool backwards =
      pass.found && share > 1 && tiles == 1 && !plan.neighbours;  // from cell to cell: the last is still in cache
  const auto sum_short = [&](int64_t first, int64_t count, int64_t slab, GradSums* found) {
    GradCoefficients<R> own[kMaxBlock];
    pass.coefficients(first, count, true, own);
    loops.short_sums(e.at(slab), dy + slab, x + slab, count, f.inner, own, found);
  };
  const auto write_runs = [&](int64_t slab, const Runs& r, const PackGrad<T>& g, bool corrected) {
    loops.runs[!corrected](e.at(slab), dy + slab, x + slab, out.at(slab), r, g, plan.streamed,
                           backwards ? -f.inner : tree.ahead_of_writes(sizeof(T)));
  };
  const bool cut = pass.mask && !pass.constant;
  const auto write_tile = [&](int64_t s, int64_t tile) {
    const int64_t slab = RowBlock::slab_offset(f, s);
    const auto g = all_lanes<PackGrad<T>>(pass.template coefficients<R>(s));
    tree.segments(tile, [&](const Runs& r) {
      if (!cut) return write_runs(slab, r, g, !pass.constant);
      counted_runs(pass.mask, f, s, r, [&](const Runs& some, bool counted) { write_runs(slab, some, g, counted); });
    });
  };
  const int64_t next = tree.one_run() ? 0 : -row;  // what is written after this
  const auto write_block = [&](const RowBlock& block) {
    GradCoefficients<R> g[kMaxBlock];
    pass.coefficients(block.first, block.count, false, g);
    for (int64_t o = f.outer; o-- > 0;) {
      const int64_t start = block.offset + o * row;
      loops.neighbours[pass.constant](e.at(start), dy + start, x + start, out.at(start), block.count, f.inner, g,
                                      plan.streamed, next);
    }
  };

  if (plan.fused) {
    parallel(plan.threads, [&](const Team& team) {
      team.each(RowBlock::blocks(f, plan.task), [&](int64_t i) {
        const RowBlock task(f, plan.task, i);
        const int64_t blocks = task.parts(plan.block);
        for (int64_t part = 0; pass.found && part < blocks; ++part) {
          const RowBlock block = task.part(f, plan.block, part);
          if (brief) {
            sum_short(block.first, block.count, block.offset, pass.found + block.first);
            continue;
          }
          sum_block(tree, block.count, f.inner, pass.found + block.first,
                    [&](int64_t k, const Runs& r, int64_t ahead, GradSums& sums) {
                      add(block.first + k, block.offset + k * f.inner, r, ahead, sums);
                    });
        }
        if (pass.found) pass.template sum_cells<R>(task.first / share, task.count / share);
        for (int64_t part = 0; out.dx && part < blocks; ++part) {
          const RowBlock block = task.part(f, plan.block, backwards ? blocks - 1 - part : part);
          if (plan.neighbours && !cut)
            write_block(block);
          else
            for (int64_t k = 0; k < block.count; ++k)
              for (int64_t tile = tiles; tile-- > 0;) write_tile(block.first + k, tile);
        }
      });
      stream_fence();
    });
    return;
  }
  Scratch<GradSums> part(pass.found ? slabs * tiles : 0);
  // Coefficients that do not wait for the sums: dx follows while the tile is in cache.
  const bool at_once = pass.found && out.dx && (pass.constant || pass.cx || pass.c0);
  parallel(plan.threads, [&](const Team& team) {
    if (pass.found) {
      team.each(slabs * tiles, [&](int64_t i) {
        const int64_t s = i / tiles, slab = RowBlock::slab_offset(f, s);
        if (brief)
          sum_short(s, 1, slab, part.get() + i);
        else
          part[i] = sum_tile<GradSums>(
              tree, i % tiles, [&](const Runs& r, int64_t ahead, GradSums& sums) { add(s, slab, r, ahead, sums); });
        if (at_once) write_tile(s, i % tiles);
      });
      team.each(slabs / share, [&](int64_t s) {
        for (int64_t cell = s * share; cell < s * share + share; ++cell)
          pass.found[cell] = sum_of(part.get() + cell * tiles, tiles);
        pass.template sum_cells<R>(s, 1);
      });
    }
    if (out.dx && !at_once) team.each_backwards(slabs * tiles, [&](int64_t i) { write_tile(i / tiles, i % tiles); });
    stream_fence();
  });
}

}  // namespace
}  // namespace fusednorm::cpu::FUSEDNORM_ISA
