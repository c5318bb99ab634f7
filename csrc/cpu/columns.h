// Columns: memory in which neighbours belong to different statistics and channels (channels last, (N, C)).
//
// A batch entry is a matrix of `outer` rows and `groups` columns. It is cut, by its shape alone, into tiles of rows
// (the unit of work), panels of columns and chunks (up to 128 rows of a panel, float32 sums), and each column of a chunk
// is taken into its tile's moments, vectorized over the columns.
//
// Panels are wide, for memory to be read in its order, and narrow where tiles alone are too few for the threads there
// may be.
//
// Few or odd columns are seen as more: the matrix is contiguous, so `repeat` rows of it are one row of repeat·groups
// columns, as wide as whole registers want it. The copies of a column are merged at the end; the rows that are left
// over are one more, narrow, tile.
//
// Coefficients lie in lane order (simd.h): all that a register of columns needs, side by side, register after register.
#pragma once

#include "cpu/passes.h"
#include "cpu/rows.h"
#include "cpu/team.h"

namespace fusednorm::cpu::FUSEDNORM_ISA {
namespace {

constexpr int64_t kPanel = 1024;  // columns
template <class T>
constexpr int64_t kNarrowPanel = 1024 / int64_t(sizeof(T));
constexpr int64_t kChunkRows = 128;
// Tiles of about so many elements: small ones where else there were few, for more threads to have one.
constexpr int64_t kSmallTileElements = 65536, kTileElements = 262144, kManyTiles = 8, kMaxTiles = 128;
constexpr int64_t kTurnFrom = 1 << 18;  // bytes of a tensor from which its misalignment is worth a turn

template <class T>
constexpr int64_t kPanelVectors = kPanel / Pack<T>::width * Pack<T>::parts;
template <class R>
constexpr int kWide = sizeof(R) == 8 ? 1 : 2;  // float64 vectors that a vector of R becomes

// Vectors that hold so many columns.
template <class T>
FN_INLINE int64_t vectors_of(int64_t columns) {
  return (columns + Pack<T>::width - 1) / Pack<T>::width * Pack<T>::parts;
}

FN_INLINE void widen(D v, D* wide) { wide[0] = v; }
FN_INLINE void widen(F v, D* wide) { widen(v, wide[0], wide[1]); }
FN_INLINE D narrow(const D* wide, D) { return wide[0]; }
FN_INLINE F narrow(const D* wide, F) {
  const HalfF half[2] = {__builtin_convertvector(wide[0], HalfF), __builtin_convertvector(wide[1], HalfF)};
  F v;
  memcpy(&v, half, sizeof v);
  return v;
}
// A rectangle of one panel's width or less.
struct Block {
  int64_t offset, rows, columns, stride;  // elements
};

template <class T>
struct ColumnShape {
  int64_t groups, outer, repeat, columns, rows, rest, tile_rows, tiles, panel, panels;

  // A row that a mask may leave out is a row of its own.
  ColumnShape(const Fold& f, bool masked) : groups(f.groups), outer(f.outer), repeat(1) {
    constexpr int64_t width = Pack<T>::width;
    while (!masked && (repeat * groups % width != 0 || repeat * groups < kNarrowPanel<float>) && groups < 1024 &&
           repeat < width * 2 && outer >= 16 * repeat)
      repeat *= 2;
    columns = repeat * groups;
    rows = outer / repeat;
    rest = outer % repeat;
    const int64_t size = rows * columns;
    const bool few = size < kManyTiles * kTileElements;
    tiles = few ? size / kSmallTileElements : (size / kTileElements / kManyTiles + 1) * kManyTiles;
    const int64_t most = few ? kManyTiles : kMaxTiles, high = rows / kChunkRows;
    if (tiles > most) tiles = most;
    if (tiles > high) tiles = high;
    if (tiles < 1) tiles = 1;
    tile_rows = ((rows + tiles - 1) / tiles + 3) / 4 * 4;
    tiles = (rows + tile_rows - 1) / tile_rows;
    panel = f.batch * tiles < kManyTiles ? kNarrowPanel<T> : kPanel;
    panels = (columns + panel - 1) / panel;
  }
  int64_t all_tiles() const { return tiles + (rest > 0); }
  int64_t registers() const { return (columns + Pack<T>::width - 1) / Pack<T>::width; }

