// What threads, warps, blocks and teams of blocks merge: sums about a pivot. Float32 up to a warp, float64 above, always
// in the same order.
#pragma once

#include <cooperative_groups.h>

#include "core/moments.h"
#include "cuda/slab.h"

namespace fusednorm::cuda {

// 1/p of a power of two.
FN_DEVICE double inverse(double p) { return bit_cast<double>((uint64_t(2046) << 52) - bit_cast<uint64_t>(p)); }

// Sums over n numbers x of (x − pivot)·scale and of its square: Moments before the division, so that a merge is a few
// additions. With a pivot near the mean nothing cancels in float64. The backward's two sums, Σu and Σu·z, are merged as
// s and q about the pivot 0. `scale` is 1, unless squares of float64 numbers would leave its range.
template <class R>
struct Sums {
  double n, pivot, s, q, scale;
  static constexpr bool kScaled = sizeof(R) == 8;
  static constexpr double kDown = 0x1p-540;

  FN_DEVICE static Sums none() { return {0, 0, 0, 0, 1}; }

  FN_DEVICE void merge(Sums other) {
    if (n == 0) pivot = other.pivot;
    if (kScaled && scale != other.scale) rescale(::fmin(scale, other.scale)), other.rescale(scale);
    if (kScaled && !(joined(other) < 1e305)) rescale(kDown), other.rescale(kDown);
    q = joined(other);
    s += other.s + other.n * distance(other);
    n += other.n;
  }
  FN_DEVICE double unit() const { return kScaled ? inverse(scale) : 1; }
  FN_DEVICE double mean() const { return n > 0 ? pivot + s / n * unit() : 0; }
  // Σ(x − mean)², times scale²; not centered, the mean is 0, and so was the pivot.
  FN_DEVICE double scaled_m2(bool center) const {
    const double m2 = n > 0 ? center ? q - s * (s / n) : q : 0;
    return m2 < 0 ? 0 : m2;
  }
  FN_DEVICE double rstd(bool center, double eps) const {
    const double variance = n > 0 ? scaled_m2(center) / n : 0;
    return kScaled ? scale / ::sqrt(variance + eps * scale * scale) : 1 / ::sqrt(variance + eps);
  }

 private:
  FN_DEVICE double distance(const Sums& other) const {
    return kScaled ? other.pivot * scale - pivot * scale : other.pivot - pivot;
  }
  FN_DEVICE double joined(const Sums& other) const {
    const double d = distance(other);
    return q + (other.q + d * (2 * other.s + other.n * d));
  }
  FN_DEVICE void rescale(double to) {
    const double factor = to * inverse(scale);
    s *= factor;
    q *= factor * factor;
    scale = to;
  }
};
static_assert(sizeof(Sums<float>) == kSumsBytes);

// The scales a chunk of numbers is summed at, in turn until the squares are in range: as they are, very small ones, very
// large ones.
template <class R>
FN_DEVICE R scale_of(int attempt) {
  constexpr double up = sizeof(R) == 4 ? 0x1p90 : 0x1p500, down = sizeof(R) == 4 ? 0x1p-100 : Sums<R>::kDown;
  return attempt == 0 ? R(1) : attempt == 1 ? R(up) : R(down);
}
// Sums that were taken at this scale.
template <class R>
FN_DEVICE bool in_range(double s, double q) {
  if (s == 0 && q == 0) return true;
  return sizeof(R) == 4 ? q > 1e-28 && q < 1e38 : q > 1e-290 && q < 1e300;
}
template <class R>
FN_DEVICE bool in_range(const Sums<R>& sums, R scale) {
  return in_range<R>(sums.s, Sums<R>::kScaled ? sums.q : sums.q * double(scale) * double(scale));
}

template <class R, int kCount>
FN_DEVICE R sum_of(const R (&v)[kCount]) {
  if constexpr (kCount == 4) return (v[0] + v[1]) + (v[2] + v[3]);
  return v[0] + v[1];
}

// A thread's sums: one for rows, one for each element of a pack for columns.
template <class R, int kOwn>
struct Tally {
  R s[kOwn] = {}, q[kOwn] = {};
  uint32_t n = 0;  // numbers; of columns, rows

  // Sums of some neighbouring columns from `from` on; for rows all are one.
  template <int kCount>
  FN_DEVICE void add(int from, R (&more_s)[kCount], R (&more_q)[kCount]) {
    if constexpr (kOwn > 1) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        s[from + j] += more_s[j];
        q[from + j] += more_q[j];
      }
    } else {
      s[0] += sum_of(more_s);
      q[0] += sum_of(more_q);
    }
  }
};

