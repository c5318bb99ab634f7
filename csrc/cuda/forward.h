// Forward: statistics, then y = act((x − hi)·scale + shift + residual), for a slab at a time.
//
// The first sweep takes the statistics and keeps what fits into shared memory; the second goes the other way, and finds
// what it reads again in L2 as far as that reaches. Kept packs are private to their thread: no barrier but the team's.
//
// Statistics: a warp's pivot is the mean of its first packs; around it Σ(x − pivot) and its square are summed in float32
// over a chunk of at most kChunk packs a thread, which the block then takes into its float64 sums. A chunk whose squares
// leave float32's range is summed again, scaled.
#pragma once

#include "cuda/passes.h"

namespace fusednorm::cuda {

constexpr int kForwardBatch = 4;  // packs that a thread loads at once: 32 KB and more are to be in flight in an SM

// The thread's packs [from, to), times `scale`, about its warp's pivots.
template <class T, bool kColumns, bool kGeneral>
FN_DEVICE auto tally_moments(const ForwardPass& pass, const Member<T, kColumns>& me, const Slab<T, kColumns>& slab,
                             int64_t run, int from, int to, Real<T> scale) {
  using R = Real<T>;
  constexpr int batch = kForwardBatch, some = kSome<T>, parts = kWidth<T> / some;
  const T* x = anew(pass.x.template as<const T>() + slab.first);
  const int kept = me.job.plan.kept;
  Tally<R, Member<T, kColumns>::kOwn> t;
  // kAll: `batch` packs that are all there, and kept all or none.
  const auto take_batch = [&](int i, auto all) {
    constexpr bool kAll = decltype(all)::value;
    uint4 v[batch], *const place = me.kept(i, 0, 1);
    uint32_t counted[batch], n = 0;
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      const auto at = slab.template at<kAll>(i + k);
      v[k] = load(at.in(x), at.there, kAll || me.job.layout.vector, i + (kAll ? 0 : k) < kept);
      counted[k] = kGeneral && pass.mask ? slab.counted(pass.mask, run, i + k, at) : at.there;
    }
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      if (i + (kAll ? 0 : k) < kept) place[k * blockDim.x] = v[k];
      n += kColumns ? counted[k] != 0 : uint32_t(__popc(counted[k]));
    }
    t.n += n;

    if (i == from) {
      const uint32_t number = sum_lanes(n, me.period());
      const R share = pass.center && number > 0 ? scale * quotient(R(1), R(number)) : R(0);
      R sum[some] = {};
#pragma unroll
      for (int part = 0; part < parts; ++part) {
        if (kColumns)
#pragma unroll
          for (R& s : sum) s = 0;
#pragma unroll
        for (int k = 0; k < batch; ++k) {
          R value[some];
          take(v[k], part, value, T{});
#pragma unroll
          for (int j = 0; j < some; ++j)
            if (counted[k] >> (part * some + j) & 1) sum[j] = fused(value[j], share, sum[j]);
        }
        if (kColumns) me.set_pivots(part * some, sum);
      }
      if (!kColumns) me.set_pivots(0, sum);
      __syncwarp();
    }
#pragma unroll
    for (int part = 0; part < parts; ++part) {
      R pivot[some], s[some] = {}, q[some] = {};
      take_coefficients<kColumns>(me.pivots(), me.column() + part * some, pivot);
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        R value[some];
        take(v[k], part, value, T{});
#pragma unroll
        for (int j = 0; j < some; ++j) {
          R d = fused(value[j], scale, -pivot[j]);
          if (!(counted[k] >> (part * some + j) & 1)) d = 0;
          s[j] += d;
          q[j] = fused(d, d, q[j]);
        }
      }
      t.add(part * some, s, q);
    }
  };
  for (int i = from; i < to; i += batch) {
    if (i + batch <= slab.whole && (i + batch <= kept || i >= kept) && !(kGeneral && pass.mask))
      take_batch(i, std::true_type{});
    else
      take_batch(i, std::false_type{});
  }
  return t;
}

// The block's part of the slab into its totals.
template <class T, bool kColumns, bool kGeneral>
FN_DEVICE void take_moments(const ForwardPass& pass, Member<T, kColumns>& me) {
  using R = Real<T>;
  const Slab<T, kColumns> slab(me.job.layout, me.job.plan, me.slab, me.rank());
  const int64_t run = kGeneral ? slab.first_run(me.job.layout, me.job.plan, me.slab, me.rank()) : 0;
  for (int from = 0; from < slab.steps; from += kChunk) {
    const int to = from + kChunk < slab.steps ? from + kChunk : slab.steps;
    bool done = !me.owner();
    for (int attempt = 0; attempt < 3; ++attempt) {
      const R scale = scale_of<R>(attempt);
      const auto tally = tally_moments<T, kColumns, kGeneral>(pass, me, slab, run, from, to, scale);
      const auto sums = me.block_sums(tally, scale, true);
      if (!done && (attempt == 2 || in_range<R>(sums, scale))) {
        me.add(sums);
        done = true;
      }
      if (!__syncthreads_or(!done)) break;
    }
  }
  me.publish();
}

