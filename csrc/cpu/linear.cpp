#include "linear.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <vector>

#include "cpu_features.h"
#include "half.h"
#include "pool.h"

namespace qwen_rt {
namespace {

constexpr int kNibbleOfK[8] = {0, 4, 1, 5, 2, 6, 3, 7};  // inverse of the order in linear.h
constexpr int kByteOfK[4] = {0, 2, 1, 3};

int64_t element_bytes(WeightKind kind) { return kind == WeightKind::kFloat32 ? 4 : 2; }

// Bytes of a group before its codes.
int64_t header_bytes(Aux aux) { return aux == Aux::kNone ? 32 : 64; }

uint8_t* allocate(int64_t bytes) {
  constexpr int64_t kHuge = 2 << 20;
  const int64_t align = bytes >= kHuge ? kHuge : 64;
  void* p = std::aligned_alloc(align, (bytes + align - 1) / align * align);
  if (!p) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (align == kHuge) madvise(p, bytes, MADV_HUGEPAGE);
#endif
  return static_cast<uint8_t*>(p);
}

// Scratch that grows and stays with its thread.
template <class T>
T* scratch(std::vector<T>& buffer, int64_t n) {
  if (static_cast<int64_t>(buffer.size()) < n) buffer.resize(n);
  return buffer.data();
}

const LinearKernels& kernels() {
#if defined(__x86_64__)
  if (active_isa() == Isa::kAvx2) return linear_kernels_avx2();
#endif
  return linear_kernels_scalar();
}

// --- scalar ---------------------------------------------------------------------------------------------------------

float dense_value(const PackedLinear& w, const uint8_t* p, int64_t index) {
  if (w.kind == WeightKind::kFloat32) return reinterpret_cast<const float*>(p)[index];
  const uint16_t h = reinterpret_cast<const uint16_t*>(p)[index];
  return w.kind == WeightKind::kBFloat16 ? bf16_to_float(h) : f16_to_float(h);
}

// Scale s and offset b of one column of one group: w = s * code + b, `code` as packed (int8: minus 128).
void column_affine(const PackedLinear& w, const uint8_t* group, int column, float* s, float* b) {
  const uint16_t* head = reinterpret_cast<const uint16_t*>(group);
  *s = f16_to_float(head[column]);
  const float bias = w.kind == WeightKind::kInt8 ? 128.0f : 0.0f;
  switch (w.aux) {
    case Aux::kNone:
      *b = *s * (w.kind == WeightKind::kInt8 ? 0.0f : -8.0f);
      break;
    case Aux::kZeros:
      *b = *s * (bias - f16_to_float(head[kPanel + column]));
      break;
    case Aux::kMins:
      *b = *s * bias + f16_to_float(head[kPanel + column]);
      break;
  }
}

int packed_code(const PackedLinear& w, const uint8_t* codes, int column, int64_t k) {
  if (w.kind == WeightKind::kInt4) {
    uint32_t word;
    std::memcpy(&word, codes + (k / 8) * 64 + column * 4, 4);
    return static_cast<int>((word >> (4 * kNibbleOfK[k % 8])) & 0xf);
  }
  return static_cast<int8_t>(codes[(k / 4) * 64 + column * 4 + kByteOfK[k % 4]]);
}

void dequantize_column(const PackedLinear& w, int64_t panel, int column, int64_t k0, int64_t k1, float* out,
                       int64_t step) {
  const uint8_t* base = w.panel(panel);
  if (!w.grouped()) {
    for (int64_t k = k0; k < k1; ++k) out[(k - k0) * step] = dense_value(w, base, k * kPanel + column);
    return;
  }
  for (int64_t k = k0; k < k1;) {
    const uint8_t* group = base + (k / w.group) * w.group_bytes;
    const uint8_t* codes = group + header_bytes(w.aux);
    float s, b;
    column_affine(w, group, column, &s, &b);
    const int64_t first = k / w.group * w.group;
    const int64_t end = std::min(first + w.group, k1);
    for (; k < end; ++k) {
      out[(k - k0) * step] = s * static_cast<float>(packed_code(w, codes, column, k - first)) + b;
    }
  }
}

void dequantize_scalar(const PackedLinear& w, int64_t panel, int64_t k0, int64_t k1, float* out) {
  for (int c = 0; c < kPanel; ++c) dequantize_column(w, panel, c, k0, k1, out + c, kPanel);
}

void tile_scalar(const float* a, const float* b, int64_t kc, int rows, float* y, int64_t ldy) {
  float acc[kTileRows][kPanel];
  for (int r = 0; r < rows; ++r) std::memcpy(acc[r], y + r * ldy, sizeof(acc[r]));
  for (int64_t k = 0; k < kc; ++k) {
    for (int r = 0; r < rows; ++r) {
      const float v = a[k * kTileRows + r];
      for (int c = 0; c < kPanel; ++c) acc[r][c] += v * b[k * kPanel + c];
    }
  }
  for (int r = 0; r < rows; ++r) std::memcpy(y + r * ldy, acc[r], sizeof(acc[r]));
}

void gemv_scalar(const PackedLinear& w, int64_t panel, const GemvInput& in, int rows, float* y) {
  const uint8_t* base = w.panel(panel);
  std::fill(y, y + rows * kPanel, 0.0f);
  if (!w.grouped()) {
    for (int64_t k = 0; k < w.padded_k; ++k) {
      for (int c = 0; c < kPanel; ++c) {
        const float v = dense_value(w, base, k * kPanel + c);
        for (int r = 0; r < rows; ++r) y[r * kPanel + c] += v * in.x[r * w.padded_k + k];
      }
    }
    return;
  }
  const int64_t groups = w.groups();
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* group = base + g * w.group_bytes;
    const uint8_t* codes = group + header_bytes(w.aux);
    for (int c = 0; c < kPanel; ++c) {
      float s, b;
      column_affine(w, group, c, &s, &b);
      for (int r = 0; r < rows; ++r) {
        int64_t dot = 0;
        for (int64_t k = 0; k < w.group; ++k) {
          dot += packed_code(w, codes, c, k) * static_cast<int64_t>(in.xq[r * w.padded_k + g * w.group + k]);
        }
        const double sum = s * static_cast<double>(dot) + b * static_cast<double>(in.sum[r * groups + g]);
        y[r * kPanel + c] += static_cast<float>(sum * in.scale[r * groups + g]);
      }
    }
  }
}

void quantize_row_scalar(const float* x, int64_t padded_k, int64_t group, int16_t* xq, float* scale, int32_t* sum) {
  for (int64_t g = 0; g * group < padded_k; ++g) {
    const float* xg = x + g * group;
    float top = 0.0f, poison = 0.0f;  // poison: 0, or NaN when x holds a NaN or infinity, which must not be lost
    for (int64_t i = 0; i < group; ++i) {
      top = std::max(top, std::fabs(xg[i]));
      poison += xg[i] * 0.0f;
    }
    const float inverse = top > 0.0f ? 32767.0f / top : 0.0f;
    int32_t total = 0;
    for (int64_t i = 0; i < group; ++i) {
      const float v = xg[i] * inverse;
      const int32_t q = std::fabs(v) <= 32768.0f ? static_cast<int32_t>(std::nearbyintf(v)) : 0;
      xq[g * group + i] = static_cast<int16_t>(q);
      total += q;
    }
    scale[g] = top / 32767.0f + poison;
    sum[g] = total;
  }
}

// --- driver ---------------------------------------------------------------------------------------------------------

// x row gathered by perm and padded with zeros.
void gather_row(const PackedLinear& w, const float* x, float* out) {
  if (w.perm) {
    for (int64_t k = 0; k < w.k; ++k) out[k] = x[w.perm[k]];
  } else {
    std::memcpy(out, x, w.k * sizeof(float));
  }
  std::fill(out + w.k, out + w.padded_k, 0.0f);
}

void write_columns(const PackedLinear& w, int64_t panel, int rows, const float* tile, float* y, int64_t ldy) {
  const int64_t c0 = panel * kPanel;
  const int count = static_cast<int>(std::min<int64_t>(kPanel, w.n - c0));
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < count; ++c) {
      y[r * ldy + c0 + c] = tile[r * kPanel + c] + (w.bias ? w.bias[c0 + c] : 0.0f);
    }
  }
}

