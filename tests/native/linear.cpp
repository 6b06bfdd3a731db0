// Packed weights of every kind: products within the bounds at the head of linear.h, and rows as an embedding.
#include "linear.h"

#include <algorithm>
#include <cmath>

#include "check.h"
#include "pool.h"
#include "silu.h"

namespace check {
namespace {

using qwen_rt::Aux;
using qwen_rt::PackedLinear;
using qwen_rt::WeightKind;

constexpr const char* kKinds[] = {"int4", "int5", "int6", "int8", "float32", "float16", "bfloat16"};
constexpr const char* kAuxes[] = {"none", "zeros", "mins"};

int bits_of(WeightKind kind) {
  return kind == WeightKind::kInt4 ? 4 : kind == WeightKind::kInt5 ? 5 : kind == WeightKind::kInt6 ? 6 : 8;
}

struct Shape {
  WeightKind kind;
  Aux aux;
  int64_t n, groups, group, rows;
  // The largest codes there are, or the smallest, and the largest inputs, all of one sign: sums reach their limits.
  bool extreme;

  bool grouped() const { return kind <= WeightKind::kInt8; }
  int64_t k() const { return grouped() ? groups * group : groups; }
};

// What was packed, in double: w = scale * (code - zero) or scale * code + min, in the order of x.
struct Weight {
  PackedLinear packed;
  std::vector<double> w;      // [n][k]
  // [n][k]: scale * (code + zero) + |min|, whose sums are what float32 rounds. Zero points below the implied one count as
  // that: codes may be multiplied less it, and the offset gains it.
  std::vector<double> terms;
  std::vector<double> shift;  // [n][k]: 128 * scale, which int8 codes lose on packing and the offset gains; else 0
  std::vector<double> bias;   // [n]
  std::vector<double> scale;  // [n]: the largest of a row
};

Shape random_shape(Random& random, bool any_rows) {
  Shape s{};
  s.kind = random.pick({WeightKind::kInt4, WeightKind::kInt4, WeightKind::kInt5, WeightKind::kInt6, WeightKind::kInt8,
                        WeightKind::kFloat32, WeightKind::kFloat16, WeightKind::kBFloat16});
  s.extreme = s.grouped() && random.chance(0.15);
  s.aux = s.grouped() ? random.pick({Aux::kNone, Aux::kZeros, Aux::kMins}) : Aux::kNone;
  const int64_t unit = s.kind == WeightKind::kInt5 ? 32 : 16;
  s.group = random.pick<int64_t>({32, 64, 128, 256, random.between(1, 256 / unit) * unit});
  s.n = random.pick<int64_t>({random.between(1, 40), random.between(1, 100), random.between(100, 300)});
  s.groups = s.grouped()
                 ? random.pick<int64_t>({1, random.between(1, 6), random.between(1, 24)})
                 : random.pick<int64_t>({random.between(1, 40), random.between(1, 400), random.between(250, 1100)});
  s.rows = !any_rows ? 1
                     : random.pick<int64_t>({1, random.between(1, 4), random.between(5, 16), random.between(17, 40),
                                             random.chance(0.3)   ? 130
                                             : random.chance(0.3) ? 600
                                                                  : 12});
  constexpr int64_t kMostProducts = 200000;  // for each instruction set; the sanitizers make one take a few nanoseconds
  while (s.rows * s.n * s.k() > kMostProducts && s.groups > 1) s.groups = s.groups * 2 / 3;
  while (s.rows * s.n * s.k() > kMostProducts && s.n > 17) s.n = s.n * 2 / 3;
  return s;
}

// A float16 that is finite: mostly of the size scales have, at times zero, subnormal or large.
uint16_t random_half(Random& random, bool negative) {
  const int exponent =
      random.chance(0.9) ? static_cast<int>(random.between(4, 12)) : static_cast<int>(random.between(0, 20));
  const bool zero = random.chance(0.02), minus = negative && random.chance(0.5);
  return static_cast<uint16_t>((minus ? 0x8000 : 0) | (zero ? 0 : exponent << 10 | random.between(0, 1023)));
}

Weight random_weight(Random& random, const Shape& s) {
  const int64_t n = s.n, k = s.k();
  Weight out{PackedLinear(s.kind, s.aux, n, k, s.group), std::vector<double>(static_cast<size_t>(n * k)), {}, {}, {}, {}};
  out.terms.resize(out.w.size());
  out.shift.resize(out.w.size());
  out.scale.resize(static_cast<size_t>(n));
  PackedLinear& packed = out.packed;
  std::vector<int64_t> source(static_cast<size_t>(k));  // column j multiplies x[source[j]]
  for (int64_t j = 0; j < k; ++j) source[static_cast<size_t>(j)] = j;
  if (random.chance(0.3)) {
    packed.perm.reset(new int32_t[static_cast<size_t>(k)]);
    for (int64_t j = k - 1; j > 0; --j)
      std::swap(source[static_cast<size_t>(j)], source[static_cast<size_t>(random.between(0, j))]);
    for (int64_t j = 0; j < k; ++j)
      packed.perm[static_cast<size_t>(j)] = static_cast<int32_t>(source[static_cast<size_t>(j)]);
  }
  if (random.chance(0.5)) {
    packed.bias.reset(new float[static_cast<size_t>(n)]);
    for (int64_t i = 0; i < n; ++i) {
      packed.bias[static_cast<size_t>(i)] = random.normal();
      out.bias.push_back(packed.bias[static_cast<size_t>(i)]);
    }
  } else {
    out.bias.assign(static_cast<size_t>(n), 0.0);
  }
  const auto put = [&](int64_t i, int64_t j, double w, double terms, double shift) {
    const auto at = static_cast<size_t>(i * k + source[static_cast<size_t>(j)]);
    out.w[at] = w;
    out.terms[at] = terms;
    out.shift[at] = shift;
  };
  // In one piece, or in two as a loader that reads rows on demand does.
  const int64_t first = n > 16 && random.chance(0.5) ? random.between(1, (n - 1) / 16) * 16 : n;
  for (int64_t start = 0; start < n; start += first) {
    const int64_t rows = std::min(first, n - start);
    if (!s.grouped()) {
      const int64_t stride = k + random.pick<int64_t>({0, 0, 5});
      const int64_t width = s.kind == WeightKind::kFloat32 ? 4 : 2;
      Buffer<uint8_t> values(random, ((rows - 1) * stride + k) * width);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < k; ++j) {
          uint8_t* to = values.data() + (i * stride + j) * width;
          double w;
          if (s.kind == WeightKind::kFloat32) {
            const float f = random.normal();
            std::memcpy(to, &f, 4);
            w = f;
          } else {
            const uint16_t bits =
                s.kind == WeightKind::kFloat16
                    ? random_half(random, true)
                    : static_cast<uint16_t>(random.between(0x3800, 0x40ff) | random.between(0, 1) << 15);
            std::memcpy(to, &bits, 2);
            w = s.kind == WeightKind::kFloat16 ? f16_value(bits) : bf16_value(bits);
          }
          put(start + i, j, w, std::fabs(w), 0.0);
        }
      }
      qwen_rt::pack_dense(packed, start, rows, values.data(), stride);
      continue;
    }
    const int top = (1 << bits_of(s.kind)) - 1, limit = random.pick({0, top});
    Buffer<uint8_t> codes(random, rows * k), zeros(random, s.aux == Aux::kZeros ? rows * s.groups : 0);
    Buffer<uint16_t> scales(random, rows * s.groups), mins(random, s.aux == Aux::kMins ? rows * s.groups : 0);
    for (int64_t i = 0; i < codes.size(); ++i)
      codes[i] = static_cast<uint8_t>(s.extreme ? limit : random.between(0, top));
    for (int64_t i = 0; i < zeros.size(); ++i) zeros[i] = static_cast<uint8_t>(s.extreme ? 0 : random.between(0, 255));
    for (int64_t i = 0; i < scales.size(); ++i) scales[i] = random_half(random, true);
    for (int64_t i = 0; i < mins.size(); ++i) mins[i] = random_half(random, true);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < k; ++j) {
        const int64_t at = i * s.groups + j / s.group;
        const double scale = f16_value(scales[at]), code = codes[i * k + j];
        double& largest = out.scale[static_cast<size_t>(start + i)];
        largest = std::max(largest, std::fabs(scale));
        const double zero = s.aux == Aux::kMins ? 0.0 : s.aux == Aux::kZeros ? zeros[at] : (top + 1) / 2;
        const double min = s.aux == Aux::kMins ? f16_value(mins[at]) : 0.0;
        put(start + i, j, scale * (code - zero) + min,
            std::fabs(scale) * (code + std::max(zero, (top + 1) / 2.0)) + std::fabs(min),
            s.kind == WeightKind::kInt8 ? 128 * std::fabs(scale) : 0.0);
      }
    }
    qwen_rt::pack_grouped(packed, start, rows, codes.data(), scales.data(), zeros.size() ? zeros.data() : nullptr,
                          mins.size() ? mins.data() : nullptr);
  }
  return out;
}

