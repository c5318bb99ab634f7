// Columns: memory in which neighbours belong to different statistics and channels (channels last, (N, C)).
//
// A batch entry is a matrix of `outer` rows and `groups` columns. It is cut, by its shape alone, into tiles of rows (the
// unit of work), panels of columns (1 KB of a row) and chunks (a few rows of a panel: two passes over L1), and each column
// of a chunk is merged into its tile's moments, vectorized over the columns.
//
// Few or odd columns are seen as more: the matrix is contiguous, so `repeat` rows of it are one row of repeat·groups
// columns, as wide as whole registers want it. The copies of a column are merged at the end; the rows that are left over
// are one more, narrow, tile.
//
// Coefficients lie in lane order (simd.h), one register after the other.
#pragma once

#include "cpu/passes.h"
#include "cpu/rows.h"
#include "cpu/team.h"

namespace fusednorm::cpu::FUSEDNORM_ISA {
namespace {

constexpr int kPanelBytes = 1024;  // of one row
constexpr int64_t kChunkElements = 8192, kTileElements = 65536, kMaxTiles = 128;
constexpr int kStep = 8;  // rows that share one load of a column's accumulators or coefficients

template <class T>
constexpr int kPanel = kPanelBytes / int(sizeof(T));  // columns
template <class T>
constexpr int kPanelVectors = kPanel<T> / Pack<T>::width* Pack<T>::parts;
template <class R>
constexpr int kWide = sizeof(R) == 8 ? 1 : 2;  // float64 vectors that a vector of R becomes

FN_INLINE void widen(D v, D* wide) { wide[0] = v; }
FN_INLINE void widen(F v, D* wide) { widen(v, wide[0], wide[1]); }

// A rectangle of one panel's width or less.
struct Block {
  int64_t offset, rows, columns, stride;  // elements
};

template <class T>
struct ColumnShape {
  int64_t groups, outer, repeat, columns, rows, rest, panels, chunk_rows, tile_rows, tiles;

  explicit ColumnShape(const Fold& f) : groups(f.groups), outer(f.outer), repeat(1) {
    constexpr int64_t width = Pack<T>::width;
    while ((repeat * groups % width != 0 || repeat * groups < 64) && groups < 1024 && repeat < width * 2 &&
           outer >= 16 * repeat)
      repeat *= 2;
    columns = repeat * groups;
    rows = outer / repeat;
    rest = outer % repeat;
    panels = (columns + kPanel<T> - 1) / kPanel<T>;
    chunk_rows = kChunkElements / (panels > 1 ? kPanel<T> : columns) / kStep * kStep;
    chunk_rows = chunk_rows > 64 ? 64 : chunk_rows < kStep ? kStep : chunk_rows;
    const int64_t wanted = kTileElements / columns + 1, least = (rows + kMaxTiles - 1) / kMaxTiles;
    tile_rows = ((wanted > least ? wanted : least) + chunk_rows - 1) / chunk_rows * chunk_rows;
    tiles = (rows + tile_rows - 1) / tile_rows;
  }
  int64_t all_tiles() const { return tiles + (rest > 0); }
  int64_t registers() const { return (columns + Pack<T>::width - 1) / Pack<T>::width; }