  // Rows of one column in a tile.
  int64_t tile_height(int64_t tile) const {
    if (tile == tiles) return rest;
    return rows - tile * tile_rows < tile_rows ? rows - tile * tile_rows : tile_rows;
  }
  // No columns where a panel lies beyond the narrow tile.
  Block block(int64_t b, int64_t tile, int64_t i) const {
    const int64_t wide = tile == tiles ? groups : columns, left = wide - i * panel;
    return {
        b * outer * groups + tile * tile_rows * columns * (tile < tiles) + rows * columns * (tile == tiles) + i * panel,
        tile_height(tile),
        left < 0       ? 0
        : left < panel ? left
                       : panel,
        wide};
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
// Rows `first`, first + apart, … of a block, as many as is known to the compiler.
template <int kCount>
struct Rows {
  static constexpr int count = kCount;
  int64_t first, apart;
};
// Calls step(Rows, column, register index, Whole or Part) over a block: one row of each quarter at a time, which share a
// load of their columns' sums. Rows that are neighbours would do as well, but then nothing is read in the order of
// memory, and the hardware fetches little of it ahead: sums took up to twice as long.
template <class T, class Step>
FN_INLINE void down(const Block& block, Step&& step) {
  const int64_t quarter = block.rows / 4;
  for (int64_t r = 0; r < quarter; ++r)
    across<T>(block.columns,
              [&](int64_t j, int64_t index, auto there) FN_LAMBDA { step(Rows<4>{r, quarter}, j, index, there); });
  for (int64_t r = 4 * quarter; r < block.rows; ++r)
    across<T>(block.columns,
              [&](int64_t j, int64_t index, auto there) FN_LAMBDA { step(Rows<1>{r, 0}, j, index, there); });
}

// Float64 moments of a tile's columns, taken in chunk by chunk (core/moments.h says why no digit is lost).
template <class T>
struct PanelMoments {
  static constexpr int wide = kWide<Real<T>>;
  double n = 0;
  D mean[kPanelVectors<T> * wide], m2[kPanelVectors<T> * wide];

  explicit PanelMoments(int64_t columns) {
    for (int64_t i = 0; i < vectors_of<T>(columns) * wide; ++i) mean[i] = m2[i] = D{};
  }
};

template <class T>
struct PanelSums {
  Vector<Real<T>> v[kPanelVectors<T>];

  explicit PanelSums(int64_t columns) {
    for (int64_t i = 0; i < vectors_of<T>(columns); ++i) v[i] = Vector<Real<T>>{};
  }
};

template <class T>
FN_INLINE void sum_columns(const T* base, const Block& block, PanelSums<T>& sum) {
  constexpr int parts = Pack<T>::parts;
  down<T>(block, [&](auto rows, int64_t j, int64_t index, auto there) FN_LAMBDA {
    Vector<Real<T>> s[parts] = {};
#pragma GCC unroll 8
    for (int k = 0; k < rows.count; ++k) {
      const Lanes<T> v = load(base + (rows.first + k * rows.apart) * block.stride + j, there);
      for (int part = 0; part < parts; ++part) s[part] += v.v[part];
    }
    for (int part = 0; part < parts; ++part) sum.v[index * parts + part] += s[part];
  });
}

// Of all numbers of each column that are not finite, the sum; 0 where there are none.
template <class T>
FN_INLINE void sum_not_finite(const T* base, const Block& block, PanelSums<T>& sum) {
  constexpr int parts = Pack<T>::parts;
  down<T>(block, [&](auto rows, int64_t j, int64_t index, auto there) FN_LAMBDA {
    for (int k = 0; k < rows.count; ++k) {
      const Lanes<T> v = load(base + (rows.first + k * rows.apart) * block.stride + j, there);
      for (int part = 0; part < parts; ++part)
        sum.v[index * parts + part] += Math::select(v.v[part] - v.v[part] == 0, Vector<Real<T>>{}, v.v[part]);
    }
  });
}

// chunk_moments_wide of each column, where that is float64.
template <class T>
FN_INLINE void panel_moments_wide(const T* base, const Block& block, bool center, PanelMoments<T>& own) {
  constexpr int parts = Pack<T>::parts, wide = kWide<Real<T>>;
  const auto add = [&](D* to, auto&& f) FN_LAMBDA {
    down<T>(block, [&](auto rows, int64_t j, int64_t index, auto there) FN_LAMBDA {
      for (int k = 0; k < rows.count; ++k) {
        const Lanes<T> v = load(base + (rows.first + k * rows.apart) * block.stride + j, there);
        for (int part = 0; part < parts; ++part) {
          D more[wide];
          widen(v.v[part], more);
          for (int w = 0; w < wide; ++w) {
            const int64_t at = (index * parts + part) * wide + w;
            to[at] += f(more[w], own.mean[at]);
          }
        }
      }
    });
  };
  if (center) add(own.m2, [](D v, D) FN_LAMBDA { return v; });
  for (int64_t i = 0; center && i < vectors_of<T>(block.columns) * wide; ++i) {
    own.mean[i] = own.m2[i] / double(block.rows);
    own.m2[i] = D{};
  }
  add(own.m2, [](D v, D mean) FN_LAMBDA { return (v - mean) * (v - mean); });
}

// The columns of a chunk whose sums are out of range, again, onto the moments before it.
template <class T>
[[gnu::noinline]] void mend_columns(const T* base, const Block& block, bool center, const PanelSums<T>& sum,
                                    const PanelSums<T>& squares, const PanelMoments<T>& before, PanelMoments<T>& tile) {
  using R = Real<T>;
  PanelSums<T> not_finite(block.columns);
  sum_not_finite(base, block, not_finite);
  PanelMoments<T> own(sizeof(R) == 4 ? block.columns : 0);
  bool has_own = false;
  for (int64_t v = 0; v < vectors_of<T>(block.columns); ++v)
    for (int lane = 0; lane < kLanes<R>; ++lane) {
      const int64_t column = v / Pack<T>::parts * Pack<T>::width + Pack<T>::order(int(v % Pack<T>::parts), lane);
      if (column >= block.columns || !out_of_range<T>(sum.v[v][lane], squares.v[v][lane])) continue;
      const int64_t at = v * kWide<R> + lane / kLanes<double>, l = lane % kLanes<double>;
      Moments m{before.n, before.mean[at][l], before.m2[at][l]};
      if (not_finite.v[v][lane] != 0 || !is_finite(m.mean)) {
        add_not_finite(double(block.rows), double(not_finite.v[v][lane]), center, m);
      } else if constexpr (sizeof(R) == 8) {
        m.merge(chunk_moments_wide(base + column, Runs{0, block.stride, block.rows, 1}, center));
      } else {
        if (!has_own) panel_moments_wide(base, block, center, own);
        has_own = true;
        m.merge({double(block.rows), own.mean[at][l], own.m2[at][l]});
      }
      tile.mean[at][l] = m.mean;
      tile.m2[at][l] = m.m2;
    }
}

// Sums of nothing, though not all numbers are the pivot: their squares underflowed, and are marked with NaN as out of
// range. Beside a pivot above 1e-12 no float's distance squared does.
template <class T>
FN_INLINE void mark_underflow(const T* base, const Block& block, const PanelSums<T>& pivot, const PanelSums<T>& sum,
                              PanelSums<T>& squares, MaskOf<Real<T>>& suspect) {
  using R = Real<T>;
  if constexpr (sizeof(R) == 4) {
    constexpr int parts = Pack<T>::parts;
    MaskOf<R> nothing[kPanelVectors<T>], some{};
    across<T>(block.columns, [&](int64_t, int64_t index, auto there) FN_LAMBDA {
      for (int part = 0; part < parts; ++part) {
        const int64_t i = index * parts + part;
        const auto p = pivot.v[i];
        nothing[i] = (sum.v[i] == 0) & (squares.v[i] == 0) & (p < 1e-12f) & (p > -1e-12f);
        nothing[i] &= live<T>(Vector<R>{} + 1, part, there) != 0;
        some |= nothing[i];
      }
    });
    if (!any(some)) return;
    const int64_t vectors = vectors_of<T>(block.columns);
    MaskOf<R> differs[kPanelVectors<T>];
    for (int64_t i = 0; i < vectors; ++i) differs[i] = MaskOf<R>{};
    down<T>(block, [&](auto rows, int64_t j, int64_t index, auto there) FN_LAMBDA {
      for (int k = 0; k < rows.count; ++k) {
        const Lanes<T> v = load(base + (rows.first + k * rows.apart) * block.stride + j, there);
        for (int part = 0; part < parts; ++part)
          differs[index * parts + part] |= v.v[part] != pivot.v[index * parts + part];
      }
    });
    for (int64_t i = 0; i < vectors; ++i) {
      const MaskOf<R> underflown = nothing[i] & differs[i];
      suspect |= underflown;
      squares.v[i] = Math::select(underflown, Vector<R>{} + __builtin_nanf(""), squares.v[i]);
    }
  }
}

template <class T>
[[gnu::noinline]] void add_chunk(const T* x, const Block& block, bool center, PanelMoments<T>& tile) {
  using R = Real<T>;
  using V = Vector<R>;
  constexpr int parts = Pack<T>::parts, wide = kWide<R>;
  const T* base = x + block.offset;
  const double k = double(block.rows), total = tile.n + k;
  const bool first = tile.n < k;

  const int64_t vectors = vectors_of<T>(block.columns);
  PanelSums<T> pivot(block.columns), sum(block.columns), squares(block.columns);
  if (center && first) {  // the chunk's own means
    sum_columns(base, block, pivot);
    for (int64_t i = 0; i < vectors; ++i) pivot.v[i] *= R(1) / R(block.rows);
  } else if (center) {  // the means so far
    for (int64_t i = 0; i < vectors; ++i) pivot.v[i] = narrow(tile.mean + i * wide, V{});
  }
  down<T>(block, [&](auto rows, int64_t j, int64_t index, auto there) FN_LAMBDA {
    V s[parts] = {}, q[parts] = {};
    const T* p = base + rows.first * block.stride + j;
#pragma GCC unroll 8
    for (int k = 0; k < rows.count; ++k, p += rows.apart * block.stride) {
      const Lanes<T> v = load(p, there);
      for (int part = 0; part < parts; ++part) {
        const V d = v.v[part] - pivot.v[index * parts + part];
        s[part] += d;
        q[part] = fma(d, d, q[part]);
      }
    }
    for (int part = 0; part < parts; ++part) {
      sum.v[index * parts + part] += s[part];
      squares.v[index * parts + part] += q[part];
    }
  });

  MaskOf<R> suspect{};  // out_of_range, for all columns at once
  for (int64_t i = 0; i < vectors; ++i) {
    const V s = sum.v[i], q = squares.v[i];
    if constexpr (sizeof(R) == 8)
      suspect |= ~(q < 1e300);
    else
      suspect |= ~((q > 1e-28f) & (q < 1e38f)) & ~((s == 0) & (q == 0));
  }
  mark_underflow(base, block, pivot, sum, squares, suspect);
  const bool mend = any(suspect);
  PanelMoments<T> before(0);
  if (mend) before = tile;

  // Moments::add, with the same counts for all columns; the first chunk is taken around its own mean.
  const double one_over_k = 1 / k, one_over_total = 1 / total;
  across<T>(block.columns, [&](int64_t, int64_t index, auto) FN_LAMBDA {
    for (int part = 0; part < parts; ++part) {
      const int64_t i = index * parts + part;
      D h[wide], s[wide], q[wide];
      widen(pivot.v[i], h);
      widen(sum.v[i], s);
      widen(squares.v[i], q);
      for (int w = 0; w < wide; ++w) {
        D &mean = tile.mean[i * wide + w], &m2 = tile.m2[i * wide + w];
        if (!center) {
          m2 += q[w];
        } else if (first) {
          const D own = h[w] + s[w] * one_over_k, own_m2 = q[w] - s[w] * s[w] * one_over_k, delta = own - mean;
          mean += delta * (k * one_over_total);
          m2 += (own_m2 < 0 ? D{} : own_m2);
          if (tile.n > 0) m2 += delta * delta * (tile.n * k * one_over_total);
        } else {
          const D offset = mean - h[w], t = s[w] - k * offset;
          mean += t * one_over_total;
          m2 += (q[w] - (s[w] + t) * offset) - t * t * one_over_total;
        }
      }
    }
  });
  if (mend) mend_columns(base, block, center, sum, squares, before, tile);
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
// Fills the registers of the columns [begin, end), which begin at the channel `turn`: of(channel, count, to) finds
// those of each channel once, which are kept in `own` [groups]; set(register, part, lane, own) hands it to its lanes.
// Lanes beyond the last column are filled too.
template <class T, class Coefficients, class Of, class Set>
FN_INLINE void fill_lanes(const ColumnShape<T>& shape, int64_t turn, int64_t begin, int64_t end, Coefficients* own,
                          Of&& of, Set&& set) {
  constexpr int64_t width = Pack<T>::width;
  const auto channel = [&](int64_t column) {
    const int64_t c = (column < shape.columns ? column : shape.columns - 1) + turn;
    return c < shape.groups ? c : c % shape.groups;
  };
  const int64_t last = end < shape.groups ? end : shape.groups;
  for (int64_t j = begin, count; j < last; j += count) {
    const int64_t c = channel(j);
    count = last - j < shape.groups - c ? last - j : shape.groups - c;
    of(c, count, own + c);
  }
  for (int64_t index = begin / width; index * width < end; ++index)
    for (int part = 0; part < Pack<T>::parts; ++part)
      for (int lane = 0; lane < kLanes<Real<T>>; ++lane)
        set(index, part, lane, own[channel(index * width + Pack<T>::order(part, lane))]);
}

FN_INLINE void prefetch_ahead(const void* p) { prefetch(static_cast<const char*>(p) + kAheadBytes); }

template <bool kStream, class E, class T = typename E::Element>
void apply_block(const Epilogue<T>& epilogue, const T* x, T* y, const Block& block, const PackAffine<T>* a) {
  const E e(epilogue);
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t row = block.offset + r * block.stride;
    across<T>(block.columns, [&](int64_t j, int64_t index, auto there) FN_LAMBDA {
      prefetch_ahead(x + row + j);
      apply_pack(e, x, y, row + j, a[index], there, kStream);
    });
  }
}

template <class T>
struct PanelGradSums {
  static constexpr int wide = kWide<Real<T>>;
  D u[kPanelVectors<T> * wide], uz[kPanelVectors<T> * wide];

  explicit PanelGradSums(int64_t columns) {
    for (int64_t i = 0; i < vectors_of<T>(columns) * wide; ++i) u[i] = uz[i] = D{};
  }
};

template <class E, class T = typename E::Element>
void add_grad_block(const Epilogue<T>& epilogue, const T* dy, const T* x, const Block& block, const PackGrad<T>* g,
                    PanelGradSums<T>& tile) {
  const E e(epilogue);
  using V = typename E::V;
  constexpr int parts = Pack<T>::parts, wide = kWide<Real<T>>;
  PanelSums<T> sum(block.columns), product(block.columns);
  down<T>(block, [&](auto rows, int64_t j, int64_t index, auto there) FN_LAMBDA {
    V s[parts] = {}, q[parts] = {};
    int64_t i = block.offset + rows.first * block.stride + j;
#pragma GCC unroll 4
    for (int k = 0; k < rows.count; ++k, i += rows.apart * block.stride) {
      const GradPack<T> at = load_grad_pack(e, dy, x, i, g[index], there);
      for (int part = 0; part < parts; ++part) {
        s[part] += at.u.v[part];
        q[part] = fma(at.u.v[part], at.z.v[part], q[part]);
      }
    }
    for (int part = 0; part < parts; ++part) {
      sum.v[index * parts + part] += s[part];
      product.v[index * parts + part] += q[part];
    }
  });
  across<T>(block.columns, [&](int64_t, int64_t index, auto) FN_LAMBDA {
    for (int part = 0; part < parts; ++part) {
      const int64_t i = index * parts + part;
      D s[wide], q[wide];
      widen(sum.v[i], s);
      widen(product.v[i], q);
      for (int w = 0; w < wide; ++w) {
        tile.u[i * wide + w] += s[w];
        tile.uz[i * wide + w] += q[w];
      }
    }
  });
}

template <bool kConstant, bool kStream, class E, class T = typename E::Element>
void grad_block(const Epilogue<T>& epilogue, const T* dy, const T* x, const GradOut<T>& out, const Block& block,
                const PackGrad<T>* g) {
  const E e(epilogue);
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t row = block.offset + r * block.stride;
    across<T>(block.columns, [&](int64_t j, int64_t index, auto there) FN_LAMBDA {
      prefetch_ahead(x + row + j);
      prefetch_ahead(dy + row + j);
      grad_pack<kConstant>(e, dy, x, out, row + j, g[index], there, kStream);
    });
  }
}

// The loops that know an epilogue (loops_for), [streamed], [constant][streamed].
template <class T>
struct ForwardColumnLoops {
  using Element = T;
  using Any = KnownEpilogue<T, Kind::any, true>;
  static constexpr bool kBackward = false;
  decltype(&apply_block<false, Any>) block[2];

