// Who works on what: how many threads and blocks share a slab, how much of it they keep in shared memory, and how many
// slabs are in flight. Decided by the shape and the device alone, so the bits of a result depend on nothing else.
//
//     block      one block a slab                          merges in shared memory
//     cluster    2, 4 or 8 blocks                          merges through distributed shared memory
//     grid       all blocks, shared among some slabs       merges in scratch memory; a cooperative launch
//     launches   any number of blocks, nothing is kept     merges in scratch memory, between two launches
#pragma once

#include <cstdint>

namespace fusednorm::cuda {

struct Device {
  int sms = 0;
  int threads = 1024;          // resident in an SM, at most
  int64_t shared = 0;          // bytes of shared memory of an SM
  int64_t shared_block = 0;    // of which one block may have so many
  int64_t shared_lost = 1024;  // and loses so many
  int64_t l2 = 0;              // bytes
  int max_cluster = 1;         // blocks; 1: no clusters
  bool cooperative = false;
};

// What a pass asks for.
struct Work {
  int64_t slabs = 0, packs = 0;  // packs of one slab, in each tensor
  int read = 0, written = 0;     // tensors
  int keeps = 1;                 // tensors that the second sweep would rather find in shared memory
  bool merges = false;           // a slab's sums are needed
  bool again = false;            // and its elements once more, after them
  bool together = false;         // the sums of several slabs belong together: all must be in flight at once
  int columns = 1;               // a slab's statistics
  int real = 4;                  // bytes of the arithmetic type
};

enum class Team : int { block, cluster, grid, launches };

constexpr int kCoefficients = 8;  // of a column, at most
constexpr int kSumsBytes = 40;    // sizeof(Sums)
constexpr int kPackOf = 16;       // bytes of a pack
constexpr int kMaxParts = 8;      // sums of a column in scratch memory, for each SM, at most

struct Plan {
  Team team = Team::block;
  int threads = 32, size = 1;                                // of a block; blocks of a team
  int teams = 1;                                             // in flight
  int64_t share = 0;                                         // packs of the slab that are one block's
  int kept = 0, room = 0;                                    // packs of each tensor that a thread keeps
  int slices = 1;                                            // parts in which a team's sums are gathered
  int totals_at = 0, stage_at = 0, kept_at = 0, shared = 0;  // bytes: the block's shared memory