  // Rows of one column in a tile.
  int64_t tile_height(int64_t tile) const {
    if (tile == tiles) return rest;
    return rows - tile * tile_rows < tile_rows ? rows - tile * tile_rows : tile_rows;
  }
  // No columns where a panel lies beyond the narrow tile.
  Block block(int64_t b, int64_t tile, int64_t panel) const {
    const int64_t wide = tile == tiles ? groups : columns, left = wide - panel * kPanel<T>;
    return {b * outer * groups + tile * tile_rows * columns * (tile < tiles) + rows * columns * (tile == tiles) +
                panel * kPanel<T>,
            tile_height(tile), left < 0 ? 0 : left < kPanel<T> ? left : kPanel<T>, wide};
  }
};

// Calls step(column, register index, Whole or Part) across a block's columns.
template <class T, class Step>
FN_INLINE void across(int64_t columns, Step&& step) {
  constexpr int64_t width = Pack<T>::width;
  int64_t j = 0, index = 0;
  for (; j + width <= columns; j += width, ++index) step(j, index, Whole{});
  if (j < columns) step(j, index, Part{int(columns - j)});
}
// Calls step(row, column, register index, There, rows in this step as a constant) over a block, kStep rows at a time.
template <int kRows>
struct RowsNow {
  static constexpr int value = kRows;
};
template <class T, class Step>
FN_INLINE void down(const Block& block, Step&& step) {
  int64_t r = 0;
  for (; r + kStep <= block.rows; r += kStep)
    across<T>(block.columns,
              [&](int64_t j, int64_t index, auto there) FN_LAMBDA { step(r, j, index, there, RowsNow<kStep>{}); });
  for (; r < block.rows; ++r)
    across<T>(block.columns,
              [&](int64_t j, int64_t index, auto there) FN_LAMBDA { step(r, j, index, there, RowsNow<1>{}); });
}

// Running float64 moments of a tile's columns.
template <class T>
struct PanelMoments {
  using R = Real<T>;
  double n = 0;
  D mean[kPanelVectors<T> * kWide<R>] = {}, m2[kPanelVectors<T> * kWide<R>] = {};
};

// The chunk's columns of one register again, in float64.
template <class T>
[[gnu::noinline]] void column_moments_wide(const T* x, const Block& block, int64_t column, int part, bool center, D* mean,
                                           D* m2) {
  for (int lane = 0; lane < kLanes<Real<T>>; ++lane) {
    const int64_t j = column + Pack<T>::order(part, lane);
    if (j >= block.columns) continue;
    const Moments m = chunk_moments_wide(x + block.offset + j, Runs{0, block.stride, block.rows, 1}, center);
    mean[lane / kLanes<double>][lane % kLanes<double>] = m.mean;
    m2[lane / kLanes<double>][lane % kLanes<double>] = m.m2;
  }
}

// `ahead`: elements to the chunk that is read next.
template <class T>
[[gnu::noinline]] void chunk_column_moments(const T* x, const Block& block, bool center, int64_t ahead,
                                            PanelMoments<T>& tile) {
  using R = Real<T>;
  using V = Vector<R>;
  constexpr int parts = Pack<T>::parts;
  V hi[kPanelVectors<T>] = {}, sum[kPanelVectors<T>] = {}, squares[kPanelVectors<T>] = {};
  const T* base = x + block.offset;
  down<T>(block, [&](int64_t r, int64_t j, int64_t index, auto there, auto now) FN_LAMBDA {
    V total[parts] = {};
#pragma GCC unroll 8
    for (int k = 0; k < now.value; ++k) {
      const T* p = base + (r + k) * block.stride + j;
      prefetch(p + ahead);
      const Lanes<T> v = load(p, there);
      for (int part = 0; part < parts; ++part) total[part] += v.v[part];
    }
    for (int part = 0; part < parts; ++part) hi[index * parts + part] += total[part];
  });
  const R one_over_n = R(1) / R(block.rows);
  for (V& h : hi) h = center ? h * one_over_n : V{};
  down<T>(block, [&](int64_t r, int64_t j, int64_t index, auto there, auto now) FN_LAMBDA {
    V s[parts] = {}, q[parts] = {};
#pragma GCC unroll 8
    for (int k = 0; k < now.value; ++k) {
      const Lanes<T> v = load(base + (r + k) * block.stride + j, there);
      for (int part = 0; part < parts; ++part) {
        const V d = v.v[part] - hi[index * parts + part];
        s[part] += d;
        q[part] = fma(d, d, q[part]);
      }
    }
    for (int part = 0; part < parts; ++part) {
      sum[index * parts + part] += s[part];
      squares[index * parts + part] += q[part];
    }
  });

  // Chan's merge, all columns with the same counts: two quotients serve the whole chunk.
  const double n = double(block.rows), total = tile.n + n, share = n / total, weight = tile.n * share;
  across<T>(block.columns, [&](int64_t j, int64_t index, auto) FN_LAMBDA {
    for (int part = 0; part < parts; ++part) {
      const int64_t i = index * parts + part;
      constexpr int wide = kWide<R>;
      D h[wide], s[wide], q[wide], mean[wide], m2[wide];
      widen(hi[i], h);
      widen(sum[i], s);
      widen(squares[i], q);
      bool suspect = false;
      for (int w = 0; w < wide; ++w) {
        mean[w] = h[w] + s[w] * (1 / n);
        m2[w] = q[w] - s[w] * s[w] / n;
        m2[w] = m2[w] < 0 ? D{} : m2[w];
        if (!center) mean[w] = D{}, m2[w] = q[w];
        if constexpr (wide == 2) {
          const auto fine = ((q[w] > 1e-28) & (q[w] < 1e38)) | ((s[w] == 0) & (q[w] == 0));
          for (int lane = 0; lane < kLanes<double>; ++lane) suspect |= !fine[lane];
        }
      }
      if (suspect) column_moments_wide(x, block, j, part, center, mean, m2);
      for (int w = 0; w < wide; ++w) {
        const int64_t to = i * wide + w;
        const D delta = mean[w] - tile.mean[to];
        tile.mean[to] += delta * share;
        tile.m2[to] += m2[w] + (weight == 0 ? D{} : delta * delta * weight);
      }
    }
  });
  tile.n = total;
}

// Reads lane-ordered float64 vectors out to natural order.
template <class T>
FN_INLINE void to_columns(const D* vectors, int64_t columns, double* out) {
  constexpr int lanes = kLanes<Real<T>>;
  for (int64_t index = 0; index * Pack<T>::width < columns; ++index)
    for (int part = 0; part < Pack<T>::parts; ++part)
      for (int lane = 0; lane < lanes; ++lane) {
        const int64_t j = index * Pack<T>::width + Pack<T>::order(part, lane);
        const int64_t vector = (index * Pack<T>::parts + part) * kWide<Real<T>> + lane / kLanes<double>;
        if (j < columns) out[j] = vectors[vector][lane % kLanes<double>];
      }
}
// Writes `value(c)` of every column's channel in lane order, zero beyond the columns.
template <class T, class Value>
FN_INLINE void to_lanes(const ColumnShape<T>& shape, int64_t begin, int64_t end, Vector<Real<T>>* out, Value&& value) {
  for (int64_t index = begin / Pack<T>::width; index * Pack<T>::width < end; ++index)
    for (int part = 0; part < Pack<T>::parts; ++part)
      for (int lane = 0; lane < kLanes<Real<T>>; ++lane) {
        const int64_t j = index * Pack<T>::width + Pack<T>::order(part, lane);
        out[index * Pack<T>::parts + part][lane] = j < shape.columns ? value(j % shape.groups) : 0;
      }
}

template <class V>
struct ColumnAffine {  // lane order
  V *hi, *scale, *shift;
};
template <class V>
struct ColumnGrad {
  V *rstd, *scale, *slope, *shift;
};

template <class T>
FN_INLINE bool can_stream(const T* out, const Block& block) {
  return (reinterpret_cast<intptr_t>(out + block.offset) | (block.stride * int64_t(sizeof(T)))) % kLine == 0;
}
template <class T, class There>
FN_INLINE void put(T* p, const Lanes<T>& v, There there, bool past) {
  if constexpr (sizeof(There) == sizeof(Whole))
    if (past) return stream(p, v);
  store(p, v, there);
}

template <class E>
[[gnu::noinline]] void apply_block(const E& e, const typename E::Element* x, typename E::Element* y, const Block& block,
                                   const ColumnAffine<typename E::V>& a, bool streamed) {
  using T = typename E::Element;
  using V = typename E::V;
  constexpr int parts = Pack<T>::parts;
  down<T>(block, [&](int64_t r, int64_t j, int64_t index, auto there, auto now) FN_LAMBDA {
    V hi[parts], scale[parts], shift[parts];
    for (int part = 0; part < parts; ++part) {
      hi[part] = a.hi[index * parts + part];
      scale[part] = a.scale[index * parts + part];
      shift[part] = a.shift[index * parts + part];
    }
#pragma GCC unroll 8
    for (int k = 0; k < now.value; ++k) {
      const int64_t i = block.offset + (r + k) * block.stride + j;
      const Lanes<T> added = e.load_residual(i, there);
      Lanes<T> v = load(x + i, there);
      for (int part = 0; part < parts; ++part)
        v.v[part] = e.value(e.pre(v.v[part] - hi[part], scale[part], shift[part], added.v[part]));
      put(y + i, v, there, streamed);
    }
  });
}

// u and z = (x − hi)·rstd of the packs at element i.
template <class E, class There>
FN_INLINE void load_u_z(const E& e, const typename E::Element* dy, const typename E::Element* x,
                        const ColumnAffine<typename E::V>& a, const ColumnGrad<typename E::V>& g, int64_t i, int64_t index,
                        There there, Lanes<typename E::Element>& u, Lanes<typename E::Element>& z) {
  using T = typename E::Element;
  constexpr int parts = Pack<T>::parts;
  u = load(dy + i, there);
  z = load(x + i, there);
  const Lanes<T> added = E::kNeedsPre ? e.load_residual(i, there) : Lanes<T>{};
  for (int part = 0; part < parts; ++part) {
    const int64_t v = index * parts + part;
    z.v[part] = z.v[part] - a.hi[v];
    if constexpr (E::kNeedsPre)
      u.v[part] = e.gradient(u.v[part], e.pre(z.v[part], a.scale[v], a.shift[v], added.v[part]));
    z.v[part] = z.v[part] * g.rstd[v];
  }
}

template <class T>
struct PanelGradSums {
  using R = Real<T>;
  D u[kPanelVectors<T> * kWide<R>] = {}, uz[kPanelVectors<T> * kWide<R>] = {};
};

template <class E>
[[gnu::noinline]] void chunk_column_grad_sums(const E& e, const typename E::Element* dy, const typename E::Element* x,
                                              const Block& block, const ColumnAffine<typename E::V>& a,
                                              const ColumnGrad<typename E::V>& g, int64_t ahead,
                                              PanelGradSums<typename E::Element>& tile) {
  using T = typename E::Element;
  using R = Real<T>;
  using V = typename E::V;
  constexpr int parts = Pack<T>::parts, wide = kWide<R>;
  V sum[kPanelVectors<T>] = {}, product[kPanelVectors<T>] = {};
  down<T>(block, [&](int64_t r, int64_t j, int64_t index, auto there, auto now) FN_LAMBDA {
    V s[parts] = {}, q[parts] = {};
#pragma GCC unroll 8
    for (int k = 0; k < now.value; ++k) {
      const int64_t i = block.offset + (r + k) * block.stride + j;
      prefetch(x + i + ahead);
      prefetch(dy + i + ahead);
      Lanes<T> u, z;
      load_u_z(e, dy, x, a, g, i, index, there, u, z);
      for (int part = 0; part < parts; ++part) {
        s[part] += u.v[part];
        q[part] = fma(u.v[part], z.v[part], q[part]);
      }
    }
    for (int part = 0; part < parts; ++part) {
      sum[index * parts + part] += s[part];
      product[index * parts + part] += q[part];
    }
  });
  across<T>(block.columns, [&](int64_t, int64_t index, auto) FN_LAMBDA {
    for (int part = 0; part < parts; ++part) {
      const int64_t i = index * parts + part;
      D s[wide], q[wide];
      widen(sum[i], s);
      widen(product[i], q);
      for (int w = 0; w < wide; ++w) {
        tile.u[i * wide + w] += s[w];
        tile.uz[i * wide + w] += q[w];
      }
    }
  });
}

template <bool kConstant, class E>
[[gnu::noinline]] void grad_block(const E& e, const typename E::Element* dy, const typename E::Element* x,
                                  const GradOut<typename E::Element>& out, const Block& block,
                                  const ColumnAffine<typename E::V>& a, const ColumnGrad<typename E::V>& g, bool streamed) {
  using T = typename E::Element;
  constexpr int parts = Pack<T>::parts;
  down<T>(block, [&](int64_t r, int64_t j, int64_t index, auto there, auto now) FN_LAMBDA {
#pragma GCC unroll 8
    for (int k = 0; k < now.value; ++k) {
      const int64_t i = block.offset + (r + k) * block.stride + j;
      Lanes<T> u, v;
      load_u_z(e, dy, x, a, g, i, index, there, u, v);
      for (int part = 0; part < parts; ++part) {
        const int64_t c = index * parts + part;
        if constexpr (kConstant)
          v.v[part] = g.scale[c] * u.v[part];
        else
          v.v[part] = fma(g.scale[c], u.v[part], fma(g.slope[c], v.v[part], g.shift[c]));
      }
      put(out.dx + i, v, there, streamed);
      if (out.dresidual) put(out.dresidual + i, u, there, streamed);
    }
  });
}

// A block's chunks: call(chunk, elements ahead to the next).
template <class T, class Call>
FN_INLINE void chunks_of(const Block& block, int64_t chunk_rows, Call&& call) {
  for (int64_t r = 0; r < block.rows; r += chunk_rows) {
    const int64_t rows = block.rows - r < chunk_rows ? block.rows - r : chunk_rows;
    call(Block{block.offset + r * block.stride, rows, block.columns, block.stride}, chunk_rows * block.stride);
  }
}

// Tasks of both passes: a panel of a tile of a batch entry; and, between the sweeps, the columns to settle: by panel, or
// all at once where the copies of a column lie in different panels.
template <class T>
struct ColumnTasks {
  const ColumnShape<T>& shape;
  int64_t blocks, settles;

