#include "verbs.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>

namespace fusednorm::check {

bool Tensor::overrun() const {
  return std::any_of(memory_.begin(), memory_.begin() + offset_ * item_size(dtype_),
                     [](unsigned char byte) { return byte != 0xff; });
}

std::string Call::name() const {
  constexpr const char* kNames[] = {"float32", "float64", "float16", "bfloat16"};
  std::string text = "Fold(";
  for (const int64_t n : {fold.batch, fold.outer, fold.groups, fold.inner}) text += std::to_string(n) + ", ";
  text += std::to_string(fold.span) + ") of " + kNames[int(dtype)] + ", activation " + std::to_string(int(activation));
  if (residual) text += ", residual";
  if (extreme) text += ", outlier";
  if (masked) text += ", mask";
  if (!centered) text += ", no mean";
  if (offset || offset_of_outputs)
    text += ", offsets " + std::to_string(offset) + " and " + std::to_string(offset_of_outputs);
  return text;
}

namespace {

Tensor drawn(DType dtype, int64_t size, double mean, unsigned seed, int64_t offset = 0) {
  Tensor t(dtype, size, offset);
  std::minstd_rand random(seed);
  for (int64_t i = 0; i < size; ++i) t.array().set(i, mean + double(random() % 4096) / 1024 - 2);
  return t;
}

// Wider than the kernels' arithmetic: squares of float64 numbers do not overflow.
using Wide = long double;

// A result, and how far a backend may be from it before it is stored.
struct Number {
  Wide value = 0, error = 0;
};
using Numbers = std::vector<Number>;

struct Element {
  size_t at, statistic, channel, position, cell;  // cell: of a batch entry and a channel
};
// core/fold.h as loops.
template <class Body>
void each(const Fold& f, Body&& body) {
  size_t at = 0;
  for (int64_t b = 0; b < f.batch; ++b)
    for (int64_t o = 0; o < f.outer; ++o)
      for (int64_t g = 0; g < f.groups; ++g)
        for (int64_t i = 0; i < f.inner; ++i) {
          const int64_t channel = (g * f.inner + i) / f.span;
          body(Element{at++, size_t(b * f.groups + g), size_t(channel), size_t((b * f.outer + o) * f.span + i % f.span),
                       size_t(b * f.channels() + channel)});
        }
}

struct Statistic {
  Wide n = 0, mean = 0, m2 = 0, squares = 0, size = 0;  // size: mean of |x|
};
std::vector<Statistic> statistics(const Call& call, const Array& x, const std::vector<uint8_t>& mask) {
  const Fold& f = call.fold;
  std::vector<Statistic> all(size_t(f.statistics()));
  const auto counted = [&](auto&& body) {
    each(f, [&](const Element& e) {
      if (mask.empty() || mask[e.position]) body(all[e.statistic], Wide(x.get(int64_t(e.at))));
    });
  };
  counted([](Statistic& s, Wide v) { s.n += 1, s.mean += v, s.size += std::abs(v), s.squares += v * v; });
  for (Statistic& s : all)
    if (s.n > 0) s.mean = call.centered ? s.mean / s.n : 0, s.size /= s.n;
  counted([](Statistic& s, Wide v) { s.m2 += (v - s.mean) * (v - s.mean); });
  return all;
}

// Largest relative error of one rounding.
Wide roundoff(DType dtype) {
  return dtype == DType::f64 ? 0x1p-53 : dtype == DType::f32 ? 0x1p-24 : dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
}
Wide largest(DType dtype) {
  return dtype == DType::f64   ? std::numeric_limits<double>::max()
         : dtype == DType::f32 ? std::numeric_limits<float>::max()
         : dtype == DType::f16 ? 65504
                               : 0x1.fep127f;
}
// In this type, whose subnormal numbers lie `apart`.
Number stored(DType dtype, const Number& n) {
  const Wide apart = dtype == DType::f64 ? 0x1p-1074 : dtype == DType::f16 ? 0x1p-24 : 0x1p-133;
  return {n.value, n.error + roundoff(dtype) * (std::abs(n.value) + n.error) + apart};
}

Wide activated(Activation activation, Wide pre) {
  const Wide sigmoid = 1 / (1 + std::exp(-pre));
  switch (activation) {
    case Activation::identity: return pre;
    case Activation::relu: return pre > 0 ? pre : 0;
    case Activation::leaky_relu: return pre > 0 ? pre : pre * Wide(kSlope);
    case Activation::silu: return pre * sigmoid;
    case Activation::sigmoid: return sigmoid;
    case Activation::tanh: return std::tanh(pre);
  }
  return pre;
}
// act'(pre). Its own steepest slopes: of SiLU's 0.5, sigmoid's 0.1, tanh's 0.8; at a kink either side will do.
Number derivative(Activation activation, const Number& pre) {
  const bool kink = std::abs(pre.value) <= pre.error;
  const Wide sigmoid = 1 / (1 + std::exp(-pre.value)), tanh = std::tanh(pre.value), u = 0x1p-22;
  switch (activation) {
    case Activation::identity: return {1, 0};
    case Activation::relu: return {pre.value > 0 ? 1.0L : 0.0L, kink ? 1.0L : 0.0L};
    case Activation::leaky_relu: return {pre.value > 0 ? 1.0L : Wide(kSlope), kink ? 1.0L : u * Wide(kSlope)};
    case Activation::silu: return {sigmoid * (1 + pre.value * (1 - sigmoid)), 0.5L * pre.error + u};
    case Activation::sigmoid: return {sigmoid * (1 - sigmoid), 0.1L * pre.error + u};
    case Activation::tanh: return {1 - tanh * tanh, 0.8L * pre.error + u};
  }
  return {};
}

// Plain loops. The bounds are derived as those of python/fusednorm/testing/cases.py, for each number by itself.
class Plain {
 public:
  Plain(const Call& call, Inputs& inputs)
      : c_(call), f_(call.fold), in_(inputs), own_(statistics(call, in_.x.array(), in_.mask)) {
    for (const Statistic& s : own_) {
      // Deviations are taken from a mean that is rounded.
      const Wide rounded = 4 * u_ * s.size,
                 m2_error = 2 * sum_ * s.m2 + s.n * rounded * rounded + 0x1p-51L * s.size * std::sqrt(s.m2 * s.n);
      m2_error_.push_back(m2_error);
    }
  }