void linear_few(const PackedLinear& w, const float* x, int64_t ldx, int rows, float* y, int64_t ldy) {
  static thread_local std::vector<float> floats, scales;
  static thread_local std::vector<int16_t> quantized;
  static thread_local std::vector<int32_t> sums;
  const LinearKernels& kern = kernels();
  const int64_t groups = w.groups();
  float* xf = scratch(floats, rows * w.padded_k);
  GemvInput in{xf, nullptr, nullptr, nullptr};
  for (int r = 0; r < rows; ++r) gather_row(w, x + r * ldx, xf + r * w.padded_k);
  if (w.grouped()) {
    int16_t* xq = scratch(quantized, rows * w.padded_k);
    float* sx = scratch(scales, rows * groups);
    int32_t* total = scratch(sums, rows * groups);
    for (int r = 0; r < rows; ++r) {
      kern.quantize_row(xf + r * w.padded_k, w.padded_k, w.group, xq + r * w.padded_k, sx + r * groups,
                        total + r * groups);
    }
    in = {xf, xq, sx, total};
  }
  // Spans of about 64 KB of weights: enough tasks to even out cores, few enough to keep streams long.
  const int64_t span = std::max<int64_t>(1, std::min<int64_t>((64 << 10) / w.panel_bytes, w.panels / 4));
  parallel_for((w.panels + span - 1) / span, [&](int64_t task) {
    float tile[kMaxGemvRows * kPanel];
    const int64_t end = std::min(w.panels, (task + 1) * span);
    for (int64_t p = task * span; p < end; ++p) {
      kern.gemv(w, p, in, rows, tile);
      write_columns(w, p, rows, tile, y, ldy);
    }
  });
}

