#include "linear.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <vector>

#include "cpu_features.h"
#include "half.h"
#include "memory.h"
#include "pool.h"
#include "silu.h"

namespace qwen_rt {
namespace {

constexpr int kNibbleOfK[8] = {0, 4, 1, 5, 2, 6, 3, 7};  // inverse of the order in linear.h
constexpr int kByteOfK[4] = {0, 2, 1, 3};

// Memory of packed weights: slices of large blocks, each freed with its last slice.
std::shared_ptr<uint8_t> slice(int64_t bytes) {
  constexpr int64_t kBlock = 32 << 20;
  static std::mutex mutex;
  static std::shared_ptr<uint8_t> block;  // the one that has room left
  static int64_t used = 0, size = 0;
  std::lock_guard<std::mutex> lock(mutex);
  bytes = (bytes + 63) / 64 * 64;
  if (!block || used + bytes > size) {
    size = allocated(std::max(kBlock, bytes));
    block.reset(allocate(size).release(), Free());
    used = 0;
  }
  std::shared_ptr<uint8_t> part(block, block.get() + used);
  used += bytes;
  if (used == size) block.reset();
  return part;
}

const LinearKernels& kernels() {
#if defined(__x86_64__)
  if (active_isa() >= Isa::kAvx512) return linear_kernels_avx512();
  if (active_isa() >= Isa::kAvx2) return linear_kernels_avx2();
#elif defined(__aarch64__)
  if (active_isa() == Isa::kNeon) return linear_kernels_neon();
#endif
  return linear_kernels_scalar();
}

// --- scalar ---------------------------------------------------------------------------------------------------------

float dense_value(const PackedLinear& w, const uint8_t* p, int64_t index) {
  if (w.kind == WeightKind::kFloat32) return reinterpret_cast<const float*>(p)[index];
  const uint16_t h = reinterpret_cast<const uint16_t*>(p)[index];
  return w.kind == WeightKind::kBFloat16 ? bf16_to_float(h) : f16_to_float(h);
}

// What is taken from a packed code (int8: already minus 128) before it is multiplied.
int zero_point(const PackedLinear& w, const uint8_t* group, int column) {
  const int bias = w.kind == WeightKind::kInt8 ? 128 : 0;
  if (w.aux == Aux::kMins) return -bias;
  if (w.aux == Aux::kNone) return implied_zero(w.kind) - bias;
  return static_cast<int>(f16_to_float(reinterpret_cast<const uint16_t*>(group)[kPanel + column])) - bias;
}

// Scale s and offset b of one column of one group: w = s * code + b, `code` as packed (int8: minus 128).
void column_affine(const PackedLinear& w, const uint8_t* group, int column, float* s, float* b) {
  const uint16_t* head = reinterpret_cast<const uint16_t*>(group);
  *s = f16_to_float(head[column]);
  *b = *s * static_cast<float>(-zero_point(w, group, column));
  if (w.aux == Aux::kMins) *b += f16_to_float(head[kPanel + column]);
}

int packed_code(const PackedLinear& w, const uint8_t* codes, int column, int64_t k) {
  if (w.kind == WeightKind::kInt8) return static_cast<int8_t>(codes[(k / 4) * 64 + column * 4 + kByteOfK[k % 4]]);
  const CodeLayout layout = layout_of(w.kind);
  const uint8_t* unit = codes + k / layout.ks * layout.unit_bytes() + column * 4;
  const int vector = static_cast<int>(k % layout.ks / 8), nibble = kNibbleOfK[k % 8];
  int code = unit[64 * vector + nibble / 2] >> (4 * (nibble % 2)) & 0xf;
  if (layout.top) {
    const int u = 2 * vector + nibble % 2;  // which 4 k of the unit
    code |= (unit[64 * layout.low + nibble / 2] >> (layout.top * u) & ((1 << layout.top) - 1)) << 4;
  }
  return code;
}

// Eight 4-bit codes, one a byte, as a packed word: bytes (0,2) (4,6) (1,3) (5,7).
uint32_t pack_nibbles(uint64_t codes) {
  const uint64_t pairs = codes | codes >> 12;
  return static_cast<uint32_t>((pairs & 0xff) | (pairs >> 24 & 0xff00) | (pairs << 8 & 0xff0000) |
                               (pairs >> 16 & 0xff000000));
}

// The inverse of packed_code, a group of one column at a time; `group` is a multiple of the layout's unit.
template <WeightKind kKind>
void pack_codes(const uint8_t* codes, int64_t group, uint8_t* out) {
  constexpr CodeLayout kLayout = layout_of(kKind);
  constexpr uint64_t kTopMask = 0x0101010101010101 * ((1u << kLayout.top) - 1);
  for (int64_t k = 0; k < group; k += kLayout.ks, out += kLayout.unit_bytes()) {
    if (kKind == WeightKind::kInt8) {
      uint32_t word;
      std::memcpy(&word, codes + k, 4);
      word = ((word & 0xff0000ff) | (word << 8 & 0xff0000) | (word >> 8 & 0xff00)) ^ 0x80808080;
      std::memcpy(out, &word, 4);
      continue;
    }
    uint32_t high = 0;
    for (int v = 0; v < kLayout.low; ++v) {
      uint64_t q;
      std::memcpy(&q, codes + k + 8 * v, 8);
      const uint32_t word = pack_nibbles(q & 0x0f0f0f0f0f0f0f0f);
      std::memcpy(out + 64 * v, &word, 4);
      if (kLayout.top) {
        // As nibbles, then the even ones (4 k) and the odd ones (the next 4) at their bits.
        const uint32_t bits = pack_nibbles(q >> 4 & kTopMask);
        high |= (bits & 0x0f0f0f0f) << (kLayout.top * 2 * v) | (bits >> 4 & 0x0f0f0f0f) << (kLayout.top * (2 * v + 1));
      }
    }
    if (kLayout.top) std::memcpy(out + 64 * kLayout.low, &high, 4);
  }
}

// Rows [rows][k] -> columns [k][kPanel], a block at a time that stays in L1.
template <class T>
void transpose(const T* in, int64_t stride, int64_t rows, int64_t k, T* out) {
  constexpr int64_t kBlock = 64;
  for (int64_t k0 = 0; k0 < k; k0 += kBlock) {
    const int64_t k1 = std::min(k, k0 + kBlock);
    for (int64_t c = 0; c < rows; ++c) {
      for (int64_t j = k0; j < k1; ++j) out[j * kPanel + c] = in[c * stride + j];
    }
  }
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

void widen_scalar(const PackedLinear& w, int64_t panel, int64_t k0, int64_t k1, float* out) {
  for (int64_t i = k0 * kPanel; i < k1 * kPanel; ++i) out[i - k0 * kPanel] = dense_value(w, w.panel(panel), i);
}

void dense_tile_scalar(const float* a, const float* b, int64_t kc, float* y) {
  float acc[kDenseRows * kPanel];
  std::memcpy(acc, y, sizeof(acc));
  for (int64_t k = 0; k < kc; ++k) {
    for (int r = 0; r < kDenseRows; ++r) {
      const float v = a[k * kDenseRows + r];
      for (int c = 0; c < kPanel; ++c) acc[r * kPanel + c] += v * b[k * kPanel + c];
    }
  }
  std::memcpy(y, acc, sizeof(acc));
}

void unpack_scalar(const PackedLinear& w, int64_t panel, int64_t g0, int64_t g1, int16_t* codes, float* scale,
                   float* min) {
  for (int64_t g = g0; g < g1; ++g, codes += w.group * kPanel, scale += kPanel, min += kPanel) {
    const uint8_t* group = w.panel(panel) + g * w.group_bytes;
    const uint16_t* head = reinterpret_cast<const uint16_t*>(group);
    for (int c = 0; c < kPanel; ++c) {
      const int zero = zero_point(w, group, c);
      scale[c] = f16_to_float(head[c]);
      if (w.aux == Aux::kMins) min[c] = f16_to_float(head[kPanel + c]);
      for (int64_t k = 0; k < w.group; ++k) {
        const int code = packed_code(w, group + header_bytes(w.aux), c, k);
        codes[(k / 2) * kPanel * 2 + c * 2 + k % 2] = static_cast<int16_t>(code - zero);
      }
    }
  }
}

void grouped_tile_scalar(const GroupedTile& t, float* y) {
  for (int64_t g = 0; g < t.groups; ++g) {
    const int16_t* x = t.x + g * t.group * kGroupedRows;
    const int16_t* w = t.codes + g * t.group * kPanel;
    for (int r = 0; r < kGroupedRows; ++r) {
      int32_t acc[kPanel] = {};
      for (int64_t k = 0; k < t.group / 2; ++k) {
        const int32_t x0 = x[(k * kGroupedRows + r) * 2], x1 = x[(k * kGroupedRows + r) * 2 + 1];
        for (int c = 0; c < kPanel; ++c) acc[c] += x0 * w[(k * kPanel + c) * 2] + x1 * w[(k * kPanel + c) * 2 + 1];
      }
      const float sx = t.scale[g * kGroupedRows + r], total = t.scaled_sum[g * kGroupedRows + r];
      for (int c = 0; c < kPanel; ++c) {
        y[r * kPanel + c] += static_cast<float>(acc[c]) * (t.w_scale[g * kPanel + c] * sx);
        if (t.w_min) y[r * kPanel + c] += t.w_min[g * kPanel + c] * total;
      }
    }
  }
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
    const float inverse = top > kTiny ? kSteps16 / top : 0.0f;
    int32_t total = 0;
    for (int64_t i = 0; i < group; ++i) {
      const float v = xg[i] * inverse;
      const int32_t q = std::fabs(v) <= 32768.0f ? static_cast<int32_t>(std::nearbyintf(v)) : 0;
      xq[g * group + i] = static_cast<int16_t>(q);
      total += q;
    }
    scale[g] = top / kSteps16 + poison;
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

// Activations as bytes, in tiles of at most kByteTileRows rows: tile t holds rows [12 t, 12 t + 12) at most.
struct ByteTiles {
  const PackedLinear& w;
  int64_t rows;  // 16-bit activations count twice
  int8_t* x;
  float* scale;
  int32_t* start;
  float* scaled_sum;
  ByteRows::Fold fold;
  int64_t parts;

  int64_t count() const { return (rows + kByteTileRows - 1) / kByteTileRows; }
  int64_t rows_of(int64_t tile) const { return std::min<int64_t>(kByteTileRows, rows - tile * kByteTileRows); }
  ByteRows from(int64_t tile, int64_t group) const {
    const int64_t at = tile * kByteTileRows * w.groups() + group * rows_of(tile);
    return {x + at * w.group, scale + at,     start + at,     scaled_sum + at,
            {fold.start + at * parts, fold.zero + at, fold.root + at}};
  }
};

// x as tiles, in scratch of the calling thread; those of kByteTileRows rows for `whole`, if that is not null.
ByteTiles byte_tiles(const PackedLinear& w, const float* x, int64_t ldx, int64_t rows, int planes, const WholeTiles* whole) {
  static thread_local Scratch<int8_t> codes;
  static thread_local Scratch<float> scales, sums, zeros;
  static thread_local Scratch<int32_t> starts, fold_starts, roots;
  const ByteKernels& kern = *kernels().bytes;
  const int64_t all = rows * planes, parts = whole ? whole->parts(w) : 1;
  const ByteTiles tiles{w,
                        all,
                        codes.room(all * w.padded_k),
                        scales.room(all * w.groups()),
                        starts.room(all * w.groups()),
                        sums.room(all * w.groups()),
                        {fold_starts.room(all * w.groups() * parts), zeros.room(all * w.groups()),
                         roots.room(all * w.groups())},
                        parts};
  const bool gather = w.perm || w.k != w.padded_k;
  const auto quantize = [&](int64_t tile, int64_t g0, int64_t g1) {
    static thread_local Scratch<float> gathered;
    const float* from[kByteTileRows];
    const int count = static_cast<int>(tiles.rows_of(tile)) / planes;
    float* room = gather ? gathered.room(count * w.padded_k) : nullptr;
    for (int r = 0; r < count; ++r) {
      from[r] = x + (tile * kByteTileRows / planes + r) * ldx;
      if (gather) {
        gather_row(w, from[r], room + r * w.padded_k);
        from[r] = room + r * w.padded_k;
      }
    }
    if (whole && count == kByteTileRows) {
      whole->quantize(w, from, tiles.from(tile, 0));
    } else {
      kern.quantize(w, from, count, planes, g0, g1, tiles.from(tile, 0));
    }
  };
  if (tiles.count() > 1) {
    parallel_for(tiles.count(), [&](int64_t tile) { quantize(tile, 0, w.groups()); });
  } else if (rows < 8 || gather || whole) {
    quantize(0, 0, w.groups());
  } else {
    constexpr int64_t kParts = 4;
    parallel_for(kParts, [&](int64_t part) {
      quantize(0, part * w.groups() / kParts, (part + 1) * w.groups() / kParts);
    });
  }
  return tiles;
}

// A row of a panel's outputs from its sums: the two rows of a 16-bit activation are added, and the bias. How many of the
// 16 there are.
int finish(const PackedLinear& w, int64_t panel, int planes, const float* sums, float* row) {
  const int columns = static_cast<int>(std::min<int64_t>(kPanel, w.n - panel * kPanel));
  std::memmove(row, sums, kPanel * sizeof(float));
  if (planes == 2) {
    for (int c = 0; c < kPanel; ++c) row[c] += sums[kPanel + c];
  }
  if (w.bias) {
    const float* bias = w.bias.get() + panel * kPanel;
    for (int c = 0; c < columns; ++c) row[c] += bias[c];
  }
  return columns;
}

// Sums of `count` panels from `first`, [panel][planes * rows][16], to y: row by row, so that each is written in one
// stretch.
void write_planes(const PackedLinear& w, int64_t first, int64_t count, int64_t rows, int planes, const float* sums,
                  float* y, int64_t ldy) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t p = 0; p < count; ++p) {
      float row[kPanel];
      const int columns = finish(w, first + p, planes, sums + (p * rows + r) * planes * kPanel, row);
      std::memcpy(y + r * ldy + (first + p) * kPanel, row, columns * sizeof(float));
    }
  }
}

// silu(gate) * up of a tile from its sums (overwritten): `count` panels of gates [planes * rows][16], then their ups.
void write_swiglu(const PackedLinear& w, int64_t first, int64_t count, int64_t rows, int planes, float* sums, float* y,
                  int64_t ldy) {
  float* to = sums;
  if (planes == 2 || w.bias) {
    const float* from = sums;
    for (int64_t p = 0; p < 2 * count; ++p) {
      const int64_t panel = p < count ? first + p : w.panels / 2 + first + p - count;
      for (int64_t r = 0; r < rows; ++r, from += planes * kPanel, to += kPanel) finish(w, panel, planes, from, to);
    }
  }
  const int64_t size = count * rows * kPanel;
  silu_mul_kernel()(sums, sums + size, size, sums);
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t r = 0; r < rows; ++r, sums += kPanel) {
      std::memcpy(y + r * ldy + (first + p) * kPanel, sums, kPanel * sizeof(float));
    }
  }
}