  template <class E>
  static ForwardColumnLoops of() {
    return {{apply_block<false, E>, apply_block<true, E>}};
  }
};
template <class T>
struct BackwardColumnLoops {
  using Element = T;
  using Any = KnownEpilogue<T, Kind::any, true>;
  static constexpr bool kBackward = true;
  decltype(&add_grad_block<Any>) add_block;
  decltype(&grad_block<false, false, Any>) block[2][2];

  template <class E>
  static BackwardColumnLoops of() {
    return {add_grad_block<E>,
            {{grad_block<false, false, E>, grad_block<false, true, E>},
             {grad_block<true, false, E>, grad_block<true, true, E>}}};
  }
};

// What is written, as memory lies: a batch entry is contiguous and its coefficients repeat every `columns` elements,
// from any element on. So its rows are taken to begin at `head`, the first element that a register can be streamed to;
// what lies before is done one by one, and the coefficients are turned by as much.
template <class T>
struct Writes {
  const ColumnShape<T>& shape;
  const T* out;
  bool turned, streamed;
  int64_t size, rows_each, tasks_each;

  // `read`: how many tensors are. `own_rows`: rows must begin where the tensor's do. `alike`: what else is written is
  // aligned as `out` is.
  Writes(const ColumnShape<T>& s, int64_t batch, const T* out_, int64_t read, bool own_rows, bool alike)
      : shape(s), out(out_) {
    const int64_t bytes = batch * s.outer * s.groups * int64_t(sizeof(T));
    turned = !own_rows && bytes >= kTurnFrom;
    streamed = turned && alike && is_streamed(bytes, read);
    size = s.outer * s.groups;
    rows_each = kWriteElements / s.columns > 0 ? kWriteElements / s.columns : 1;
    tasks_each = (size / s.columns + rows_each - 1) / rows_each + 1;  // the last one: what is no whole row
  }
  int64_t head(int64_t b) const {
    const int64_t n = turned ? to_alignment(out + b * size) : 0;
    return n < 0 || n > size ? 0 : n;
  }
  bool past(int64_t b) const {
    return streamed && to_alignment(out + b * size + head(b)) == 0 && shape.columns % Pack<T>::width == 0;
  }
  // block(b, Block, streamed?), element(b, index, channel).
  template <class BlockCall, class ElementCall>
  FN_INLINE void each(int64_t i, BlockCall&& block, ElementCall&& element) const {
    const int64_t b = i / tasks_each, task = i % tasks_each, start = b * size;
    const int64_t before = head(b), rows = (size - before) / shape.columns, first = task * rows_each,
                  left = rows - first;
    if (task < tasks_each - 1) {
      const int64_t offset = start + before + first * shape.columns;
      if (left > 0) block(b, Block{offset, left < rows_each ? left : rows_each, shape.columns, shape.columns}, past(b));
      return;
    }
    const int64_t tail = start + before + rows * shape.columns;
    if (tail < start + size) block(b, Block{tail, 1, start + size - tail, shape.columns}, false);
    for (int64_t j = 0; j < before; ++j) element(b, start + j, j % shape.groups);
  }
};

// Rows of the tensor, cut where the mask changes: call(Block, counted). Null: all count.
template <class Call>
FN_INLINE void counted_rows(const uint8_t* mask, const Block& block, Call&& call) {
  if (!mask) return call(block, true);
  stretches(mask + block.offset / block.stride, block.rows, [&](int64_t begin, int64_t rows, bool counted) {
    call(Block{block.offset + begin * block.stride, rows, block.columns, block.stride}, counted);
  });
}

// A block's chunks. None is longer than what came before it, so that only the first is swept for a mean of its own
// (core/moments.h).
template <class Call>
FN_INLINE void chunks_of(const Block& block, Call&& call) {
  for (int64_t r = 0, rows; r < block.rows; r += rows) {
    rows = r == 0 ? kChunkRows / 4 : r < kChunkRows ? r : kChunkRows;
    if (rows > block.rows - r) rows = block.rows - r;
    call(Block{block.offset + r * block.stride, rows, block.columns, block.stride});
  }
}

// Tasks of both passes. Sums: a panel of a tile of a batch entry. Between the sweeps, the columns to settle: by panel,
// or all at once where the copies of a column, or those that make a statistic, may lie in different panels.
template <class T>
struct ColumnTasks {
  const ColumnShape<T>& shape;
  bool by_panel;
  int64_t blocks_each, settles_each;  // of a batch entry