void linear_many(const PackedLinear& w, const float* x, int64_t ldx, int64_t rows, float* y, int64_t ldy) {
  static thread_local std::vector<float> packed_rows;
  const LinearKernels& kern = kernels();
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  float* a = scratch(packed_rows, tiles * kTileRows * w.padded_k);  // [tile][k][6]
  parallel_for(tiles, [&](int64_t t) {
    float* out = a + t * kTileRows * w.padded_k;
    for (int r = 0; r < kTileRows; ++r) {
      const int64_t row = t * kTileRows + r;
      const float* in = x + row * ldx;
      if (row >= rows) {
        for (int64_t k = 0; k < w.padded_k; ++k) out[k * kTileRows + r] = 0.0f;
        continue;
      }
      for (int64_t k = 0; k < w.k; ++k) out[k * kTileRows + r] = in[w.perm ? w.perm[k] : k];
      for (int64_t k = w.k; k < w.padded_k; ++k) out[k * kTileRows + r] = 0.0f;
    }
  });
  // A block of k is dequantised once per panel (16 KB, stays in L1) and met by every row.
  const int64_t kc = std::max<int64_t>(w.group, 256 / w.group * w.group);
  const int64_t span = std::max<int64_t>(1, std::min<int64_t>(8, w.panels / 8));
  parallel_for((w.panels + span - 1) / span, [&](int64_t task) {
    static thread_local std::vector<float> block, sums;
    float* b = scratch(block, kc * kPanel);
    float* acc = scratch(sums, rows * kPanel);
    const int64_t end = std::min(w.panels, (task + 1) * span);
    for (int64_t p = task * span; p < end; ++p) {
      std::fill(acc, acc + rows * kPanel, 0.0f);
      for (int64_t k0 = 0; k0 < w.padded_k; k0 += kc) {
        const int64_t k1 = std::min(w.padded_k, k0 + kc);
        kern.dequantize(w, p, k0, k1, b);
        for (int64_t r = 0; r < rows; r += kTileRows) {
          const float* at = a + r * w.padded_k + k0 * kTileRows;
          kern.tile(at, b, k1 - k0, static_cast<int>(std::min<int64_t>(kTileRows, rows - r)), acc + r * kPanel, kPanel);
        }
      }
      write_columns(w, p, static_cast<int>(rows), acc, y, ldy);
    }
  });
}

}  // namespace

const LinearKernels& linear_kernels_scalar() {
  static const LinearKernels k{dequantize_scalar, tile_scalar, gemv_scalar, quantize_row_scalar};
  return k;
}

PackedLinear::PackedLinear(WeightKind kind_, Aux aux_, int64_t n_, int64_t k_, int64_t group_)
    : kind(kind_), aux(aux_), n(n_), k(k_), group(group_), data(nullptr, std::free) {
  if (n < 1 || k < 1) throw std::invalid_argument("linear: empty weight");
  if (!grouped()) {
    group = 8;
    aux = Aux::kNone;
  } else if (group < 16 || group % 16 != 0 || group > 256) {
    throw std::invalid_argument("linear: group size must be a multiple of 16, at most 256");
  } else if (k % group != 0) {
    throw std::invalid_argument("linear: K must be a multiple of the group size");
  }
  padded_k = (k + group - 1) / group * group;
  panels = (n + kPanel - 1) / kPanel;
  if (kind == WeightKind::kInt4) {
    group_bytes = header_bytes(aux) + group * kPanel / 2;
  } else if (kind == WeightKind::kInt8) {
    group_bytes = header_bytes(aux) + group * kPanel;
  } else {
    group_bytes = group * kPanel * element_bytes(kind);
  }
  panel_bytes = groups() * group_bytes;
  // 64 spare bytes: a prefetching kernel may read one vector past the end.
  data.reset(allocate(panels * panel_bytes + 64));
}