// One tile of rows: the packed panel is read once and unpacked in registers.
void few_bytes(const PackedLinear& w, const float* x, int64_t ldx, int rows, int planes, float* y, int64_t ldy) {
  const ByteKernels& kern = *kernels().bytes;
  const ByteTiles tiles = byte_tiles(w, x, ldx, rows, planes, nullptr);
  const bool row = kern.row && rows == 1 && planes == 2;
  const int64_t span = std::max<int64_t>(1, std::min<int64_t>((64 << 10) / w.panel_bytes, w.panels / 4));
  parallel_for((w.panels + span - 1) / span, [&](int64_t task) {
    float sums[kByteTileRows * kPanel];
    const int64_t end = std::min(w.panels, (task + 1) * span);
    for (int64_t p = task * span; p < end; ++p) {
      if (row) {
        kern.row(w, p, tiles.from(0, 0), sums);
      } else {
        kern.tile(w, p, 0, w.groups(), tiles.from(0, 0), rows * planes, nullptr, sums, kPanel);
      }
      write_planes(w, p, 1, rows, row ? 1 : planes, sums, y, ldy);
    }
  });
}

// Many tiles: a block of k of a few panels stays near while every tile of activations passes by. The last block of a
// panel goes straight to y where no planes are left to add and no columns are beyond n. `swiglu`: of each panel
// of gates and its panel of ups, only what silu_mul makes of them is written.
void many_bytes(const PackedLinear& w, const float* x, int64_t ldx, int64_t rows, int planes, bool swiglu, float* y,
                int64_t ldy) {
  constexpr int64_t kPanels = 4, kBlock = 1024;
  const ByteKernels& kern = *kernels().bytes;
  const WholeTiles* whole = planes == 1 ? kern.whole : nullptr;
  const ByteTiles tiles = byte_tiles(w, x, ldx, rows, planes, whole);
  const int64_t groups = w.groups(), block = kBlock / w.group, all = rows * planes;
  const int64_t columns = swiglu ? w.panels / 2 : w.panels, step = swiglu ? kPanels / 2 : kPanels;
  parallel_for((columns + step - 1) / step, [&](int64_t task) {
    static thread_local Scratch<float> buffer;
    static thread_local Scratch<uint8_t> unpacked;
    float* sums = buffer.room(kPanels * all * kPanel);
    const int64_t each = whole ? whole->bytes(w, block) : 0;
    uint8_t* bytes = unpacked.room(kPanels * each);
    float last[kPanels * kByteTileRows * kPanel];
    const int64_t first = task * step, written = std::min(step, columns - first), count = swiglu ? 2 * written : written;
    const auto panel_of = [&](int64_t p) { return p < written ? first + p : columns + first + p - written; };
    const int64_t direct = planes == 2 ? 0 : std::min(count, w.n / kPanel - first);
    for (int64_t g = 0; g < groups; g += block) {
      const int64_t end = std::min(g + block, groups);
      for (int64_t p = 0; p < count && whole; ++p) whole->unpack(w, panel_of(p), g, end, bytes + p * each);
      for (int64_t t = 0; t < tiles.count(); ++t) {
        const ByteRows in = tiles.from(t, g);
        const int count_rows = static_cast<int>(tiles.rows_of(t));
        const int64_t r0 = t * kByteTileRows / planes, r1 = r0 + count_rows / planes;
        if (end == groups) {  // the outputs lie far apart: ask for them now, they are written when all tiles are done
          for (int64_t r = r0; r < r1; ++r) {
            for (int64_t p = 0; p < written; ++p) __builtin_prefetch(y + r * ldy + (first + p) * kPanel, 1, 2);
          }
        }
        for (int64_t p = 0; p < count; ++p) {
          const int64_t panel = panel_of(p);
          float *own = sums + (p * all + t * kByteTileRows) * kPanel, *to = own;
          const bool outright = end == groups && !swiglu && p < direct;
          if (outright) to = y + r0 * ldy + panel * kPanel;
          if (end == groups && swiglu) to = last + p * count_rows * kPanel;
          if (whole && count_rows == kByteTileRows) {
            whole->tile(w, bytes + p * each, g, end, in, own, to, outright ? ldy : kPanel);
          } else {
            kern.tile(w, panel, g, end, in, count_rows, own, to, outright ? ldy : kPanel);
          }
          if (outright && w.bias) {
            for (int r = 0; r < count_rows; ++r) finish(w, panel, 1, to + r * ldy, to + r * ldy);
          }
        }
        if (end == groups && swiglu) write_swiglu(w, first, written, r1 - r0, planes, last, y + r0 * ldy, ldy);
      }
    }
    if (!swiglu) write_planes(w, first + direct, count - direct, rows, planes, sums + direct * all * kPanel, y, ldy);
  });
}