  // In the order of run().
  std::vector<std::pair<const char*, Numbers>> results() {
    if (c_.centered) moments(true);
    moments(false);
    merge();
    const auto given = [&] {
      mean_ = numbers(in_.mean);
      rstd_ = numbers(in_.rstd);
    };
    given();
    normalize("normalize.y");
    for (const bool training : {true, false}) {
      if (training || c_.evaluates()) forward(training);
      given();
      gradients();
      const Numbers none(own_.size());
      input("backward.dx", training ? corrections(ux_) : none, training && c_.centered ? corrections(u_sum_) : none);
      if (c_.residual) put("backward.dresidual", u_of_);
      put("backward.dweight", of_channels(ux_));
      put("backward.dbias", of_channels(u_sum_));
    }
    put("grad_sums.s1", weighted(u_sum_));
    put("grad_sums.s2", weighted(ux_));
    put("grad_sums.dweight", of_channels(ux_));
    put("grad_sums.dbias", of_channels(u_sum_));
    input("grad_input.dx", numbers(in_.cx), numbers(in_.c0));
    put("grad_input.dresidual", u_of_);
    put("copy", numbers(in_.x));
    return std::move(results_);
  }

 private:
  void put(const char* name, Numbers numbers) { results_.emplace_back(name, std::move(numbers)); }
  static Numbers numbers(Tensor& t) {
    Numbers all(size_t(t.size()));
    for (size_t i = 0; i < all.size(); ++i) all[i].value = t.array().get(int64_t(i));
    return all;
  }
  Wide get(Tensor& t, size_t i) const { return t.array().get(int64_t(i)); }
  size_t share() const { return size_t(f_.share()); }

  Number mean_of(const Statistic& own) const { return c_.centered ? Number{own.mean, 2 * sum_ * own.size} : Number{}; }