int64_t PackedLinear::nbytes() const {
  return panels * panel_bytes + (bias ? n * 4 : 0) + (perm ? k * 4 : 0);
}

void pack_grouped(PackedLinear& w, int64_t start, int64_t rows, const uint8_t* codes, const uint16_t* scales,
                  const uint8_t* zeros, const uint16_t* mins) {
  const int64_t groups = w.groups();
  const int64_t first = start / kPanel, count = (rows + kPanel - 1) / kPanel;
  parallel_for(count, [&](int64_t i) {
    uint8_t* panel = w.panel(first + i);
    std::memset(panel, 0, w.panel_bytes);
    for (int c = 0; c < kPanel; ++c) {
      const int64_t row = i * kPanel + c;
      if (row >= rows) break;
      const uint8_t* in = codes + row * w.k;
      for (int64_t g = 0; g < groups; ++g) {
        uint8_t* group = panel + g * w.group_bytes;
        uint16_t* head = reinterpret_cast<uint16_t*>(group);
        head[c] = scales[row * groups + g];
        if (w.aux == Aux::kZeros) head[kPanel + c] = float_to_f16(static_cast<float>(zeros[row * groups + g]));
        if (w.aux == Aux::kMins) head[kPanel + c] = mins[row * groups + g];
        uint8_t* out = group + header_bytes(w.aux) + c * 4;
        const uint8_t* q = in + g * w.group;
        if (w.kind == WeightKind::kInt4) {
          for (int64_t k = 0; k < w.group; k += 8, out += 64) {
            uint32_t word = 0;
            for (int j = 0; j < 8; ++j) word |= static_cast<uint32_t>(q[k + j] & 0xf) << (4 * kNibbleOfK[j]);
            std::memcpy(out, &word, 4);
          }
        } else {
          for (int64_t k = 0; k < w.group; k += 4, out += 64) {
            for (int j = 0; j < 4; ++j) out[kByteOfK[j]] = static_cast<uint8_t>(q[k + j] ^ 0x80);
          }
        }
      }
    }
  });
}

void pack_dense(PackedLinear& w, int64_t start, int64_t rows, const void* values, int64_t stride) {
  const int64_t size = element_bytes(w.kind);
  const int64_t first = start / kPanel, count = (rows + kPanel - 1) / kPanel;
  parallel_for(count, [&](int64_t i) {
    uint8_t* panel = w.panel(first + i);
    std::memset(panel, 0, w.panel_bytes);
    for (int c = 0; c < kPanel; ++c) {
      const int64_t row = i * kPanel + c;
      if (row >= rows) break;
      if (size == 4) {
        const uint32_t* in = static_cast<const uint32_t*>(values) + row * stride;
        uint32_t* out = reinterpret_cast<uint32_t*>(panel) + c;
        for (int64_t k = 0; k < w.k; ++k) out[k * kPanel] = in[k];
      } else {
        const uint16_t* in = static_cast<const uint16_t*>(values) + row * stride;
        uint16_t* out = reinterpret_cast<uint16_t*>(panel) + c;
        for (int64_t k = 0; k < w.k; ++k) out[k * kPanel] = in[k];
      }
    }
  });
}

void linear(const PackedLinear& w, const float* x, int64_t ldx, int64_t rows, float* y, int64_t ldy) {
  // 516 rows of activations at a time: bounded scratch, and their k block (528 KB) stays in L2.
  constexpr int64_t kRowBlock = 86 * kTileRows;
  for (int64_t r = 0; r < rows; r += kRowBlock) {
    const int64_t count = std::min(kRowBlock, rows - r);
    if (count > kMaxGemvRows) {
      linear_many(w, x + r * ldx, ldx, count, y + r * ldy, ldy);
    } else {
      linear_few(w, x + r * ldx, ldx, static_cast<int>(count), y + r * ldy, ldy);
    }
  }
}

void embedding(const PackedLinear& w, const int64_t* ids, int64_t count, float* out) {
  parallel_for(count, [&](int64_t i) {
    static thread_local std::vector<float> row;
    const int64_t id = ids[i];
    const int column = static_cast<int>(id % kPanel);
    float* dst = out + i * w.k;
    if (!w.perm) {
      dequantize_column(w, id / kPanel, column, 0, w.k, dst, 1);
      return;
    }
    float* sorted = scratch(row, w.k);
    dequantize_column(w, id / kPanel, column, 0, w.k, sorted, 1);
    for (int64_t k = 0; k < w.k; ++k) dst[w.perm[k]] = sorted[k];
  });
}

}  // namespace qwen_rt