void linear_few(const PackedLinear& w, const float* x, int64_t ldx, int rows, float* y, int64_t ldy) {
  static thread_local Scratch<float> floats, scales;
  static thread_local Scratch<int16_t> quantized;
  static thread_local Scratch<int32_t> sums;
  const LinearKernels& kern = kernels();
  const int64_t groups = w.groups();
  float* xf = floats.room(rows * w.padded_k);
  GemvInput in{xf, nullptr, nullptr, nullptr};
  for (int r = 0; r < rows; ++r) gather_row(w, x + r * ldx, xf + r * w.padded_k);
  if (w.grouped()) {
    int16_t* xq = quantized.room(rows * w.padded_k);
    float* sx = scales.room(rows * groups);
    int32_t* total = sums.room(rows * groups);
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

// Every panel, `most` at a time, against `rows` rows whose activations are prepared: multiply(first, count, sums) adds
// into sums [count][padded_rows][16].
template <class F>
void each_panels(const PackedLinear& w, int64_t most, int64_t rows, int64_t padded_rows, float* y, int64_t ldy,
                 const F& multiply) {
  parallel_for((w.panels + most - 1) / most, [&](int64_t task) {
    static thread_local Scratch<float> buffer;
    const int64_t first = task * most, count = std::min(most, w.panels - first), size = padded_rows * kPanel;
    float* sums = buffer.room(most * size);
    std::fill(sums, sums + count * size, 0.0f);
    multiply(first, count, sums);
    for (int64_t p = 0; p < count; ++p) {
      write_columns(w, first + p, static_cast<int>(rows), sums + p * size, y, ldy);
    }
  });
}

void many_dense(const PackedLinear& w, const float* x, int64_t ldx, int64_t rows, float* y, int64_t ldy) {
  static thread_local Scratch<float> interleaved;
  constexpr int64_t kBlock = 256;  // 16 KB of widened weights: stays in L1
  const LinearKernels& kern = kernels();
  const int64_t tiles = (rows + kDenseRows - 1) / kDenseRows;
  float* a = interleaved.room(tiles * kDenseRows * w.padded_k);  // [tile][k][6]
  parallel_for(tiles, [&](int64_t t) {
    static thread_local Scratch<float> gathered;
    float* out = a + t * kDenseRows * w.padded_k;
    float* row = gathered.room(w.padded_k);
    for (int r = 0; r < kDenseRows; ++r) {
      const int64_t index = t * kDenseRows + r;
      if (index < rows) {
        gather_row(w, x + index * ldx, row);
      } else {
        std::fill(row, row + w.padded_k, 0.0f);
      }
      for (int64_t k = 0; k < w.padded_k; ++k) out[k * kDenseRows + r] = row[k];
    }
  });
  each_panels(w, 1, rows, tiles * kDenseRows, y, ldy, [&](int64_t panel, int64_t, float* sums) {
    alignas(64) float b[kBlock * kPanel];
    for (int64_t k0 = 0; k0 < w.padded_k; k0 += kBlock) {
      const int64_t k1 = std::min(w.padded_k, k0 + kBlock);
      kern.widen(w, panel, k0, k1, b);
      for (int64_t t = 0; t < tiles; ++t) {
        kern.dense_tile(a + (t * w.padded_k + k0) * kDenseRows, b, k1 - k0, sums + t * kDenseRows * kPanel);
      }
    }
  });
}

void many_grouped(const PackedLinear& w, const float* x, int64_t ldx, int64_t rows, float* y, int64_t ldy) {
  static thread_local Scratch<int16_t> interleaved;
  static thread_local Scratch<float> scale_buffer, sum_buffer;
  // Unpacked codes of four panels lie in L2, 64 KB of them; each tile of activations passes by all four from L1.
  constexpr int64_t kPanels = 4, kBlock = 512;
  const LinearKernels& kern = kernels();
  const int64_t tiles = (rows + kGroupedRows - 1) / kGroupedRows, groups = w.groups();
  int16_t* a = interleaved.room(tiles * kGroupedRows * w.padded_k);   // [tile][k / 2][6][2]
  float* scales = scale_buffer.room(tiles * kGroupedRows * groups);   // [tile][group][6]
  float* scaled_sums = sum_buffer.room(tiles * kGroupedRows * groups);
  parallel_for(tiles, [&](int64_t t) {
    static thread_local Scratch<float> gathered, row_scales;
    static thread_local Scratch<int16_t> quantized;
    static thread_local Scratch<int32_t> row_sums;
    float* row = gathered.room(w.padded_k);
    int16_t* xq = quantized.room(w.padded_k);
    float* sx = row_scales.room(groups);
    int32_t* total = row_sums.room(groups);
    const int64_t at = t * kGroupedRows;
    for (int r = 0; r < kGroupedRows; ++r) {
      if (at + r < rows) {
        gather_row(w, x + (at + r) * ldx, row);
      } else {
        std::fill(row, row + w.padded_k, 0.0f);
      }
      kern.quantize_row(row, w.padded_k, w.group, xq, sx, total);
      int16_t* out = a + at * w.padded_k + r * 2;
      for (int64_t k = 0; k < w.padded_k; k += 2, out += 2 * kGroupedRows) std::memcpy(out, xq + k, 4);
      for (int64_t g = 0; g < groups; ++g) {
        scales[at * groups + g * kGroupedRows + r] = sx[g];
        scaled_sums[at * groups + g * kGroupedRows + r] = sx[g] * static_cast<float>(total[g]);
      }
    }
  });
  const int64_t block = kBlock / w.group;  // groups
  each_panels(w, kPanels, rows, tiles * kGroupedRows, y, ldy, [&](int64_t first, int64_t count, float* sums) {
    static thread_local Scratch<int16_t> code_buffer;
    static thread_local Scratch<float> head_buffer;
    int16_t* codes = code_buffer.room(kPanels * kBlock * kPanel);
    float *scale = head_buffer.room(2 * kPanels * block * kPanel), *min = scale + kPanels * block * kPanel;
    for (int64_t g = 0; g < groups; g += block) {
      const int64_t here = std::min(groups - g, block);
      for (int64_t p = 0; p < count; ++p) {
        const int64_t head = p * block * kPanel;
        kern.unpack(w, first + p, g, g + here, codes + head * w.group, scale + head, min + head);
      }
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t at = t * kGroupedRows, quantized = at * groups + g * kGroupedRows;
        for (int64_t p = 0; p < count; ++p) {
          const int64_t head = p * block * kPanel;
          kern.grouped_tile({here, w.group, a + quantized * w.group, scales + quantized, scaled_sums + quantized,
                             codes + head * w.group, scale + head, w.aux == Aux::kMins ? min + head : nullptr},
                            sums + (p * tiles * kGroupedRows + at) * kPanel);
        }
      }
    }
  });
}

std::atomic<int> wanted_bits{8};

// How a product is computed; chosen once for all its rows.
struct Way {
  int planes;
  bool bytes;

  Way(const PackedLinear& w, int64_t rows)
      : planes(rows <= kExactRows || activation_bits() == 16 ? 2 : 1),
        bytes(w.grouped() && kernels().bytes && kernels().bytes->serves(w, planes, rows)) {}
  bool many_bytes(int64_t rows) const { return bytes && rows * planes > kByteTileRows; }
};

void product(const PackedLinear& w, Way way, const float* x, int64_t ldx, int64_t rows, float* y, int64_t ldy) {
  if (way.many_bytes(rows)) {
    many_bytes(w, x, ldx, rows, way.planes, false, y, ldy);
  } else if (way.bytes) {
    few_bytes(w, x, ldx, static_cast<int>(rows), way.planes, y, ldy);
  } else if (rows <= kMaxGemvRows) {
    linear_few(w, x, ldx, static_cast<int>(rows), y, ldy);
  } else if (w.grouped()) {
    many_grouped(w, x, ldx, rows, y, ldy);
  } else {
    many_dense(w, x, ldx, rows, y, ldy);
  }
}

// work(first, count) for blocks of rows: bounded scratch, and the activations' block of k (at most 516 KB) stays in L2.
template <class F>
void each_block(int64_t rows, const F& work) {
  constexpr int64_t kRowBlock = 516;
  for (int64_t r = 0; r < rows; r += kRowBlock) work(r, std::min(kRowBlock, rows - r));
}

}  // namespace