  void moments(bool center) {
    Numbers n, mean, m2;
    for (size_t s = 0; s < own_.size(); ++s) {
      const Statistic& own = own_[s];
      n.push_back({own.n});
      mean.push_back(center ? mean_of(own) : Number{});
      m2.push_back(center ? Number{own.m2, m2_error_[s]} : Number{own.squares, 2 * sum_ * own.squares});
    }
    put("moments.count", n);
    put("moments.mean", mean);
    put("moments.m2", m2);
  }

  void merge() {
    Numbers n(size_t(f_.groups)), mean(n), m2(n);
    for (size_t c = 0; c < n.size(); ++c) {
      Wide size = 0;
      for (size_t s = c; s < own_.size(); s += n.size()) {
        n[c].value += get(in_.counts, s);
        mean[c].value += get(in_.counts, s) * get(in_.means, s);
        size = std::max(size, std::abs(get(in_.means, s)));
      }
      if (n[c].value > 0) mean[c].value /= n[c].value;
      for (size_t s = c; s < own_.size(); s += n.size()) {
        const Wide delta = get(in_.means, s) - mean[c].value;
        m2[c].value += get(in_.m2s, s) + get(in_.counts, s) * delta * delta;
      }
      const Wide error = 0x1p-50L * Wide(f_.batch);
      mean[c].error = error * size;
      m2[c].error = error * (m2[c].value + n[c].value * size * size);
    }
    put("merge.count", n);
    put("merge.mean", mean);
    put("merge.m2", m2);
  }

  Number pre(const Element& e) const {
    const Number &mean = mean_[e.statistic], &rstd = rstd_[e.statistic];
    const Wide x = get(in_.x, e.at), w = get(in_.weight, e.channel), b = get(in_.bias, e.channel);
    const Wide r = c_.residual ? get(in_.residual, e.at) : 0, centered = x - mean.value;
    const Wide size = std::abs(w) * rstd.value * (std::abs(x) + std::abs(mean.value)) + std::abs(b) + std::abs(r);
    const Wide error = std::abs(w) * (rstd.value * mean.error + std::abs(centered) * rstd.error);
    return {w * centered * rstd.value + b + r, error + 16 * u_ * size};
  }

  void normalize(const char* name) {
    Numbers y(size_t(f_.size()));
    each(f_, [&](const Element& e) {
      const Number p = pre(e);
      const Wide value = activated(c_.activation, p.value);
      y[e.at] = {value, 1.1L * p.error + 8 * u_ * std::abs(value)};  // 1.1: the steepest slope, SiLU's
    });
    put(name, y);
  }

  void forward(bool training) {
    Numbers mean = numbers(in_.running_mean), var = numbers(in_.running_var);
    const auto step = [](Number& to, DType dtype, Wide value, Wide error) {
      to.value += Wide(kMomentum) * (value - to.value);
      to.error += Wide(kMomentum) * (error - to.error);
      to = stored(dtype, to);
    };
    for (size_t s = 0; s < own_.size(); ++s) {
      const Statistic& own = own_[s];
      const size_t c = s % size_t(f_.groups);
      if (training) {
        const Wide variance = own.n > 0 ? own.m2 / own.n : 0, error = own.n > 0 ? m2_error_[s] / own.n : 0;
        const Wide rstd = 1 / std::sqrt(variance + Wide(kEps));
        mean_[s] = mean_of(own);
        rstd_[s] = {rstd, rstd * (error / (variance + Wide(kEps)) + 0x1p-50L)};
        if (own.n < 2 || !c_.evaluates()) continue;
        step(mean[c], in_.running_mean.array().dtype, own.mean, mean_[s].error);
        step(var[c], in_.running_var.array().dtype, own.m2 / (own.n - 1), m2_error_[s] / (own.n - 1));
      } else {
        const Wide rstd = 1 / std::sqrt(var[c].value + Wide(kEps));
        mean_[s] = mean[c];
        rstd_[s] = {rstd, rstd * 0x1p-50L};
      }
    }
    if (c_.evaluates()) {
      put("forward.running_mean", mean);
      put("forward.running_var", var);
    }
    if (c_.centered) put("forward.mean", mean_);
    put("forward.rstd", rstd_);
    normalize("forward.y");
  }