// L of linear.h for a step of `rows`.
double steps(const PackedLinear& w, Isa isa, int64_t rows) {
  const qwen_rt::ByteKernels* bytes = nullptr;
#if defined(__x86_64__)
  if (isa >= Isa::kAvx2) bytes = qwen_rt::linear_kernels_avx2().bytes;
  if (isa >= Isa::kAvx512) bytes = qwen_rt::linear_kernels_avx512().bytes;
#elif defined(__aarch64__)
  if (isa == Isa::kNeon) bytes = qwen_rt::linear_kernels_neon().bytes;
#endif
  const bool eight = rows > qwen_rt::kExactRows && qwen_rt::activation_bits() == 8 && bytes && bytes->serves(w, 1, rows);
  const double larger = isa == Isa::kAvx512 ? std::exp2(0.25) : 1.0;  // steps are rounded up there
  return (eight ? qwen_rt::kSteps8 : qwen_rt::kSteps16) / larger;
}

// Whether some of so many rows meet scales as integers and activations by units of groups (linear_prompt_avx2.h).
bool in_units(const PackedLinear& w, Isa isa, int64_t rows) {
  return isa == Isa::kAvx2 && w.grouped() && w.kind != WeightKind::kInt8 && rows > qwen_rt::kByteTileRows &&
         steps(w, isa, rows) < qwen_rt::kSteps16 / 2;
}