bool weight_kind(const std::string& name, WeightKind* kind) {
  static constexpr const char* kNames[] = {"int4", "int5", "int6", "int8", "float32", "float16", "bfloat16"};
  const auto at = std::find(std::begin(kNames), std::end(kNames), name);
  if (at == std::end(kNames)) return false;
  *kind = static_cast<WeightKind>(at - kNames);
  return true;
}

int activation_bits() { return wanted_bits.load(std::memory_order_relaxed); }

void set_activation_bits(int bits) {
  if (bits != 8 && bits != 16) throw std::invalid_argument("activation bits: 8 or 16");
  wanted_bits.store(bits);
}

const LinearKernels& linear_kernels_scalar() {
  static const LinearKernels k{widen_scalar,        dense_tile_scalar, unpack_scalar,
                               grouped_tile_scalar, gemv_scalar,       quantize_row_scalar, nullptr};
  return k;
}

PackedLinear::PackedLinear(WeightKind kind_, Aux aux_, int64_t n_, int64_t k_, int64_t group_)
    : kind(kind_), aux(aux_), n(n_), k(k_), group(group_), data() {
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
  if (grouped()) {
    const CodeLayout layout = layout_of(kind);
    if (group % layout.ks != 0) throw std::invalid_argument("linear: int5 needs groups of a multiple of 32");
    group_bytes = header_bytes(aux) + group / layout.ks * layout.unit_bytes();
  } else {
    group_bytes = group * kPanel * element_bytes(kind);
  }
  panel_bytes = groups() * group_bytes;
  // 64 spare bytes: a prefetching kernel may read one vector past the end.
  data = slice(panels * panel_bytes + 64);
}