  ColumnTasks(const ColumnShape<T>& s, int64_t batch)
      : shape(s), blocks(batch * s.all_tiles() * s.panels), settles(batch * (s.repeat == 1 ? s.panels : 1)) {}

  struct At {
    int64_t b, tile, panel;
    Block block;
  };
  At at(int64_t i) const {
    const int64_t panel = i % shape.panels, tile = i / shape.panels % shape.all_tiles();
    const int64_t b = i / shape.panels / shape.all_tiles();
    return {b, tile, panel, shape.block(b, tile, panel)};
  }
  struct Settle {
    int64_t b, begin, end;
  };
  Settle settle(int64_t i) const {
    const int64_t per_batch = shape.repeat == 1 ? shape.panels : 1, panel = i % per_batch;
    const int64_t end = panel * kPanel<T> + kPanel<T>;
    if (shape.repeat > 1) return {i, 0, shape.columns};
    return {i / per_batch, panel * kPanel<T>, end < shape.columns ? end : shape.columns};
  }
};

template <class E>
void forward_columns(const E& e, const ForwardPass& pass) {
  using T = typename E::Element;
  using R = Real<T>;
  using V = typename E::V;
  const Fold& f = pass.fold;
  const ColumnShape<T> shape(f);
  const ColumnTasks<T> tasks(shape, f.batch);
  const int64_t tiles = shape.all_tiles(), vectors = shape.registers() * Pack<T>::parts;
  const T* x = pass.x.template as<const T>();
  T* y = pass.y.template as<T>();
  const bool streamed = y && f.size() * int64_t(sizeof(T)) >= kStreamBytes;
  const int64_t parts_needed = pass.takes_statistics() ? f.batch * tiles * shape.columns : 0;
  Scratch<double> part_mean(parts_needed), part_m2(parts_needed);
  Scratch<V> coefficients(y ? 3 * f.batch * vectors : 0);
  const auto lanes_of = [&](int64_t b) {
    V* first = coefficients.get() + 3 * b * vectors;
    return ColumnAffine<V>{first, first + vectors, first + 2 * vectors};
  };

  parallel(threads_for(f.size(), tasks.blocks), [&](const Team& team) {
    if (pass.takes_statistics())
      team.each(tasks.blocks, [&](int64_t i) {
        const auto at = tasks.at(i);
        if (at.block.columns == 0) return;
        PanelMoments<T> m;
        chunks_of<T>(at.block, shape.chunk_rows, [&](const Block& chunk, int64_t ahead) {
          chunk_column_moments(x, chunk, pass.center, ahead, m);
        });
        const int64_t to = (at.b * tiles + at.tile) * shape.columns + at.panel * kPanel<T>;
        to_columns<T>(m.mean, at.block.columns, part_mean.get() + to);
        to_columns<T>(m.m2, at.block.columns, part_m2.get() + to);
      });
    team.each(tasks.settles, [&](int64_t i) {
      const auto at = tasks.settle(i);
      if (pass.takes_statistics()) {
        // Tiles into the first, all columns with the same counts; then the copies of a column; then the rest.
        double* mean = part_mean.get() + at.b * tiles * shape.columns;
        double* m2 = part_m2.get() + at.b * tiles * shape.columns;
        double n = double(shape.tile_height(0));
        for (int64_t tile = 1; tile < shape.tiles; ++tile) {
          const double more = double(shape.tile_height(tile)), share = more / (n + more), weight = n * share;
          for (int64_t j = at.begin; j < at.end; ++j) {
            const double delta = mean[tile * shape.columns + j] - mean[j];
            mean[j] += delta * share;
            m2[j] += m2[tile * shape.columns + j] + delta * delta * weight;
          }
          n += more;
        }
        for (int64_t c = at.begin; c < at.end && c < f.groups; ++c) {
          Moments m;
          for (int64_t j = c; j < at.end; j += f.groups) m.merge({n, mean[j], m2[j]});
          const int64_t last = shape.tiles * shape.columns + c;
          if (shape.rest) m.merge({double(shape.rest), mean[last], m2[last]});
          pass.found[at.b * f.groups + c] = m;
        }
      }
      if (!y) return;
      const ColumnAffine<V> lanes = lanes_of(at.b);
      const auto value = [&](int64_t c) { return pass.affine<R>(at.b * f.groups + c, c); };
      to_lanes(shape, at.begin, at.end, lanes.hi, [&](int64_t c) { return value(c).hi; });
      to_lanes(shape, at.begin, at.end, lanes.scale, [&](int64_t c) { return value(c).scale; });
      to_lanes(shape, at.begin, at.end, lanes.shift, [&](int64_t c) { return value(c).shift; });
    });
    if (y)
      team.each(tasks.blocks, [&](int64_t i) {
        const auto at = tasks.at(tasks.blocks - 1 - i);  // backwards: what was read last is still in cache
        const ColumnAffine<V> all = lanes_of(at.b);
        const int64_t from = at.panel * kPanelVectors<T>;
        apply_block(e, x, y, at.block, ColumnAffine<V>{all.hi + from, all.scale + from, all.shift + from},
                    streamed && can_stream(y, at.block));
      });
    stream_fence();
  });
}

template <class E>
void backward_columns(const E& e, const BackwardPass& pass) {
  using T = typename E::Element;
  using R = Real<T>;
  using V = typename E::V;
  const Fold& f = pass.fold;
  const ColumnShape<T> shape(f);
  const ColumnTasks<T> tasks(shape, f.batch);
  const int64_t tiles = shape.all_tiles(), vectors = shape.registers() * Pack<T>::parts;
  const T *dy = pass.dy.template as<const T>(), *x = pass.x.template as<const T>();
  const GradOut<T> out{pass.dx.template as<T>(), pass.dresidual.template as<T>()};
  const bool streamed = out.dx && f.size() * int64_t(sizeof(T)) >= kStreamBytes;
  const int64_t parts_needed = pass.found ? f.batch * tiles * shape.columns : 0;
  Scratch<double> part_u(parts_needed), part_uz(parts_needed);
  Scratch<V> coefficients(7 * f.batch * vectors);
  const auto lanes_of = [&](int64_t b, int64_t from) {
    V* v = coefficients.get() + 7 * b * vectors + from;
    return ColumnAffine<V>{v, v + vectors, v + 2 * vectors};
  };
  const auto grad_lanes_of = [&](int64_t b, int64_t from) {
    V* v = coefficients.get() + (7 * b + 3) * vectors + from;
    return ColumnGrad<V>{v, v + vectors, v + 2 * vectors, v + 3 * vectors};
  };
  const auto write = [&](const typename ColumnTasks<T>::At& at, const Block& block) {
    const int64_t from = at.panel * kPanelVectors<T>;
    const bool past = streamed && can_stream(out.dx, block) && (!out.dresidual || can_stream(out.dresidual, block));
    if (pass.constant)
      grad_block<true>(e, dy, x, out, block, lanes_of(at.b, from), grad_lanes_of(at.b, from), past);
    else
      grad_block<false>(e, dy, x, out, block, lanes_of(at.b, from), grad_lanes_of(at.b, from), past);
  };
  // Coefficients that do not wait for the sums: dx follows while the chunk is in cache.
  const bool known = pass.constant || pass.cx || pass.c0, at_once = pass.found && out.dx && known;

  parallel(threads_for(f.size(), tasks.blocks), [&](const Team& team) {
    team.each(tasks.settles, [&](int64_t i) {
      const auto at = tasks.settle(i);
      const int64_t s = at.b * f.groups;
      const ColumnAffine<V> a = lanes_of(at.b, 0);
      const ColumnGrad<V> g = grad_lanes_of(at.b, 0);
      to_lanes(shape, at.begin, at.end, a.hi, [&](int64_t c) { return pass.affine<R>(s + c, c).hi; });
      to_lanes(shape, at.begin, at.end, a.scale, [&](int64_t c) { return pass.affine<R>(s + c, c).scale; });
      to_lanes(shape, at.begin, at.end, a.shift, [&](int64_t c) { return pass.affine<R>(s + c, c).shift; });
      to_lanes(shape, at.begin, at.end, g.rstd, [&](int64_t c) { return R(pass.rstd[s + c]); });
      if (!known) return;
      to_lanes(shape, at.begin, at.end, g.scale, [&](int64_t c) { return pass.grad_affine<R>(s + c, c).scale; });
      to_lanes(shape, at.begin, at.end, g.slope, [&](int64_t c) { return pass.grad_affine<R>(s + c, c).slope; });
      to_lanes(shape, at.begin, at.end, g.shift, [&](int64_t c) { return pass.grad_affine<R>(s + c, c).shift; });
    });
    if (pass.found) {
      team.each(tasks.blocks, [&](int64_t i) {
        const auto at = tasks.at(i);
        if (at.block.columns == 0) return;
        const int64_t from = at.panel * kPanelVectors<T>;
        PanelGradSums<T> sums;
        chunks_of<T>(at.block, shape.chunk_rows, [&](const Block& chunk, int64_t ahead) {
          chunk_column_grad_sums(e, dy, x, chunk, lanes_of(at.b, from), grad_lanes_of(at.b, from), ahead, sums);
          if (at_once) write(at, chunk);
        });
        const int64_t to = (at.b * tiles + at.tile) * shape.columns + at.panel * kPanel<T>;
        to_columns<T>(sums.u, at.block.columns, part_u.get() + to);
        to_columns<T>(sums.uz, at.block.columns, part_uz.get() + to);
      });
      team.each(tasks.settles, [&](int64_t i) {
        const auto at = tasks.settle(i);
        const int64_t s = at.b * f.groups;
        double* u = part_u.get() + at.b * tiles * shape.columns;
        double* uz = part_uz.get() + at.b * tiles * shape.columns;
        for (int64_t tile = 1; tile < shape.tiles; ++tile)
          for (int64_t j = at.begin; j < at.end; ++j) {
            u[j] += u[tile * shape.columns + j];
            uz[j] += uz[tile * shape.columns + j];
          }
        for (int64_t c = at.begin; c < at.end && c < f.groups; ++c) {
          GradSums sum;
          for (int64_t j = c; j < at.end; j += f.groups) sum.merge({u[j], uz[j]});
          const int64_t last = shape.tiles * shape.columns + c;
          if (shape.rest) sum.merge({u[last], uz[last]});
          pass.found[s + c] = sum;
        }
        if (known || !out.dx) return;
        const ColumnGrad<V> g = grad_lanes_of(at.b, 0);
        to_lanes(shape, at.begin, at.end, g.scale, [&](int64_t c) { return pass.grad_affine<R>(s + c, c).scale; });
        to_lanes(shape, at.begin, at.end, g.slope, [&](int64_t c) { return pass.grad_affine<R>(s + c, c).slope; });
        to_lanes(shape, at.begin, at.end, g.shift, [&](int64_t c) { return pass.grad_affine<R>(s + c, c).shift; });
      });
    }
    if (out.dx && !at_once)
      team.each(tasks.blocks, [&](int64_t i) {
        const auto at = tasks.at(tasks.blocks - 1 - i);
        write(at, at.block);
      });
    stream_fence();
  });
}

}  // namespace
}  // namespace fusednorm::cpu::FUSEDNORM_ISA