  int64_t blocks() const { return int64_t(teams) * size; }
};

namespace detail {

inline int64_t up(int64_t n, int64_t d) { return (n + d - 1) / d; }

// Sizes of blocks that fill an SM: halves, as far as those are whole warps; then 64 and 32.
inline int next(int threads) { return threads / 2 % 32 == 0 ? threads / 2 : threads > 64 ? 64 : threads / 2; }

inline int64_t per_sm(const Device& d, int threads) { return d.threads / threads > 0 ? d.threads / threads : 1; }

// Everything that follows from threads, size and teams.
inline Plan laid_out(const Work& w, const Device& d, Team team, int threads, int64_t size, int64_t teams) {
  Plan p;
  p.team = team;
  p.threads = threads;
  p.size = int(size);
  p.teams = int(teams);
  p.share = up(up(w.packs, size), 32) * 32;
  const int most = w.columns == 1 ? 32 : 256 / w.columns, possible = threads / w.columns;
  p.slices = possible < 1 ? 1 : possible < most ? possible : most;
  const int staged = threads / 32 * 4 * w.columns * w.real, gathered = p.slices * w.columns * kSumsBytes;
  p.totals_at = kCoefficients * w.columns * w.real;
  p.stage_at = p.totals_at + int(up(2 * w.columns * kSumsBytes, 32)) * 32;
  p.kept_at = p.stage_at + int(up(staged > gathered ? staged : gathered, 32)) * 32;
  if (w.again && team != Team::launches) {
    const int64_t fair = d.shared / per_sm(d, threads) - d.shared_lost,
                  own = fair < d.shared_block ? fair : d.shared_block;
    p.room = own > p.kept_at ? int((own - p.kept_at) / (int64_t(threads) * w.keeps * kPackOf)) : 0;
    const int64_t steps = up(p.share, threads);
    p.kept = int(p.room < steps ? p.room : steps);
  }
  p.shared = p.kept_at + p.kept * threads * w.keeps * kPackOf;
  return p;
}

// Time of a plan, in units of a pack that all resident threads move (0.5 µs on an H200).
inline double cost(const Work& w, const Device& d, const Plan& p) {
  const double steps = double(up(p.share, p.threads)), rounds = double(up(w.slabs, p.teams));
  const double busy = double(p.blocks()) * p.threads / (double(d.sms) * d.threads);
  // Half of L2 serves what is read again; that costs less than half.
  const double rest = w.again ? steps - p.kept : 0,
               read_again = rest * w.read * kPackOf * double(p.blocks()) * p.threads;
  const double found = read_again > 0 ? d.l2 / 2 / read_again : 0,
               again = rest * w.read * (1 - 0.5 * (found < 1 ? found : 1));
  // Of a few SMs each gets more of the memory's bandwidth, up to three times its share.
  const double moved = (steps * (w.read + w.written) + again) * (busy > 0.35 ? busy < 1 ? busy : 1 : 0.35);
  // Merges, in which a team's SMs move nothing, unless they have another team's blocks.
  const double merge = p.team == Team::block ? 2 : p.team == Team::cluster ? 4 : 10;
  return rounds * (moved + (p.team <= Team::cluster && per_sm(d, p.threads) > 1 ? merge / 2 : merge));
}

}  // namespace detail

inline Plan plan(const Work& w, const Device& d) {
  using detail::up;
  const int least = w.columns > 32 ? w.columns : 32, most = d.threads;
  const auto clamped = [](int64_t n, int64_t low, int64_t high) { return n > high ? high : n < low ? low : n; };

  Plan best;
  double least_cost = -1;
  const auto consider = [&](const Plan& p) {
    const double now = detail::cost(w, d, p);
    if (least_cost >= 0 && now >= least_cost) return;
    best = p;
    least_cost = now;
  };
  if (w.merges && (!w.together || w.slabs == 1))
    for (int size = 1; size <= d.max_cluster; size *= 2)
      for (int threads = most; threads >= least; threads = detail::next(threads)) {
        if (size > 1 && threads * 4 < most) break;
        const int64_t resident = clamped(int64_t(d.sms) * detail::per_sm(d, threads) / size, 1, INT32_MAX);
        consider(detail::laid_out(w, d, size == 1 ? Team::block : Team::cluster, threads, size,
                                  clamped(w.slabs, 1, resident)));
      }
  if (w.merges && d.cooperative) {
    const int threads = most / 2 % 32 == 0 && most / 2 >= least ? most / 2 : most;
    const int64_t blocks = int64_t(d.sms) * detail::per_sm(d, threads);
    // As many slabs at once as fit, or all that there are.
    const int64_t room = detail::laid_out(w, d, Team::grid, threads, 1, 1).room * threads;
    const int64_t fit = room > 0 && w.packs > 0 ? blocks / clamped(up(w.packs, room), 1, blocks) : 1;
    for (const int64_t teams : {clamped(fit, 1, w.slabs), w.slabs})
      if (teams <= blocks && (!w.together || teams == w.slabs))
        consider(detail::laid_out(w, d, Team::grid, threads, blocks / teams, teams));
  }
  // No merges, or no other way for the blocks of a team to meet.
  if (!w.merges || (w.together ? least_cost < 0 : !d.cooperative && w.slabs <= 2 * d.sms)) {
    int threads = least;
    while (threads < 256 && threads * 2 <= most && threads * 4 < w.packs) threads *= 2;
    const int64_t wanted = up(int64_t(d.sms) * (most / threads) * (w.merges ? 2 : 8), w.slabs);
    const int64_t sensible = up(w.packs + 1, threads * 4);  // a few packs for each thread
    consider(
        detail::laid_out(w, d, Team::launches, threads, clamped(wanted, 1, sensible), clamped(w.slabs, 1, 1 << 16)));
  }
  return best;
}

constexpr int kShortLine = 32;  // packs: a warp has several such lines at once

// What a pass over lines asks for (lines.h).
struct LineWork {
  int64_t lines = 0, groups = 1;  // lines of a group
  int64_t packs = 0;              // of a line
  int each = 1;                   // packs of a line that a thread has, at most
  int at_once = 1;                // short lines of a thread
  bool merges = false;            // a line's sums are needed
  bool across = false;            // and sums of its channels across the lines
  int parameters = 0;             // numbers that wait in shared memory for each element of a line
  int width = 4, real = 4;        // elements of a pack; bytes of the arithmetic type
};

// A team takes one line after the other: all of a block's threads but those of lines that it has at once.
struct LinePlan {
  Team team = Team::block;
  int threads = 32, size = 1;    // of a block; blocks of a line
  int64_t teams = 0, steps = 0;  // of a group; of which a team does every so many
  int64_t groups = 1;
  int64_t share = 0;                             // packs of a line that are one block's
  bool several = false;                          // a thread has one pack of some lines, else some packs of one
  int sharers = 32, lines = 1;                   // of a block: threads of a line; its lines at once
  int room = 0;                                  // elements of a line that they can hold
  int parts_at = 0, columns_at = 0, shared = 0;  // bytes: the block's shared memory