int64_t PackedLinear::nbytes() const {
  return panels * panel_bytes + (bias ? n * 4 : 0) + (perm ? k * 4 : 0);
}

void pack_panel(PackedLinear& w, int64_t panel, int64_t rows, const uint8_t* codes, const uint16_t* scales,
                const uint8_t* zeros, const uint16_t* mins) {
  const auto pack = w.kind == WeightKind::kInt4   ? pack_codes<WeightKind::kInt4>
                    : w.kind == WeightKind::kInt5 ? pack_codes<WeightKind::kInt5>
                    : w.kind == WeightKind::kInt6 ? pack_codes<WeightKind::kInt6>
                                                  : pack_codes<WeightKind::kInt8>;
  const int64_t groups = w.groups();
  uint8_t* out = w.panel(panel);
  if (rows < kPanel) std::memset(out, 0, w.panel_bytes);
  for (int64_t c = 0; c < rows; ++c) {
    for (int64_t g = 0; g < groups; ++g) {
      uint8_t* group = out + g * w.group_bytes;
      uint16_t* head = reinterpret_cast<uint16_t*>(group);
      const int64_t at = c * groups + g;
      head[c] = scales[at];
      if (w.aux == Aux::kZeros) head[kPanel + c] = float_to_f16(static_cast<float>(zeros[at]));
      if (w.aux == Aux::kMins) head[kPanel + c] = mins[at];
      pack(codes + at * w.group, w.group, group + header_bytes(w.aux) + c * 4);
    }
  }
}

