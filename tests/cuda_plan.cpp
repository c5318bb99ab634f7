// The plans of csrc/cuda/plan.h as a C function, for tests/test_cuda_plan.py.
#include <algorithm>
#include <iterator>

#include "cuda/lines.h"

using namespace fusednorm;
using namespace fusednorm::cuda;

namespace {

enum Kind : int { training, evaluation, statistics, backward, grad_sums, grad_input };

template <class T, class Pass>
void planned(Pass pass, Device device, int resident, int64_t* out) {
  device.threads = device.threads < resident ? device.threads : resident;
  const Layout l = layout_of<T>(pass, device.sms);
  const Plan p = plan_of<T>(pass, l, device);
  const int64_t all[] = {int64_t(p.team), p.threads,           p.size,    p.teams,  p.share,     p.kept, p.shared,
                         l.slabs,         l.runs * l.packs.by, l.columns, l.repeat, l.together()};
  std::copy(std::begin(all), std::end(all), out);
}

template <class T>
void planned(const Fold& fold, Kind kind, bool general, const Device& device, int64_t* out) {
  // An address on a border of packs, for all tensors: plans look at nothing else.
  const Array there{reinterpret_cast<void*>(256), DType(), 0};
  static const double number = 0;
  if (kind >= backward) {
    BackwardPass pass{};
    pass.fold = fold;
    pass.x = pass.dy = there;
    pass.sums = kind != grad_input;
    if (kind != grad_sums) pass.dx = there;
    if (kind == grad_input) pass.cx = &number;
    if (general) pass.epilogue = {Activation::silu, 0, there};
    return planned<T>(pass, device, BackwardPass::resident(!pass.is_plain()), out);
  }
  ForwardPass pass{};
  pass.fold = fold;
  pass.x = there;
  if (kind != statistics) pass.y = there;
  pass.evaluation = kind == evaluation;
  if (general) pass.epilogue = {Activation::silu, 0, there};
  planned<T>(pass, device, ForwardPass::resident(!pass.is_plain()), out);
}

template <class T, class Pass>
void planned_lines(const Pass& pass, Device device, int64_t* out) {
  device.threads = device.threads < Pass::kLineThreads ? device.threads : Pass::kLineThreads;
  const LinePlan p = plan_of_lines<T>(pass, device);
  const int64_t all[] = {int64_t(p.team), p.threads, p.size,  p.teams, p.steps,  p.share,
                         p.several,       p.sharers, p.lines, p.room,  p.shared, p.several ? kLinesAtOnce<T, Pass> : 1};
  std::copy(std::begin(all), std::end(all), out);
}
template <class T>
void planned_lines(const Fold& fold, Kind kind, const Device& device, int64_t* out) {
  static double number = 0;
  Array there{&number, DType(), 0};
  if (kind >= backward) {
    BackwardPass pass{};
    pass.fold = fold;
    pass.sums = kind != grad_input;
    if (kind != grad_sums) pass.dx = there;
    if (kind == grad_sums) pass.s1 = &number;
    if (kind == grad_input) pass.cx = &number;
    return planned_lines<T>(pass, device, out);
  }
  ForwardPass pass{};
  pass.fold = fold;
  if (kind != statistics) pass.y = there;
  if (kind == evaluation) pass.given_rstd = &number;
  planned_lines<T>(pass, device, out);
}

}  // namespace

// fold: batch, outer, groups, inner, span. device: sms, threads, shared, shared_block, shared_lost, l2, max_cluster,
// cooperative. out: as `all` above.
extern "C" void plan_for(const int64_t* fold, int item, int kind, int general, const int64_t* device, int64_t* out) {
  const Fold f{fold[0], fold[1], fold[2], fold[3], fold[4]};
  const Device d{int(device[0]), int(device[1]), device[2],      device[3],
                 device[4],      device[5],      int(device[6]), bool(device[7])};
  if (item == 2) planned<bf16>(f, Kind(kind), general, d, out);
  if (item == 4) planned<float>(f, Kind(kind), general, d, out);
  if (item == 8) planned<double>(f, Kind(kind), general, d, out);
}
// out: as `all` of planned_lines.
extern "C" void line_plan_for(const int64_t* fold, int item, int kind, const int64_t* device, int64_t* out) {
  const Fold f{fold[0], fold[1], fold[2], fold[3], fold[4]};
  const Device d{int(device[0]), int(device[1]), device[2],      device[3],
                 device[4],      device[5],      int(device[6]), bool(device[7])};
  if (item == 2) planned_lines<bf16>(f, Kind(kind), d, out);
  if (item == 4) planned_lines<float>(f, Kind(kind), d, out);
  if (item == 8) planned_lines<double>(f, Kind(kind), d, out);
}
extern "C" int64_t scratch_sums() { return kMaxParts; }