// What the owner of a column finds out about it, and writes down; its coefficients follow from that.
template <class T, bool kColumns>
FN_DEVICE void settle(const ForwardPass& pass, const Member<T, kColumns>& me, const Column& column,
                      const Sums<Real<T>>& sums) {
  using R = Real<T>;
  const int64_t s = column.statistic, c = column.channel;
  double mean, rstd;
  if (pass.takes_statistics()) {
    const double unit = sums.unit(), m2 = sums.scaled_m2(pass.center) * unit * unit;
    mean = pass.center ? sums.mean() : 0;
    rstd = sums.rstd(pass.center, pass.eps);
    if (me.rank() == 0 && column.first) {
      if (pass.count) pass.count[s] = sums.n;
      if (pass.m2) pass.m2[s] = m2;
      if (pass.sums) static_cast<Sums<R>*>(pass.sums)[s] = sums;
      // A mask that counts fewer than two numbers says nothing.
      if (pass.updates && sums.n >= 2)
        pass.running.update(c, pass.update_weight, mean, m2 / (sums.n - pass.running.correction));
    }
  } else {
    mean = pass.evaluation ? pass.running.mean.get(c) : pass.given_mean ? pass.given_mean[pass.share.divide(s)] : 0;
    rstd = pass.evaluation ? 1 / ::sqrt(pass.running.var.get(c) + pass.eps) : pass.given_rstd[pass.share.divide(s)];
  }
  if (me.rank() == 0 && column.first) {
    if (pass.mean) pass.mean[s] = mean;
    if (pass.rstd) pass.rstd[s] = rstd;
  }
  if (!pass.y) return;
  const Affine<R> a = affine<R>(mean, rstd, pass.weight.get_or(c, 1), pass.bias.get_or(c, 0));
  R* to = me.coefficients + thread();
  const int row = me.job.layout.columns;
  to[0] = a.hi;
  to[row] = a.scale;
  to[2 * row] = a.shift;
}

template <class T, bool kColumns, bool kGeneral>
FN_DEVICE void apply(const ForwardPass& pass, const Member<T, kColumns>& me) {
  using R = Real<T>;
  const Slab<T, kColumns> slab(me.job.layout, me.job.plan, me.slab, me.rank());
  constexpr int batch = kForwardBatch, some = kSome<T>, parts = kWidth<T> / some;
  const T *x = anew(pass.x.template as<const T>() + slab.first),
          *residual = pass.epilogue.residual.template as<const T>();
  T* y = anew(pass.y.template as<T>() + slab.first);
  const bool vector = me.job.layout.vector;
  const R least = pass.epilogue.activation == Activation::relu ? R(0) : R(-__builtin_huge_val());
  const int kept = me.job.plan.kept, row = me.job.layout.columns, column = me.column();
  const auto write_batch = [&](int i, auto all) {
    constexpr bool kAll = decltype(all)::value;
    uint4 v[batch], added[kGeneral ? batch : 1], *const place = me.kept(i, 0, 1);
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      const auto at = slab.template at<kAll>(i + k);
      v[k] = i + (kAll ? 0 : k) < kept ? place[k * blockDim.x] : load(at.in(x), at.there, kAll || vector, true);
      if (kGeneral && residual) added[k] = load(at.in(residual + slab.first), at.there, kAll || vector, true);
    }
#pragma unroll
    for (int part = 0; part < parts; ++part) {
      R hi[some], scale[some], shift[some];
      take_coefficients<kColumns>(me.coefficients, column + part * some, hi);
      take_coefficients<kColumns>(me.coefficients + row, column + part * some, scale);
      take_coefficients<kColumns>(me.coefficients + 2 * row, column + part * some, shift);
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        R value[some], more[some];
        take(v[k], part, value, T{});
        if (kGeneral && residual) take(added[k], part, more, T{});
#pragma unroll
        for (int j = 0; j < some; ++j) {
          R pre = fused(value[j] - hi[j], scale[j], shift[j]);
          if (kGeneral && residual) pre += more[j];
          if (kGeneral)
            value[j] = activate<Math>(pass.epilogue.activation, R(pass.epilogue.slope), pre);
          else
            value[j] = at_least(pre, least);
        }
        put(v[k], part, value, T{});
      }
    }
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      const auto at = slab.template at<kAll>(i + k);  // once more: cheaper than to hold it
      store(at.in(y), v[k], at.there, kAll || vector, true);
    }
  };
  for (int i = (slab.steps - 1) / batch * batch; i >= 0; i -= batch) {
    if (i + batch <= slab.whole && (i + batch <= kept || i >= kept))
      write_batch(i, std::true_type{});
    else
      write_batch(i, std::false_type{});
  }
}

template <class T, bool kColumns, bool kGeneral>
__global__ void __launch_bounds__(ForwardPass::resident(kGeneral), 1)
    forward(const __grid_constant__ ForwardPass pass, const __grid_constant__ Job job) {
  FN_SHARED(unsigned char, shared);
  Member<T, kColumns> me(job, shared);
  for (; me.slab - me.team() < job.layout.slabs; me.slab += job.plan.teams) {
    const bool mine = me.slab < job.layout.slabs;
    me.begin();
    if (pass.takes_statistics() && job.phase != Phase::rest) {
      if (mine) take_moments<T, kColumns, kGeneral>(pass, me);
      me.sync();
    }
    if (mine && job.phase != Phase::sums) {
      const auto sums = pass.takes_statistics() ? me.gather() : Sums<Real<T>>::none();
      const Column column = Column::of<kColumns>(job.layout, me.slab);
      if (column.there) settle(pass, me, column, sums);
      __syncthreads();
      if (pass.y) apply<T, kColumns, kGeneral>(pass, me);
    }
    __syncthreads();  // coefficients and stage are free again
  }
  me.end();
}

}  // namespace fusednorm::cuda