  // `share`: columns that make a statistic.
  ColumnTasks(const ColumnShape<T>& s, int64_t share)
      : shape(s),
        by_panel(s.repeat == 1 && share == 1),
        blocks_each(s.all_tiles() * s.panels),
        settles_each(by_panel ? s.panels : 1) {}

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
    if (!by_panel) return {i, 0, shape.columns};
    const int64_t begin = i % settles_each * shape.panel, end = begin + shape.panel;
    return {i / settles_each, begin, end < shape.columns ? end : shape.columns};
  }
};

// Where the batch entries keep the threads busy, a thread takes a whole one, whose second sweep finds it in cache;
// otherwise the tasks of all entries are shared, with a barrier between the sweeps. body(team): each(tasks of an entry,
// call(number of the task)).
struct EntryTasks {
  int64_t entry;

  template <class Task>
  FN_INLINE void each(int64_t tasks, Task&& task) const {
    for (int64_t i = entry * tasks; i < entry * tasks + tasks; ++i) task(i);
  }
  template <class Task>
  FN_INLINE void each_backwards(int64_t tasks, Task&& task) const {
    for (int64_t i = entry * tasks + tasks; i-- > entry * tasks;) task(i);
  }
};
struct SharedTasks {
  const Team& team;
  int64_t entries;