  void gradients() {
    u_of_.resize(size_t(f_.size()));
    x_hat_.resize(u_of_.size());
    u_sum_.assign(own_.size() * share(), {});
    ux_ = u_sum_;
    each(f_, [&](const Element& e) {
      const Wide dy = get(in_.dy, e.at), x = get(in_.x, e.at);
      const Wide mean = mean_[e.statistic].value, rstd = rstd_[e.statistic].value;
      const Number d = derivative(c_.activation, pre(e));
      const Number u = u_of_[e.at] = {dy * d.value, std::abs(dy) * (d.error + u_ * std::abs(d.value))};
      const Wide size = rstd * (std::abs(x) + std::abs(mean));
      const Number x_hat = x_hat_[e.at] = {(x - mean) * rstd, 4 * u_ * size};
      u_sum_[e.cell].value += u.value;
      u_sum_[e.cell].error += u.error + sum_ * std::abs(u.value);
      ux_[e.cell].value += u.value * x_hat.value;
      ux_[e.cell].error += u.error * size + sum_ * std::abs(u.value) * size;
    });
  }
  Numbers weighted(const Numbers& sums) const {
    Numbers all(own_.size());
    for (size_t i = 0; i < sums.size(); ++i) {
      const Wide w = get(in_.weight, i % size_t(f_.channels()));
      all[i / share()].value += w * sums[i].value;
      all[i / share()].error += std::abs(w) * sums[i].error;
    }
    return all;
  }
  // What a sum brings into dx, of batch statistics.
  Numbers corrections(const Numbers& sums) const {
    Numbers all = weighted(sums);
    for (size_t s = 0; s < all.size(); ++s) {
      const Wide n = own_[s].n;
      all[s] = n > 0 ? Number{-all[s].value / n, all[s].error / n} : Number{};
    }
    return all;
  }
  Numbers of_channels(const Numbers& sums) const {
    Numbers all(size_t(f_.channels()));
    for (size_t i = 0; i < sums.size(); ++i) {
      all[i % all.size()].value += sums[i].value;
      all[i % all.size()].error += sums[i].error;
    }
    return all;
  }

  void input(const char* name, const Numbers& cx, const Numbers& c0) {
    Numbers dx(u_of_.size());
    each(f_, [&](const Element& e) {
      const Wide w = get(in_.weight, e.channel), rstd = rstd_[e.statistic].value;
      const Number &u = u_of_[e.at], &x_hat = x_hat_[e.at];
      Wide value = w * u.value, error = std::abs(w) * (u.error + 16 * u_ * std::abs(u.value));
      if (in_.mask.empty() || in_.mask[e.position]) {
        const Number &a = cx[e.statistic], &b = c0[e.statistic];
        value += a.value * x_hat.value + b.value;
        error += a.error * std::abs(x_hat.value) + std::abs(a.value) * x_hat.error + b.error;
        error += 16 * u_ * (std::abs(a.value * x_hat.value) + std::abs(b.value));
      }
      dx[e.at] = {rstd * value, rstd * error};
    });
    put(name, dx);
  }

