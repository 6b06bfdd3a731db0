// y = x W^T + bias over packed weights: grouped int4 / int8, float32, float16, bfloat16.
//
// Packing. Outputs n are cut into panels of 16; a panel is one sequential stream over k, so that a weight byte is read
// once and in order. N is padded to 16 and K to the group size (dense: to 8) with zeros.
//   dense     [k][16] elements.
//   grouped   for each group: 16 float16 scales, then (with zeros or mins) 16 float16 of those, then the codes:
//     int4    per 8 k: 16 words of 32 bits, one a column; nibble j of a word holds k = {0,2,4,6,1,3,5,7}[j], so that
//             (word >> 4i) & 0x000f000f is the pair (k=2i, k=2i+1) as two 16-bit integers.
//     int8    per 4 k: 16 words of 32 bits; bytes hold k = {0,2,1,3}, code - 128 (signed).
//
// Arithmetic, and what it costs against exact:
//   grouped   x is quantised per row and group to 16-bit integers (step max|x_g| / 32767); products and group sums are
//             exact in int32 (groups of at most 256), scales, minimums and sums over groups float32.
//     |error| <= sum_g (max|x_g| / 65534) * sum_k |w| + float32 rounding of the K / group partial sums.
//   dense     weights as they are, float32 FMA over k:  |error| <= K * 2^-24 * sum |x w|.
// Few rows (<= kMaxGemvRows) stream the packed panel once; more rows meet a block of it unpacked into L1.
#pragma once

#include <cstdint>
#include <memory>

namespace qwen_rt {

enum class WeightKind { kInt4, kInt8, kFloat32, kFloat16, kBFloat16 };
enum class Aux { kNone, kZeros, kMins };

constexpr int kPanel = 16;
constexpr int kMaxGemvRows = 16;

struct PackedLinear {
  PackedLinear(WeightKind kind, Aux aux, int64_t n, int64_t k, int64_t group);

  WeightKind kind;
  Aux aux;
  int64_t n, k;
  int64_t group;         // grouped kinds; 8 for dense (padding unit)
  int64_t padded_k;      // multiple of group
  int64_t panels;        // ceil(n / 16)
  int64_t group_bytes;   // bytes of one group of one panel (dense: of 8 k)
  int64_t panel_bytes;
  std::unique_ptr<uint8_t[], void (*)(void*)> data;
  std::unique_ptr<float[]> bias;     // n, or null
  std::unique_ptr<int32_t[]> perm;   // k: column j multiplies x[perm[j]]; or null

  int64_t groups() const { return padded_k / group; }
  int64_t nbytes() const;
  bool grouped() const { return kind == WeightKind::kInt4 || kind == WeightKind::kInt8; }
  const uint8_t* panel(int64_t p) const { return data.get() + p * panel_bytes; }
  uint8_t* panel(int64_t p) { return data.get() + p * panel_bytes; }
};

// Rows [start, start + rows) of a grouped weight; start a multiple of 16, rows too unless they end at n. codes [rows, k]
// (row stride in elements), scales [rows, k / group] and aux alike: float16 mins, or uint8 zeros. All contiguous.
void pack_grouped(PackedLinear& w, int64_t start, int64_t rows, const uint8_t* codes, const uint16_t* scales,
                  const uint8_t* zeros, const uint16_t* mins);
// The same for dense weights: values [rows, k] of the kind's own type, row stride in elements.
void pack_dense(PackedLinear& w, int64_t start, int64_t rows, const void* values, int64_t stride);

// y [rows, n] (row stride ldy), x [rows, k] (row stride ldx), float32.
void linear(const PackedLinear& w, const float* x, int64_t ldx, int64_t rows, float* y, int64_t ldy);

// out [count, k] = rows ids[i] of W as float32 (perm undone). Every id must be in [0, n).
void embedding(const PackedLinear& w, const int64_t* ids, int64_t count, float* out);

// --- what an instruction set provides -------------------------------------------------------------------------------
constexpr int kDenseRows = 6;  // rows of a register tile, dense
constexpr int kGroupedRows = 4;

struct GemvInput {
  const float* x;       // [rows][padded_k] (dense kinds)
  const int16_t* xq;    // [rows][padded_k]
  const float* scale;   // [rows][groups]
  const int32_t* sum;   // [rows][groups]
};

// kGroupedRows rows of quantised activations against one panel over `groups` groups.
struct GroupedTile {
  int64_t groups, group;
  const int16_t* x;     // [k / 2][kGroupedRows][2]
  const float* scale;   // [groups][kGroupedRows]
  const int32_t* sum;   // [groups][kGroupedRows]
  const int16_t* codes; // [k / 2][16][2]
  const float* w_scale; // [groups][16]
  const float* w_min;   // [groups][16], or null
};

struct LinearKernels {
  // Dense panel columns as float32: out[k - k0][16] for k in [k0, k1), multiples of 8.
  void (*widen)(const PackedLinear& w, int64_t panel, int64_t k0, int64_t k1, float* out);
  // y[r][16] += sum_k a[k][r] * b[k][16], r < kDenseRows; a is [k][kDenseRows].
  void (*dense_tile)(const float* a, const float* b, int64_t kc, float* y);
  // Groups [g0, g1) of a panel: codes minus zero point as 16-bit pairs, scales and minimums (the latter with kMins only).
  void (*unpack)(const PackedLinear& w, int64_t panel, int64_t g0, int64_t g1, int16_t* codes, float* scale, float* min);
  // y[r][16] += the tile's product, r < kGroupedRows.
  void (*grouped_tile)(const GroupedTile& tile, float* y);
  // One panel, 1 .. kMaxGemvRows rows of quantised (grouped kinds) or float (dense) activations; y [rows][16].
  void (*gemv)(const PackedLinear& w, int64_t panel, const GemvInput& in, int rows, float* y);
  // Quantises one row of length padded_k: xq int16, per group scale and integer sum. NaN or infinity: a NaN scale.
  void (*quantize_row)(const float* x, int64_t padded_k, int64_t group, int16_t* xq, float* scale, int32_t* sum);
};

const LinearKernels& linear_kernels_scalar();
const LinearKernels& linear_kernels_avx2();

}  // namespace qwen_rt