// Adds over the lanes of a warp that are a multiple of `period` apart; all get the sum.
template <class V>
FN_DEVICE V sum_lanes(V v, uint32_t period) {
  for (uint32_t o = period; o < kWarp; o *= 2) v += __shfl_xor_sync(kAllLanes, v, int(o));
  return v;
}

enum class Phase : int { all, sums, rest };  // of a pass: two launches in turn, or everything in one

// How a pass runs.
struct Job {
  Layout layout;
  Plan plan;
  Divisor size;  // of a team
  Phase phase;
  bool merges;
  void* partial;  // Sums [slot][block of the team][column], where a team meets in scratch memory
};

// A block in its team, and its shared memory:
//
//     coefficients [kCoefficients][columns] │ totals [2][columns] │ stage │ kept [packs of a thread][tensors][threads]
//
// Kept packs are a thread's own. Of the rest, column c belongs to thread c (its owner) until a barrier.
template <class T, bool kColumns>
class Member {
 public:
  using R = Real<T>;
  using Total = Sums<R>;
  static constexpr int kOwn = kColumns ? kWidth<T> : 1;

  const Job& job;
  R* const coefficients;
  int slab;  // that is worked on

  FN_DEVICE Member(const Job& j, unsigned char* shared)
      : job(j), coefficients(reinterpret_cast<R*>(shared)), slab(team()), shared_(shared) {}

  FN_DEVICE int team() const { return int(job.size.divide(anew(blockIdx.x))); }
  FN_DEVICE int rank() const { return int(blockIdx.x) - team() * job.plan.size; }

  FN_DEVICE uint4* kept(int i, int tensor, int tensors) const {
    return reinterpret_cast<uint4*>(shared_ + job.plan.kept_at) + (i * tensors + tensor) * int(blockDim.x) + thread();
  }

  // The first of the columns that the thread's packs hold, and how far apart the lanes that share them are.
  FN_DEVICE uint32_t period() const { return kColumns ? job.layout.packs.by : 1; }
  FN_DEVICE int column() const { return kColumns ? int(thread() & (period() - 1)) * kWidth<T> : 0; }

  FN_DEVICE bool owner() const { return thread() < uint32_t(job.layout.columns); }