  const Call& c_;
  const Fold& f_;
  Inputs& in_;
  // Relative errors: of one rounding; of a sum, of the sum of absolute values. Float32 makes chains of 64 additions or
  // less, whose errors add up like a random walk; float64 of 4096, taken in the worst order.
  const Wide u_ = c_.dtype == DType::f64 ? 0x1p-53 : 0x1p-24;
  const Wide sum_ = c_.dtype == DType::f64 ? u_ * Wide(std::min<int64_t>(f_.per_statistic(), 4096) + 32) : Wide(1e-6);
  const std::vector<Statistic> own_;
  std::vector<Wide> m2_error_;
  Numbers mean_, rstd_;   // that are in use
  Numbers u_of_, x_hat_;  // of each element: u = dy·act'(pre)
  Numbers u_sum_, ux_;    // of each statistic: Σu, Σu·x̂
  std::vector<std::pair<const char*, Numbers>> results_;
};

}  // namespace

Inputs::Inputs(const Call& c)
    : x(drawn(c.dtype, c.fold.size(), 3, 1, c.offset)),
      dy(drawn(c.dtype, c.fold.size(), 0, 2, c.offset)),
      residual(drawn(c.dtype, c.fold.size(), 0, 3, c.offset)),
      weight(drawn(DType::f32, c.fold.channels(), 1, 4)),
      bias(drawn(DType::bf16, c.fold.channels(), 0, 5)),
      mean(DType::f64, c.fold.statistics()),
      rstd(DType::f64, c.fold.statistics()),
      cx(drawn(DType::f64, c.fold.statistics(), 0, 6)),
      c0(drawn(DType::f64, c.fold.statistics(), 0, 7)),
      running_mean(drawn(DType::f32, c.fold.channels(), 3, 8)),
      running_var(drawn(DType::f16, c.fold.channels(), 3, 9)),
      counts(drawn(DType::f64, c.fold.statistics(), 2, 10)),
      means(drawn(DType::f64, c.fold.statistics(), 3, 11)),
      m2s(drawn(DType::f64, c.fold.statistics(), 2, 12)) {
  if (c.extreme) x.array().set(c.fold.size() / 2, c.dtype == DType::f64 ? 1e200 : c.dtype == DType::f16 ? 6e4 : 1e30);
  if (c.masked) {
    mask.resize(size_t(c.fold.batch * c.fold.outer * c.fold.span));
    // Of several batch entries the first counts nothing.
    const size_t none = c.fold.batch > 1 ? size_t(c.fold.outer * c.fold.span) : 0;
    for (size_t i = 0; i < mask.size(); ++i) mask[i] = i >= none && i % 3 != 1;
  }
  const std::vector<Statistic> all = statistics(c, x.array(), mask);
  for (size_t s = 0; s < all.size(); ++s) {
    mean.doubles()[s] = double(all[s].mean);
    rstd.doubles()[s] = double(1 / std::sqrt((all[s].n > 0 ? all[s].m2 / all[s].n : 0) + Wide(kEps)));
  }
}

std::vector<Output> run(const Backend& verbs, const Call& c, Inputs& in, int device) {
  const Fold& f = c.fold;
  const int64_t size = f.size(), s = f.statistics(), channels = f.channels();
  std::vector<Output> out;
  const auto fresh = [&](const char* name, DType dtype, int64_t n, int64_t offset = 0) {
    return out.emplace_back(Output{name, Tensor(dtype, n, offset)}).tensor.array();
  };
  const auto numbers = [&](const char* name, int64_t n) { return fresh(name, DType::f64, n).as<double>(); };
  const auto tensor = [&](const char* name) { return fresh(name, c.dtype, size, c.offset_of_outputs); };
  const auto copied = [&](const char* name, const Tensor& from) {
    return out.emplace_back(Output{name, from}).tensor.array();
  };
  Tensor scratch(DType::f64, verbs.scratch ? (verbs.scratch(f, c.dtype, device) + 7) / 8 : 0);
  const auto queue = [&] {  // with nothing in its memory of the verb before
    scratch = Tensor(DType::f64, scratch.size());
    return Queue{device, nullptr, scratch.doubles()};
  };

  const EpilogueArgs epilogue{
      .activation = c.activation, .slope = kSlope, .residual = c.residual ? in.residual.array() : Array()};
  const Array x = in.x.array(), dy = in.dy.array(), weight = in.weight.array(), bias = in.bias.array();
  const double *mean = c.centered ? in.mean.doubles() : nullptr, *rstd = in.rstd.doubles();
  const uint8_t* mask = c.masked ? in.mask.data() : nullptr;

  for (const bool center : {true, false}) {
    if (center && !c.centered) continue;
    verbs.moments({.fold = f,
                   .x = x,
                   .mask = mask,
                   .center = center,
                   .count = numbers("moments.count", s),
                   .mean = numbers("moments.mean", s),
                   .m2 = numbers("moments.m2", s),
                   .queue = queue()});
  }
  verbs.merge({.before = 1,
               .axis = f.batch,
               .after = f.groups,
               .count = in.counts.doubles(),
               .mean = in.means.doubles(),
               .m2 = in.m2s.doubles(),
               .merged_count = numbers("merge.count", f.groups),
               .merged_mean = numbers("merge.mean", f.groups),
               .merged_m2 = numbers("merge.m2", f.groups),
               .queue = queue()});
  verbs.normalize({.fold = f,
                   .x = x,
                   .mean = mean,
                   .rstd = rstd,
                   .weight = weight,
                   .bias = bias,
                   .epilogue = epilogue,
                   .y = tensor("normalize.y"),
                   .queue = queue()});

  for (const bool training : {true, false}) {
    if (training || c.evaluates()) {
      RunningArgs running;
      running.momentum = kMomentum;
      if (c.evaluates()) {
        running.mean = copied("forward.running_mean", in.running_mean);
        running.var = copied("forward.running_var", in.running_var);
      }
      verbs.forward({.fold = f,
                     .x = x,
                     .weight = weight,
                     .bias = bias,
                     .epilogue = epilogue,
                     .mask = mask,
                     .eps = kEps,
                     .training = training,
                     .running = running,
                     .mean = c.centered ? numbers("forward.mean", s) : nullptr,
                     .rstd = numbers("forward.rstd", s),
                     .y = tensor("forward.y"),
                     .queue = queue()});
    }
    verbs.backward({.fold = f,
                    .dy = dy,
                    .x = x,
                    .mean = mean,
                    .rstd = rstd,
                    .weight = weight,
                    .bias = bias,
                    .epilogue = epilogue,
                    .mask = mask,
                    .constant = !training,
                    .dx = tensor("backward.dx"),
                    .dresidual = c.residual ? tensor("backward.dresidual") : Array(),
                    .dweight = fresh("backward.dweight", DType::f32, channels),
                    .dbias = fresh("backward.dbias", DType::f16, channels),
                    .queue = queue()});
  }
  verbs.grad_sums({.fold = f,
                   .dy = dy,
                   .x = x,
                   .mean = mean,
                   .rstd = rstd,
                   .weight = weight,
                   .bias = bias,
                   .epilogue = epilogue,
                   .s1 = numbers("grad_sums.s1", s),
                   .s2 = numbers("grad_sums.s2", s),
                   .dweight = fresh("grad_sums.dweight", DType::f32, channels),
                   .dbias = fresh("grad_sums.dbias", DType::f64, channels),
                   .queue = queue()});
  verbs.grad_input({.fold = f,
                    .dy = dy,
                    .x = x,
                    .mean = mean,
                    .rstd = rstd,
                    .weight = weight,
                    .bias = bias,
                    .epilogue = epilogue,
                    .cx = in.cx.doubles(),
                    .c0 = in.c0.doubles(),
                    .mask = mask,
                    .dx = tensor("grad_input.dx"),
                    .dresidual = tensor("grad_input.dresidual"),
                    .queue = queue()});
  verbs.copy({.to = tensor("copy").data, .from = x.data, .bytes = size * item_size(c.dtype), .queue = queue()});
  return out;
}

std::string wrong(const Call& c, Inputs& in, std::vector<Output>& out) {
  const auto expected = Plain(c, in).results();
  for (size_t i = 0; i < std::max(out.size(), expected.size()); ++i) {
    if (i >= out.size() || i >= expected.size() || out[i].name != std::string(expected[i].first))
      return "run() and Plain::results() differ in their order";
    Tensor& tensor = out[i].tensor;
    if (tensor.overrun()) return std::string(out[i].name) + ": memory before it was written";
    const Array got = tensor.array();
    for (size_t k = 0; k < expected[i].second.size(); ++k) {
      const Wide value = got.get(int64_t(k));
      const Number wanted = stored(got.dtype, expected[i].second[k]);
      const bool overflows = std::isinf(value) && std::abs(wanted.value) + wanted.error >= largest(got.dtype);
      if (overflows || std::abs(value - wanted.value) <= wanted.error) continue;
      char text[200];
      std::snprintf(text, sizeof text, "%s[%zu] = %.9Lg, not %.9Lg ± %.2Lg", out[i].name, k, value, wanted.value,
                    wanted.error);
      return text;
    }
  }
  return "";
}

}  // namespace fusednorm::check
