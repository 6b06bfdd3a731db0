// RMSNorm, rotary embedding and SwiGLU's product, in place and over strides; gaps between rows stay as they were.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "norm.h"
#include "rope.h"
#include "silu.h"

namespace check {
namespace {

// [outer, inner, size] with gaps, and exactly as much memory as that takes.
struct Grid {
  int64_t outer, inner, size, inner_stride, outer_stride;

  Grid(Random& random, int64_t outer_, int64_t inner_, int64_t size_) : outer(outer_), inner(inner_), size(size_) {
    inner_stride = size + random.pick<int64_t>({0, 0, 1, 13});
    outer_stride = inner * inner_stride + random.pick<int64_t>({0, 0, 1, 8});
  }
  int64_t length() const { return (outer - 1) * outer_stride + (inner - 1) * inner_stride + size; }
  int64_t at(int64_t o, int64_t i, int64_t d) const { return o * outer_stride + i * inner_stride + d; }
  template <class F>
  void each(const F& f) const {
    for (int64_t o = 0; o < outer; ++o) {
      for (int64_t i = 0; i < inner; ++i) {
        for (int64_t d = 0; d < size; ++d) f(o, i, d);
      }
    }
  }
  // Elements of `to` outside the grid must be as Buffer left them.
  void check_gaps(const Case& c, const Buffer<float>& to) const {
    std::vector<char> inside(static_cast<size_t>(to.size()));
    each([&](int64_t o, int64_t i, int64_t d) { inside[static_cast<size_t>(at(o, i, d))] = 1; });
    for (int64_t e = 0; e < to.size(); ++e) {
      if (!inside[static_cast<size_t>(e)]) c.expect(to.untouched(e), "a gap was written", e);
    }
  }
};

int64_t random_size(Random& random) {
  return random.pick<int64_t>({random.between(1, 40), random.between(1, 300), 64, 128, 896, random.between(900, 1100)});
}

}  // namespace

void check_rms_norm(Case& c) {
  Random& random = c.random;
  const int64_t size = random_size(random), outer = random.between(1, 12), inner = random.pick<int64_t>({1, 1, 3});
  const bool residual = random.chance(0.5);
  const int alias = static_cast<int>(random.between(0, 2));  // summed is its own, the residual, or x
  const bool in_place = !residual && random.chance(0.3);
  const float eps = random.pick({1e-6f, 1e-5f, 0.0f});
  c.describe("[%lld, %lld, %lld] residual %d alias %d in place %d", static_cast<long long>(outer),
             static_cast<long long>(inner), static_cast<long long>(size), residual, alias, in_place);
  const Grid grid(random, outer, inner, size);
  const float spread = std::ldexp(1.0f, static_cast<int>(random.between(-12, 12)));
  std::vector<float> x0(static_cast<size_t>(grid.length())), r0(x0);
  for (float& v : x0) v = random.normal() * spread;
  for (float& v : r0) v = random.normal() * spread;
  Buffer<float> weight(random, size);
  for (int64_t d = 0; d < size; ++d) weight[d] = random.normal();
  for (Isa isa : Case::isas()) {
    c.use(isa);
    Buffer<float> x(random, grid.length()), r(random, grid.length()), normed(random, grid.length()),
        summed(random, grid.length());
    grid.each([&](int64_t o, int64_t i, int64_t d) {
      const int64_t e = grid.at(o, i, d);
      x[e] = x0[static_cast<size_t>(e)];
      r[e] = r0[static_cast<size_t>(e)];
    });
    const auto rows = [&](const Buffer<float>& b) {
      return qwen_rt::Rows{b.data(), grid.outer_stride, grid.inner_stride};
    };
    const Buffer<float>& sums = alias == 0 ? summed : alias == 1 ? r : x;
    const Buffer<float>& out = in_place ? x : normed;
    qwen_rt::RmsNormArgs args{rows(x), rows(out), {}, {}, weight.data(), eps, outer, inner, size};
    if (residual) {
      args.residual = rows(r);
      args.summed = rows(sums);
    }
    qwen_rt::rms_norm(args);
    for (int64_t o = 0; o < outer; ++o) {
      for (int64_t i = 0; i < inner; ++i) {
        double squares = 0.0;
        std::vector<float> s(static_cast<size_t>(size));
        for (int64_t d = 0; d < size; ++d) {
          const auto e = static_cast<size_t>(grid.at(o, i, d));
          s[static_cast<size_t>(d)] = residual ? x0[e] + r0[e] : x0[e];
          squares += static_cast<double>(s[static_cast<size_t>(d)]) * s[static_cast<size_t>(d)];
        }
        const double scale = 1.0 / std::sqrt(squares / static_cast<double>(size) + static_cast<double>(eps));
        for (int64_t d = 0; d < size; ++d) {
          const int64_t e = grid.at(o, i, d);
          const double total = s[static_cast<size_t>(d)], want = total * scale * weight[d];
          if (residual) c.expect(sums[e] == s[static_cast<size_t>(d)], "summed", o, d);
          c.near(out[e], want, (static_cast<double>(size) / 32 + 8) * kEps * std::fabs(want), "normed", o, d);
        }
      }
    }
    grid.check_gaps(c, x);
    grid.check_gaps(c, r);
    grid.check_gaps(c, normed);
    grid.check_gaps(c, summed);
  }
}

void check_rope(Case& c) {
  Random& random = c.random;
  const int64_t tokens = random.between(1, 20),
                r = random.pick<int64_t>({random.between(1, 20), 32, 64, random.between(1, 70)});
  const int64_t size = 2 * r + random.pick<int64_t>({0, 0, 1, 24});
  const int64_t heads[2] = {random.between(1, 9), random.between(1, 3)};
  c.describe("%lld tokens, heads %lld and %lld of %lld, r %lld", static_cast<long long>(tokens),
             static_cast<long long>(heads[0]), static_cast<long long>(heads[1]), static_cast<long long>(size),
             static_cast<long long>(r));
  const Grid grids[2] = {Grid(random, tokens, heads[0], size), Grid(random, tokens, heads[1], size)};
  const Grid angles(random, tokens, 1, r);
  Buffer<float> cosines(random, angles.length()), sines(random, angles.length());
  for (int64_t e = 0; e < angles.length(); ++e) {
    const double a = random.normal() * 100;
    cosines[e] = static_cast<float>(std::cos(a));
    sines[e] = static_cast<float>(std::sin(a));
  }
  std::vector<float> before[2];
  for (int i = 0; i < 2; ++i) {
    before[i].resize(static_cast<size_t>(grids[i].length()));
    for (float& v : before[i]) v = random.normal() * 3;
  }
  for (Isa isa : Case::isas()) {
    c.use(isa);
    const Buffer<float> x[2] = {Buffer<float>(random, grids[0].length()), Buffer<float>(random, grids[1].length())};
    for (int i = 0; i < 2; ++i) {
      grids[i].each([&](int64_t t, int64_t h, int64_t d) {
        x[i][grids[i].at(t, h, d)] = before[i][static_cast<size_t>(grids[i].at(t, h, d))];
      });
    }
    qwen_rt::rope({x[0].data(), heads[0], grids[0].outer_stride, grids[0].inner_stride},
                  {x[1].data(), heads[1], grids[1].outer_stride, grids[1].inner_stride}, tokens, cosines.data(),
                  angles.outer_stride, sines.data(), angles.outer_stride, r);
    for (int i = 0; i < 2; ++i) {
      const Grid& grid = grids[i];
      grid.each([&](int64_t t, int64_t h, int64_t d) {
        const auto old = [&](int64_t at) -> double { return before[i][static_cast<size_t>(grid.at(t, h, at))]; };
        const float got = x[i][grid.at(t, h, d)];
        if (d >= 2 * r) {
          c.expect(got == static_cast<float>(old(d)), "a dimension that does not rotate", t, d);
          return;
        }
        const int64_t j = d % r, a = t * angles.outer_stride + j;
        const double x1 = old(j), x2 = old(j + r), cosine = cosines[a], sine = sines[a];
        const double want = d < r ? x1 * cosine - x2 * sine : x2 * cosine + x1 * sine;
        c.near(got, want, 2 * kEps * (std::fabs(x1) + std::fabs(x2)), "rotated", t, d);
      });
      grid.check_gaps(c, x[i]);
    }
  }
}

void check_silu(Case& c) {
  Random& random = c.random;
  const int64_t rows = random.between(1, 5);
  const int64_t size = random.chance(0.05) ? random.between(8180, 16500) : random_size(random);
  const Grid in(random, rows, 1, 2 * size), to(random, rows, 1, size);
  const float spread = random.pick({1.0f, 30.0f, 90.0f, 1e30f});
  c.describe("[%lld, 2 * %lld], gates of about %g", static_cast<long long>(rows), static_cast<long long>(size),
             static_cast<double>(spread));
  Buffer<float> x(random, in.length());
  in.each([&](int64_t o, int64_t, int64_t d) { x[in.at(o, 0, d)] = random.normal() * (d < size ? spread : 1.0f); });
  if (random.chance(0.3)) x[in.at(0, 0, random.between(0, size - 1))] = random.pick({NAN, INFINITY, 0.0f, -0.0f});
  for (Isa isa : Case::isas()) {
    c.use(isa);
    Buffer<float> out(random, to.length());
    qwen_rt::silu_mul(x.data(), in.outer_stride, rows, size, out.data(), to.outer_stride);
    to.each([&](int64_t o, int64_t, int64_t d) {
      const double g = x[in.at(o, 0, d)], up = x[in.at(o, 0, d + size)];
      const float got = out[to.at(o, 0, d)];
      if (!std::isfinite(g)) {
        c.expect(!std::isfinite(got), "a gate that is not finite", o, d);
        return;
      }
      const double want = g / (1 + std::exp(-g)) * up;
      // 4 units in the last place of silu, half of one for the product, and what is left out below -87.3.
      c.near(got, want, 9 * kEps * std::fabs(want) + 1.1e-36 * std::fabs(up), "product", o, d);
    });
    to.check_gaps(c, out);
  }
}

}  // namespace check
