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
//   few rows (<= kMaxGemvRows): x is quantised per row and group to 16-bit integers (step max|x_g|/32767), products and
//     group sums are exact in int32 (groups of at most 256 at 8 bits), scales and sums over groups in float32.
//     |error| <= sum_g (max|x_g| / 65534) * sum_k |w| + float32 rounding of the K/group partial sums.
//   many rows: weights are dequantised to float32 (exact up to one rounding), float32 FMA over k in order:
//     |error| <= K * 2^-24 * sum |x w|.
// Dense weights are used as they are with float32 accumulation in both cases.
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
struct LinearKernels {
  // Panel columns as float32: out[k - k0][16] for k in [k0, k1), multiples of the group (dense: 8).
  void (*dequantize)(const PackedLinear& w, int64_t panel, int64_t k0, int64_t k1, float* out);
  // y[r][16] (stride ldy) += sum_k a[k][r] * b[k][16], r < rows <= kTileRows; a is packed [k][kTileRows].
  void (*tile)(const float* a, const float* b, int64_t kc, int rows, float* y, int64_t ldy);
  // One panel, 1 .. kMaxGemvRows rows of quantised (grouped kinds) or float (dense) activations; y [rows][16].
  void (*gemv)(const PackedLinear& w, int64_t panel, const struct GemvInput& in, int rows, float* y);
  // Quantises one row of length padded_k: xq int16, per group scale and integer sum.
  void (*quantize_row)(const float* x, int64_t padded_k, int64_t group, int16_t* xq, float* scale, int32_t* sum);
};

constexpr int kTileRows = 6;

struct GemvInput {
  const float* x;        // [rows][padded_k] (dense kinds)
  const int16_t* xq;     // [rows][padded_k]
  const float* scale;    // [rows][groups]
  const int32_t* sum;    // [rows][groups]
};

const LinearKernels& linear_kernels_scalar();
const LinearKernels& linear_kernels_avx2();

}  // namespace qwen_rt