  template <class Task>
  FN_INLINE void each(int64_t tasks, Task&& task) const {
    team.each(entries * tasks, task);
  }
  template <class Task>
  FN_INLINE void each_backwards(int64_t tasks, Task&& task) const {
    team.each_backwards(entries * tasks, task);
  }
};
template <class Body>
FN_INLINE void by_entries(int threads, int64_t entries, Body&& body) {
  const int64_t rounds = (entries + threads - 1) / threads;
  const bool fused = entries * 10 >= rounds * threads * 9;
  parallel(threads, [&](const Team& team) {
    if (fused)
      team.each(entries, [&](int64_t b) { body(EntryTasks{b}); });
    else
      body(SharedTasks{team, entries});
    stream_fence();
  });
}

template <class T>
void forward_columns(const ForwardPass& pass) {
  using R = Real<T>;
  const Epilogue<T> e(pass.epilogue);
  const auto loops = loops_for<ForwardColumnLoops<T>>(pass.epilogue);
  const Fold f = pass.fold.cells();
  const ColumnShape<T> shape(f, pass.mask);
  const ColumnTasks<T> tasks(shape, pass.share);
  const int64_t tiles = shape.all_tiles(), registers = shape.registers();
  const T* x = pass.x.template as<const T>();
  T* y = pass.y.template as<T>();
  const Writes<T> writes(shape, f.batch, y, 1, false, true);
  const int64_t sums = pass.takes_statistics() ? f.batch * tiles * shape.columns : 0;
  Scratch<double> part_n(pass.takes_statistics() ? f.batch * tiles : 0), part_mean(sums), part_m2(sums);
  Scratch<PackAffine<T>> coefficients(y ? f.batch * registers : 0);
  Scratch<Affine<R>> own(y ? f.statistics() : 0);

  const auto settle_moments = [&](const typename ColumnTasks<T>::Settle& at) {
    // Tiles into the first, all columns with the same counts; then the copies of a column; then the rest.
    double* mean = part_mean.get() + at.b * tiles * shape.columns;
    double* m2 = part_m2.get() + at.b * tiles * shape.columns;
    const double* count = part_n.get() + at.b * tiles;
    double n = count[0];
    for (int64_t tile = 1; tile < shape.tiles; ++tile) {
      const double more = count[tile];
      if (more == 0) continue;
      const double share = more / (n + more), weight = n * share;
      for (int64_t j = at.begin; j < at.end; ++j) {
        const double delta = mean[tile * shape.columns + j] - mean[j];
        mean[j] += delta * share;
        m2[j] += m2[tile * shape.columns + j] + delta * delta * weight;
      }
      n += more;
    }
    for (int64_t first = at.begin; first < at.end && first < f.groups; first += pass.share) {
      Moments m;
      if (shape.repeat == 1 && pass.share > 1) {  // as many numbers in each column
        double offset = 0, within = 0, between = 0;
        for (int64_t c = first; c < first + pass.share; ++c) offset += mean[c] - mean[first];
        const double all = mean[first] + offset / double(pass.share);
        for (int64_t c = first; c < first + pass.share; ++c) {
          within += m2[c];
          between += (mean[c] - all) * (mean[c] - all);
        }
        m = {n * double(pass.share), all, within + n * between};
      } else {
        for (int64_t c = first; c < first + pass.share; ++c) {
          for (int64_t j = c; j < at.end; j += f.groups) m.merge({n, mean[j], m2[j]});
          const int64_t last = shape.tiles * shape.columns + c;
          if (shape.rest) m.merge({double(shape.rest), mean[last], m2[last]});
        }
      }
      pass.found[(at.b * f.groups + first) / pass.share] = m;
    }
  };
  const auto settle_affine = [&](const typename ColumnTasks<T>::Settle& at) {
    PackAffine<T>* a = coefficients.get() + at.b * registers;
    const int64_t turn = writes.head(at.b);
    fill_lanes(
        shape, turn, at.begin, at.end, own.get() + at.b * f.groups,
        [&](int64_t c, int64_t count, Affine<R>* to) { pass.affine(at.b * f.groups + c, count, to); },
        [&](int64_t index, int part, int lane, const Affine<R>& one) {
          auto& to = a[index].part[part];
          to.hi[lane] = one.hi;
          to.scale[lane] = one.scale;
          to.shift[lane] = one.shift;
        });
  };
  const auto write_block = [&](int64_t b, const Block& block, bool past) {
    loops.block[past](e, x, y, block, coefficients.get() + b * registers);
  };
  const auto write_element = [&](int64_t b, int64_t i, int64_t c) {
    const auto a = all_lanes<PackAffine<T>>(pass.affine<R>(b * f.groups + c));
    loops.block[false](e, x, y, Block{i, 1, 1, 1}, &a);
  };

  const auto sum_block = [&](int64_t i) {
    const auto at = tasks.at(i);
    if (at.block.columns == 0) return;
    PanelMoments<T> m(at.block.columns);
    chunks_of(at.block, [&](const Block& chunk) {
      counted_rows(pass.mask, chunk, [&](const Block& rows, bool counted) {
        if (counted) add_chunk(x, rows, pass.center, m);
      });
    });
    if (at.panel == 0) part_n[at.b * tiles + at.tile] = m.n;
    const int64_t to = (at.b * tiles + at.tile) * shape.columns + at.panel * shape.panel;
    to_columns<T>(m.mean, at.block.columns, part_mean.get() + to);
    to_columns<T>(m.m2, at.block.columns, part_m2.get() + to);
  };

  by_entries(threads_for(f.size(), f.batch * tasks.blocks_each), f.batch, [&](const auto& team) {
    if (pass.takes_statistics()) {
      team.each(tasks.blocks_each, sum_block);
      team.each(tasks.settles_each, [&](int64_t i) { settle_moments(tasks.settle(i)); });
    }
    if (!y) return;
    team.each(tasks.settles_each, [&](int64_t i) { settle_affine(tasks.settle(i)); });
    team.each_backwards(writes.tasks_each, [&](int64_t i) { writes.each(i, write_block, write_element); });
  });
}

template <class T>
void backward_columns(const BackwardPass& pass) {
  using R = Real<T>;
  const Epilogue<T> e(pass.epilogue);
  const auto loops = loops_for<BackwardColumnLoops<T>>(pass.epilogue);
  const Fold f = pass.fold.cells();
  const ColumnShape<T> shape(f, pass.mask);
  const ColumnTasks<T> tasks(shape, pass.share);
  const int64_t tiles = shape.all_tiles(), registers = shape.registers();
  const T *dy = pass.dy.template as<const T>(), *x = pass.x.template as<const T>();
  const GradOut<T> out{pass.dx.template as<T>(), pass.dresidual.template as<T>()};
  // Coefficients that do not wait for the sums: dx follows while the chunk is in cache.
  const bool known = pass.constant || pass.cx || pass.c0, at_once = pass.found && out.dx && known;
  const bool own_rows = at_once || pass.mask;  // rows begin where the tensor's do
  const Writes<T> writes(shape, f.batch, out.dx, 2, own_rows, out.alike());
  const int64_t sums = pass.found ? f.batch * tiles * shape.columns : 0;
  Scratch<double> part_u(sums), part_uz(sums);
  Scratch<PackGrad<T>> sum_coefficients(pass.found ? f.batch * registers : 0),
      coefficients(out.dx ? f.batch * registers : 0);
  Scratch<GradCoefficients<R>> own(f.statistics());

  const auto settle = [&](PackGrad<T>* g, const typename ColumnTasks<T>::Settle& at, int64_t turn, bool sums_only) {
    g += at.b * registers;
    fill_lanes(
        shape, turn, at.begin, at.end, own.get() + at.b * f.groups,
        [&](int64_t c, int64_t count, GradCoefficients<R>* to) {
          pass.coefficients(at.b * f.groups + c, count, sums_only, to);
        },
        [&](int64_t index, int part, int lane, const GradCoefficients<R>& one) {
          auto& to = g[index].part[part];
          to.hi[lane] = one.hi;
          to.rstd[lane] = one.rstd;
          to.scale[lane] = one.scale;
          to.slope[lane] = one.slope;
          to.shift[lane] = one.shift;
          to.pre_shift[lane] = one.pre_shift;
        });
  };
  const auto settle_sums = [&](const typename ColumnTasks<T>::Settle& at) {
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
      pass.found[at.b * f.groups + c] = sum;
    }
    const int64_t end = at.end < f.groups ? at.end : f.groups;
    if (at.begin < end)
      pass.template sum_cells<R>((at.b * f.groups + at.begin) / pass.share, (end - at.begin) / pass.share);
  };
  const auto write = [&](const Block& block, const PackGrad<T>* g, bool past) {
    const auto write_rows = [&](const Block& some, bool corrected) {
      loops.block[!corrected][past](e, dy, x, out, some, g);
    };
    if (!pass.mask || pass.constant) return write_rows(block, !pass.constant);
    counted_rows(pass.mask, block, write_rows);
  };
  const auto write_block = [&](int64_t b, const Block& block, bool past) {
    write(block, coefficients.get() + b * registers, past);
  };
  const auto write_element = [&](int64_t b, int64_t i, int64_t c) {
    const auto g = all_lanes<PackGrad<T>>(pass.template coefficients<R>(b * f.groups + c));
    write(Block{i, 1, 1, 1}, &g, false);
  };