  int64_t blocks() const { return teams * groups * size; }
};

namespace detail {

constexpr int kPartBytes = 32;  // sizeof(LinePart)

// With blocks of at most so many threads.
inline LinePlan line_plan(const LineWork& w, const Device& d, int block) {
  LinePlan p;
  p.several = w.packs <= kShortLine;
  const int each = p.several ? 1 : w.each;
  const int64_t wanted = up(w.packs, each);
  if (wanted > block && w.merges) {
    while (p.size <= d.max_cluster && int64_t(p.size) * block < wanted) p.size *= 2;
    p.team = p.size <= d.max_cluster ? Team::cluster : Team::launches;
  }
  if (wanted > block && p.team != Team::cluster) p.size = int(up(wanted, block));
  p.share = up(w.packs, p.size);
  p.sharers = 1;
  while (p.several && p.sharers < w.packs) p.sharers *= 2;
  if (!p.several) p.sharers = int(up(up(p.share, each), 32)) * 32;
  // Sums across lines are fewer where a block has many lines; else small blocks are as good.
  const int wide = w.across ? block : p.sharers, narrow = w.across ? 2 * block : block < 128 ? block : 128;
  const int most = p.size > 1 ? p.sharers : p.sharers > 32 ? wide : narrow;
  p.threads = (most < d.threads ? most : d.threads) / p.sharers * p.sharers;
  p.lines = p.threads / p.sharers;
  p.room = each * p.sharers * w.width;
  const int warps = p.threads / 32, stacks = p.several ? warps : p.lines;
  p.parts_at = int(up(int64_t(w.parameters) * p.room * w.real, 32)) * 32;
  p.columns_at = p.parts_at + (2 * warps + 2) * kPartBytes;
  p.shared = p.columns_at + (w.across ? 2 * stacks * p.room * w.real : 0);
  const int64_t per = d.shared / (p.shared + d.shared_lost), resident = per_sm(d, p.threads);
  const int64_t blocks = int64_t(d.sms) * (per < 1 ? 1 : per < resident ? per : resident);
  const int64_t fit = blocks / p.size / w.groups, all = up(w.lines, int64_t(p.lines) * (p.several ? w.at_once : 1));
  p.groups = w.groups;
  p.steps = all;
  p.teams = fit < 1 ? 1 : fit < all ? fit : all;
  if (all > 0) p.teams = up(all, up(all, p.teams));  // no more than what as many steps of each need
  return p;
}

}  // namespace detail

inline LinePlan plan_lines(const LineWork& w, const Device& d) {
  // Small blocks share an SM: one reads while another meets.
  int block = d.threads < 256 ? d.threads : 256;
  LinePlan p = detail::line_plan(w, d, block);
  for (int larger = block; p.team == Team::launches && larger < d.threads;) {
    larger = 2 * larger < d.threads ? 2 * larger : d.threads;
    const LinePlan other = detail::line_plan(w, d, larger);
    if (other.shared <= d.shared_block) p = other;
  }
  for (; p.shared > d.shared_block && block > 32; block = detail::next(block))
    p = detail::line_plan(w, d, detail::next(block));
  return p;
}

}  // namespace fusednorm::cuda