  // A new slab: the owners' totals are empty.
  FN_DEVICE void begin() {
    parity_ ^= 1;
    if (owner()) *total(thread()) = Total::none();
  }
  // What a warp knows of its columns, [columns]: the pivots that its lanes share, and then their sums.
  enum Known { pivot, sum, square, count, kinds };
  FN_DEVICE R* known(Known what, uint32_t warp) const {
    return stage<R>() + (uint32_t(what) * (blockDim.x / kWarp) + warp) * uint32_t(job.layout.columns);
  }
  FN_DEVICE R* pivots() const { return known(pivot, thread() / kWarp); }
  // Sets them, from shares in the means of some columns from `from` on (of rows: of the mean) that lanes hold.
  FN_DEVICE void set_pivots(int from, const R (&share)[kSome<T>]) const {
#pragma unroll
    for (int j = 0; j < (kColumns ? kSome<T> : 1); ++j) {
      const R mean = sum_lanes(kColumns ? share[j] : sum_of(share), period());
      if (thread() % kWarp < period()) pivots()[column() + from + j] = mean;
    }
  }
  // The block's sums of the owner's column, of all threads' tallies; all threads call it. Not centered: about 0.
  FN_DEVICE Total block_sums(const Tally<R, kOwn>& t, R scale, bool centered) const {
    const uint32_t warp = thread() / kWarp, n = sum_lanes(t.n, period());
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const R s = sum_lanes(t.s[j], period()), q = sum_lanes(t.q[j], period());
      if (thread() % kWarp < period()) {
        known(sum, warp)[column() + j] = s;
        known(square, warp)[column() + j] = q;
        known(count, warp)[column() + j] = R(n);
      }
    }
    __syncthreads();
    Total mine = Total::none();
    const double unit = inverse(double(scale));
    if (owner())
      for (uint32_t w = 0; w < blockDim.x / kWarp; ++w) {
        const double at = centered ? double(known(pivot, w)[thread()]) * unit : 0;
        const double s = double(known(sum, w)[thread()]), q = double(known(square, w)[thread()]);
        const double n_there = double(known(count, w)[thread()]);
        if constexpr (Total::kScaled)
          mine.merge({n_there, at, s, q, scale});
        else
          mine.merge({n_there, at, s * unit, q * unit * unit, 1});
      }
    __syncthreads();
    return mine;
  }
  FN_DEVICE void add(const Total& sums) { total(thread())->merge(sums); }

  // Makes the totals known to the team.
  FN_DEVICE void publish() const {
    if (job.plan.team >= Team::grid && owner()) partial(slab, rank())[thread()] = *total(thread());
  }
  // All blocks of the team come here (of a grid: all).
  FN_DEVICE void sync() const {
    switch (job.plan.team) {
      case Team::block: __syncthreads(); break;
      case Team::cluster: sync_cluster(); break;
      case Team::grid: cooperative_groups::this_grid().sync(); break;
      case Team::launches: break;
    }
  }
  // The team's sums of the owner's column; all threads call it.
  FN_DEVICE Total gather() const {
    const Layout& l = job.layout;
    if (job.plan.size == 1 && l.repeat == 1 && job.plan.team != Team::launches)
      return owner() ? *total(thread()) : Total::none();
    const uint32_t columns = uint32_t(l.columns), c = thread() & (columns - 1), slice = thread() / columns;
    Total sums = Total::none();
    if (slice < uint32_t(job.plan.slices)) {
      for (uint32_t i = slice; i < uint32_t(job.plan.size * l.repeat); i += uint32_t(job.plan.slices)) {
        const uint32_t copy = i / uint32_t(job.plan.size), block = i - copy * uint32_t(job.plan.size);
        sums.merge(kColumns && l.repeat > 1 ? copy_of(c, copy, int(block)) : fetch(slab, int(block), c));
      }
      stage<Total>()[slice * columns + c] = sums;
    }
    __syncthreads();
    sums = Total::none();
    if (owner())
      for (uint32_t i = 0; i < uint32_t(job.plan.slices); ++i) sums.merge(stage<Total>()[i * columns + c]);
    return sums;
  }
  // Before a block of a cluster ends: others may still read its totals.
  FN_DEVICE void end() const {
    if (job.plan.team == Team::cluster) sync_cluster();
  }

 private:
  template <class V>
  FN_DEVICE V* stage() const {
    return reinterpret_cast<V*>(shared_ + job.plan.stage_at);
  }
  FN_DEVICE Total* total(uint32_t c) const {
    return reinterpret_cast<Total*>(shared_ + job.plan.totals_at) + parity_ * job.layout.columns + int(c);
  }
  FN_DEVICE Total* partial(int of, int block) const {
    // Of a grid two rounds are alive: this one, and in blocks that are behind the last.
    const int slot = job.plan.team == Team::launches ? of
                     : job.layout.together()         ? parity_ * job.plan.teams + of
                                                     : parity_ * job.plan.teams + team();
    return static_cast<Total*>(job.partial) + (int64_t(slot) * job.plan.size + block) * job.layout.columns;
  }
  FN_DEVICE Total fetch(int of, int block, uint32_t c) const {
    if (job.plan.team >= Team::grid) return partial(of, block)[c];
    return *map(total(c), block);
  }
  // A copy of the slab's column c, which may lie in another slab.
  FN_DEVICE Total copy_of(uint32_t c, uint32_t copy, int block) const {
    const Layout& l = job.layout;
    const uint32_t pitch = uint32_t(l.pitch), groups = uint32_t(l.groups), strips = l.per_entry.by;
    const uint32_t entry = l.per_entry.divide(uint32_t(slab)), column = (uint32_t(slab) - entry * strips) * pitch + c;
    if (c >= pitch || column >= uint32_t(l.row)) return Total::none();
    const uint32_t other = column % groups + copy * groups;
    return fetch(int(entry * strips + other / pitch), block, other % pitch);
  }
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  FN_DEVICE static void sync_cluster() { cooperative_groups::this_cluster().sync(); }
  FN_DEVICE Total* map(Total* mine, int block) const {
    if (job.plan.team == Team::block) return mine;
    return cooperative_groups::this_cluster().map_shared_rank(mine, uint32_t(block));
  }
#else
  FN_DEVICE static void sync_cluster() {}
  FN_DEVICE Total* map(Total* mine, int) const { return mine; }
#endif

  unsigned char* const shared_;
  int parity_ = 0;
};

}  // namespace fusednorm::cuda