struct Bits {  // restores what the process uses
  explicit Bits(int bits) { qwen_rt::set_activation_bits(bits); }
  ~Bits() { qwen_rt::set_activation_bits(8); }
};

// The same, to the bit, as silu_mul of the product y.
void check_swiglu(Case& c, const PackedLinear& w, const float* x, int64_t ldx, int64_t rows, const float* y, int64_t ldy) {
  const int64_t size = w.n / 2, stride = size + c.random.pick<int64_t>({0, 0, 5}), length = (rows - 1) * stride + size;
  Buffer<float> want(c.random, length), got(c.random, length);
  qwen_rt::silu_mul(y, ldy, rows, size, want.data(), stride);
  qwen_rt::swiglu(w, x, ldx, rows, got.data(), stride);
  for (int64_t i = 0; i < length; ++i) {
    if (i % stride >= size) {
      c.expect(got.untouched(i), "a gap was written by swiglu", i / stride, i % stride);
    } else {
      c.expect(got[i] == want[i] || (std::isnan(got[i]) && std::isnan(want[i])), "swiglu", i / stride, i % stride);
    }
  }
}

}  // namespace

void check_linear(Case& c) {
  Random& random = c.random;
  const Shape s = random_shape(random, true);
  const int64_t n = s.n, k = s.k(), rows = s.rows;
  const Bits bits(random.chance(0.3) ? 16 : 8);
  const int input = s.extreme ? 1 : static_cast<int>(random.pick({0, 0, 0, 2, 3, 4}));
  c.describe("%s %s [%lld, %lld] groups of %lld, %lld rows of %d bits, inputs %d, extreme %d, %d threads",
             kKinds[static_cast<int>(s.kind)], kAuxes[static_cast<int>(s.aux)], static_cast<long long>(n),
             static_cast<long long>(k), static_cast<long long>(s.group), static_cast<long long>(rows),
             qwen_rt::activation_bits(), input, s.extreme, qwen_rt::num_threads());
  const Weight weight = random_weight(random, s);
  const PackedLinear& w = weight.packed;

  const int64_t ldx = k + random.pick<int64_t>({0, 0, 7}), ldy = n + random.pick<int64_t>({0, 0, 3});
  Buffer<float> x(random, (rows - 1) * ldx + k);
  std::vector<char> bad(static_cast<size_t>(rows));
  for (int64_t r = 0; r < rows; ++r) {
    const int sign = random.chance(0.5) ? -1 : 1;
    // 3: any size, down to where the reciprocal of a group's step overflows
    const float spread = input == 3 ? std::ldexp(1.0f, static_cast<int>(random.between(-130, 60))) : 1.0f;
    for (int64_t j = 0; j < k; ++j) {
      x[r * ldx + j] = input == 1   ? static_cast<float>(sign)
                       : input == 2 ? (j / s.group % 2 ? random.normal() : 0.0f)  // groups of zeros
                                    : random.normal() * spread;
    }
    if (input == 4 && random.chance(0.3)) {
      bad[static_cast<size_t>(r)] = 1;
      x[r * ldx + random.between(0, k - 1)] = random.pick({NAN, INFINITY, -INFINITY});
    }
  }

  // Of each row and output: the exact product; what activations' steps of one may cost, and those of units of groups, whose
  // scales are integers besides; the sizes that float32 rounds.
  const int64_t group = s.grouped() ? s.group : 1;
  const bool paired = s.grouped() && group <= 32 && s.groups % 2 == 0;
  const int64_t unit = paired ? 2 * group : group, bits_here = s.grouped() ? bits_of(s.kind) : 8;
  const double zero = std::exp2(bits_here - 1), parts = std::ceil(static_cast<double>(unit) / std::exp2(10.0 - bits_here));
  std::vector<double> want(static_cast<size_t>(rows * n)), step_cost(want), unit_cost(want), scale_cost(want), rounded(want),
      floors(want);
  std::vector<double> top(static_cast<size_t>(k)), unit_top(top);
  std::vector<int64_t> column(static_cast<size_t>(k));  // of x, in the order of the packing
  for (int64_t j = 0; j < k; ++j) column[static_cast<size_t>(j)] = w.perm ? w.perm[static_cast<size_t>(j)] : j;
  const auto tops = [&](const float* row, int64_t span, std::vector<double>& out) {
    for (int64_t g = 0; g < k; g += span) {
      double most = 0.0;
      for (int64_t j = g; j < g + span; ++j)
        most = std::max(most, std::fabs(static_cast<double>(row[column[static_cast<size_t>(j)]])));
      for (int64_t j = g; j < g + span; ++j)
        out[static_cast<size_t>(column[static_cast<size_t>(j)])] = s.grouped() ? most : 0.0;
    }
  };
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = x.data() + r * ldx;
    tops(row, group, top);
    tops(row, unit, unit_top);
    for (int64_t i = 0; i < n; ++i) {
      const double *wi = weight.w.data() + i * k, *terms = weight.terms.data() + i * k;
      double sum = 0.0, cost = 0.0, shared = 0.0, size = 0.0, weights = 0.0, inputs = 0.0;
      for (int64_t j = 0; j < k; ++j) {
        const double most = top[static_cast<size_t>(j)], wide = unit_top[static_cast<size_t>(j)], v = row[j];
        sum += v * wi[j];
        cost += most / 2 * std::fabs(wi[j]);
        shared += wide / 2 * std::fabs(wi[j]);
        size += (std::fabs(v) + wide / 64) * terms[j];  // a quantised input may be larger by a byte's half step
        weights += std::fabs(wi[j]);
        inputs += std::fabs(v) + wide / 254;
      }
      const auto at = static_cast<size_t>(r * n + i);
      want[at] = sum + weight.bias[static_cast<size_t>(i)];
      step_cost[at] = cost;
      unit_cost[at] = shared;
      scale_cost[at] = weight.scale[static_cast<size_t>(i)] * parts / 65534 * zero * inputs * 1.001;
      rounded[at] = size;
      // Steps below 1 / the largest float are lost, and products below the smallest normal.
      floors[at] = (s.grouped() ? 4e-34 : 0x1p-148) * (weights + static_cast<double>(k));
    }
  }

  for (Isa isa : Case::isas()) {
    c.use(isa);
    Buffer<float> y(random, (rows - 1) * ldy + n);
    qwen_rt::linear(w, x.data(), ldx, rows, y.data(), ldy);
    // Rounding of float32: dense, K products; grouped, the sums of groups, and of each its scales, offset and product.
    const double roundings = s.grouped() ? static_cast<double>(w.groups()) + 8 : static_cast<double>(k);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < n; ++i) {
        const float got = y[r * ldy + i];
        if (bad[static_cast<size_t>(r)]) {
          c.expect(!std::isfinite(got), "NaN or infinity got lost", r, i);
          continue;
        }
        const auto at = static_cast<size_t>(r * n + i);
        double bound = roundings * kEps * rounded[at] + floors[at];
        if (in_units(w, isa, rows)) {
          bound += unit_cost[at] / steps(w, isa, rows) + scale_cost[at];
        } else if (s.grouped()) {
          bound += step_cost[at] / steps(w, isa, rows);
        }
        if (w.bias) bound += kEps * (std::fabs(want[at]) + bound);
        c.near(got, want[at], bound, "y", r, i);
      }
      for (int64_t i = n; i < ldy && r * ldy + i < y.size(); ++i) {
        c.expect(y.untouched(r * ldy + i), "a gap was written", r, i);
      }
    }
    if (n % 2 == 0) check_swiglu(c, w, x.data(), ldx, rows, y.data(), ldy);
  }
}

void check_embedding(Case& c) {
  Random& random = c.random;
  const Shape s = random_shape(random, false);
  const int64_t count = random.between(0, 20), k = s.k();
  c.describe("%s %s [%lld, %lld] groups of %lld, %lld ids", kKinds[static_cast<int>(s.kind)],
             kAuxes[static_cast<int>(s.aux)], static_cast<long long>(s.n), static_cast<long long>(k),
             static_cast<long long>(s.group), static_cast<long long>(count));
  const Weight weight = random_weight(random, s);
  Buffer<int64_t> ids(random, count);
  for (int64_t i = 0; i < count; ++i) ids[i] = random.between(0, s.n - 1);
  for (Isa isa : Case::isas()) {
    c.use(isa);
    Buffer<float> out(random, count * k);
    qwen_rt::embedding(weight.packed, ids.data(), count, out.data());
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < k; ++j) {
        const auto at = static_cast<size_t>(ids[i] * k + j);
        // scale * code and scale * zero are exact; the offset and the sum round.
        const double bound = s.grouped() ? 2.01 * kEps * (weight.terms[at] + weight.shift[at]) : 0.0;
        c.near(out[i * k + j], weight.w[at], bound, "row", i, j);
      }
    }
  }
}

}  // namespace check