  const auto sum_block = [&](int64_t i) {
    const auto at = tasks.at(i);
    if (at.block.columns == 0) return;
    const PackGrad<T>* g = sum_coefficients.get() + at.b * registers + at.panel * shape.panel / Pack<T>::width;
    PanelGradSums<T> panel(at.block.columns);
    chunks_of(at.block, [&](const Block& chunk) {
      loops.add_block(e, dy, x, chunk, g, panel);
      if (at_once) write(chunk, g, false);
    });
    const int64_t to = (at.b * tiles + at.tile) * shape.columns + at.panel * shape.panel;
    to_columns<T>(panel.u, at.block.columns, part_u.get() + to);
    to_columns<T>(panel.uz, at.block.columns, part_uz.get() + to);
  };

  by_entries(threads_for(2 * f.size(), f.batch * tasks.blocks_each), f.batch, [&](const auto& team) {
    if (pass.found) {
      team.each(tasks.settles_each, [&](int64_t i) { settle(sum_coefficients.get(), tasks.settle(i), 0, !at_once); });
      team.each(tasks.blocks_each, sum_block);
      team.each(tasks.settles_each, [&](int64_t i) { settle_sums(tasks.settle(i)); });
    }
    if (!out.dx || at_once) return;
    team.each(tasks.settles_each, [&](int64_t i) {
      const auto at = tasks.settle(i);
      settle(coefficients.get(), at, writes.head(at.b), false);
    });
    team.each_backwards(writes.tasks_each, [&](int64_t i) { writes.each(i, write_block, write_element); });
  });
}

}  // namespace
}  // namespace fusednorm::cpu::FUSEDNORM_ISA