void pack_grouped(PackedLinear& w, int64_t start, int64_t rows, const uint8_t* codes, const uint16_t* scales,
                  const uint8_t* zeros, const uint16_t* mins) {
  parallel_for((rows + kPanel - 1) / kPanel, [&](int64_t i) {
    const int64_t row = i * kPanel, at = row * w.groups();
    pack_panel(w, start / kPanel + i, std::min<int64_t>(kPanel, rows - row), codes + row * w.k, scales + at,
               zeros ? zeros + at : nullptr, mins ? mins + at : nullptr);
  });
}

void pack_dense(PackedLinear& w, int64_t start, int64_t rows, const void* values, int64_t stride) {
  parallel_for((rows + kPanel - 1) / kPanel, [&](int64_t i) {
    const int64_t row = i * kPanel, count = std::min<int64_t>(kPanel, rows - row);
    uint8_t* panel = w.panel(start / kPanel + i);
    if (count < kPanel || w.k < w.padded_k) std::memset(panel, 0, w.panel_bytes);
    if (element_bytes(w.kind) == 4) {
      transpose(static_cast<const uint32_t*>(values) + row * stride, stride, count, w.k, reinterpret_cast<uint32_t*>(panel));
    } else {
      transpose(static_cast<const uint16_t*>(values) + row * stride, stride, count, w.k, reinterpret_cast<uint16_t*>(panel));
    }
  });
}

void linear(const PackedLinear& w, const float* x, int64_t ldx, int64_t rows, float* y, int64_t ldy) {
  const Way way(w, rows);
  each_block(rows, [&](int64_t r, int64_t count) { product(w, way, x + r * ldx, ldx, count, y + r * ldy, ldy); });
}

void swiglu(const PackedLinear& w, const float* x, int64_t ldx, int64_t rows, float* y, int64_t ldy) {
  static thread_local Scratch<float> buffer;
  const Way way(w, rows);
  each_block(rows, [&](int64_t r, int64_t count) {
    if (way.many_bytes(count) && w.n % (2 * kPanel) == 0) {
      many_bytes(w, x + r * ldx, ldx, count, way.planes, true, y + r * ldy, ldy);
    } else {
      float* gate_up = buffer.room(count * w.n);
      product(w, way, x + r * ldx, ldx, count, gate_up, w.n);
      silu_mul(gate_up, w.n, count, w.n / 2, y + r * ldy, ldy);
    }
  });
}

void embedding(const PackedLinear& w, const int64_t* ids, int64_t count, float* out) {
  parallel_for(count, [&](int64_t i) {
    static thread_local Scratch<float> row;
    const int64_t id = ids[i];
    const int column = static_cast<int>(id % kPanel);
    float* dst = out + i * w.k;
    if (!w.perm) {
      dequantize_column(w, id / kPanel, column, 0, w.k, dst, 1);
      return;
    }
    float* sorted = row.room(w.k);
    dequantize_column(w, id / kPanel, column, 0, w.k, sorted, 1);
    for (int64_t k = 0; k < w.k; ++k) dst[w.perm[k]] = sorted[k];
  });
}

}  // namespace qwen_rt
