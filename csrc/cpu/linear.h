// y = x W^T + bias over packed weights: grouped int4 / int8, float32, float16, bfloat16.
//
// Packing. Outputs n are cut into panels of 16; a panel is one sequential stream over k, so that a weight byte is read
// once and in order. N is padded to 16 and K to the group size (dense: to 8) with zeros.
//   dense     [k][16] elements.
//   grouped   for each group: 16 float16 scales, then (with zeros or mins) 16 float16 of those, then the codes in vectors
//             of 64 bytes, a 32-bit word a column:
//     int4    a vector per 8 k; nibble j of a word holds k = {0,2,4,6,1,3,5,7}[j], so that (word >> 4i) & 0x000f000f is
//             the pair (k=2i, k=2i+1) as two 16-bit integers, and (word >> 4u) & 0x0f0f0f0f holds k = 2u + {0,4,1,5}.
//     int5    per 32 k: the low four bits as int4 (4 vectors), then one vector with the top bits: bit u of its bytes
//             belongs to the bytes (word >> 4 (u % 2)) & 0x0f0f0f0f of low vector u / 2.
//     int6    per 16 k: the low four bits as int4 (2 vectors), then one with the top two bits: bits 2u and 2u + 1 alike.
//     int8    a vector per 4 k; bytes hold k = {0,2,1,3}, code - 128 (signed).
//
// Arithmetic, and what it costs against exact. Integer weights meet integer activations, quantised per row and group with
// step max|x_g| / L (spans of 128 inputs were tried: faster by 4%, and three times the rounding in the logits); products
// and the sums of a group (at most 256) are exact in int32; scales, minimums and the sums over groups are float32:
//     |error| <= sum_g (max|x_g| / 2L) * sum_k |w| + float32 rounding of the K / group partial sums,
//   which are of codes less the implied zero point where that keeps sums small (int8; AVX2's prompts): an offset of that
//   many scales is added to minimums and zero points then.
//   L = 32512 (16 bits) up to kExactRows rows, decoding that is, where reading the weights takes the time anyway;
//   L = 127 (8 bits) for more rows, where the instruction set has byte products for the kind and activation_bits() is 8;
//   L = 32512 otherwise.
//   AVX-512 rounds steps up to powers of 2^(1/4): at most 19% larger, 9% in the mean.
//   AVX2's prompts (8 bits, tiles of 12 rows): two groups of at most 32 inputs share a step; and scales are multiples of a
//   step that the largest of their output has 32767 / parts of (linear_prompt_avx2.h; 1 or 2 parts mostly):
//     |error| <= ... + max_g |s| parts / 65534 * sum_k |(code - implied zero) x|.
// Inputs whose step's maximum is below 1e-34 count as zeros. NaN or infinity (AVX-512: inputs of 2^110 and more too)
// makes the row's outputs NaN.
//   dense     weights as they are, float32 FMA over k:  |error| <= K * 2^-24 * sum |x w|.
// Few rows stream the packed panel once; for more rows a block of it stays in L1 while they pass by, byte products
// unpacking it in registers each time, other grouped and dense kinds once, into scratch.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace qwen_rt {

enum class WeightKind { kInt4, kInt5, kInt6, kInt8, kFloat32, kFloat16, kBFloat16 };
enum class Aux { kNone, kZeros, kMins };

// "int4" .. "int8", "float32", "float16", "bfloat16"; false for another name.
bool weight_kind(const std::string& name, WeightKind* kind);

// Bytes of an element of a dense kind.
constexpr int64_t element_bytes(WeightKind kind) { return kind == WeightKind::kFloat32 ? 4 : 2; }

// The zero point of codes that come without zeros or minimums.
constexpr int implied_zero(WeightKind kind) {
  return kind == WeightKind::kInt4 ? 8 : kind == WeightKind::kInt5 ? 16 : kind == WeightKind::kInt6 ? 32 : 128;
}

// How the codes of a kind are laid out: units of `ks` k, each `low` vectors of low nibbles (int8: of bytes), then one of
// the `top` bits above them.
struct CodeLayout {
  int ks, low, top;
  constexpr int64_t unit_bytes() const { return 64 * (low + (top ? 1 : 0)); }
};

constexpr CodeLayout layout_of(WeightKind kind) {
  return kind == WeightKind::kInt4   ? CodeLayout{8, 1, 0}
         : kind == WeightKind::kInt5 ? CodeLayout{32, 4, 1}
         : kind == WeightKind::kInt6 ? CodeLayout{16, 2, 2}
                                     : CodeLayout{4, 1, 0};
}

constexpr int kPanel = 16;
constexpr int kMaxGemvRows = 16;
constexpr int kExactRows = 4;        // rows whose activations always have 16 bits
constexpr float kSteps16 = 32512.0f;  // L above: 127 * 256, so that the upper of two bytes has room for a carry
constexpr float kSteps8 = 127.0f;
constexpr float kTiny = 1e-34f;  // a step's inputs below it count as zeros: its inverse would not be finite

// Bytes of a packed group before its codes.
constexpr int64_t header_bytes(Aux aux) { return aux == Aux::kNone ? 32 : 64; }

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
  std::shared_ptr<uint8_t> data;
  std::unique_ptr<float[]> bias;     // n, or null
  std::unique_ptr<int32_t[]> perm;   // k: column j multiplies x[perm[j]]; or null

  int64_t groups() const { return padded_k / group; }
  int64_t nbytes() const;
  bool grouped() const { return kind <= WeightKind::kInt8; }
  const uint8_t* panel(int64_t p) const { return data.get() + p * panel_bytes; }
  uint8_t* panel(int64_t p) { return data.get() + p * panel_bytes; }
};

// Bits of the activations that more than kExactRows rows of integer weights meet: 8 (default) or 16, for the process.
int activation_bits();
void set_activation_bits(int bits);

// Rows [start, start + rows) of a grouped weight; start a multiple of 16, rows too unless they end at n. codes [rows, k]
// (row stride in elements), scales [rows, k / group] and aux alike: float16 mins, or uint8 zeros. All contiguous.
void pack_grouped(PackedLinear& w, int64_t start, int64_t rows, const uint8_t* codes, const uint16_t* scales,
                  const uint8_t* zeros, const uint16_t* mins);
// One panel of them, of which rows <= 16 are there.
void pack_panel(PackedLinear& w, int64_t panel, int64_t rows, const uint8_t* codes, const uint16_t* scales,
                const uint8_t* zeros, const uint16_t* mins);
// As pack_grouped for dense weights: values [rows, k] of the kind's own type, row stride in elements.
void pack_dense(PackedLinear& w, int64_t start, int64_t rows, const void* values, int64_t stride);

// y [rows, n] (row stride ldy), x [rows, k] (row stride ldx), float32.
void linear(const PackedLinear& w, const float* x, int64_t ldx, int64_t rows, float* y, int64_t ldy);

// silu_mul (silu.h) of that product: W is gate rows, then as many up rows; y [rows, n / 2]. The same values, without the
// product's way through memory where rows are many.
void swiglu(const PackedLinear& w, const float* x, int64_t ldx, int64_t rows, float* y, int64_t ldy);

// out [count, k] = rows ids[i] of W as float32 (perm undone). Every id must be in [0, n).
void embedding(const PackedLinear& w, const int64_t* ids, int64_t count, float* out);

// --- what an instruction set provides -------------------------------------------------------------------------------
constexpr int kDenseRows = 6;  // rows of a register tile, dense
constexpr int kGroupedRows = 6;  // grouped, words

struct GemvInput {
  const float* x;       // [rows][padded_k] (dense kinds)
  const int16_t* xq;    // [rows][padded_k]
  const float* scale;   // [rows][groups]
  const int32_t* sum;   // [rows][groups]
};

// kGroupedRows rows of quantised activations against one panel over `groups` groups.
struct GroupedTile {
  int64_t groups, group;
  const int16_t* x;         // [k / 2][kGroupedRows][2]
  const float* scale;       // [groups][kGroupedRows]
  const float* scaled_sum;  // [groups][kGroupedRows]: scale times the sum of x
  const int16_t* codes;     // [k / 2][16][2]
  const float* w_scale;     // [groups][16]
  const float* w_min;       // [groups][16], or null
};

// Activations of a tile of R rows as bytes. A 16-bit activation is two rows, the upper byte (256 times the scale) and the
// lower, both signed, whose products are summed at the end.
struct ByteRows {
  int8_t* x;          // [k / 4][R][4], k in the order of the packing
  float* scale;       // [groups][R]
  int32_t* start;     // [groups][R]: minus the implied zero point times the sum of x
  float* scaled_sum;  // [groups][R]: scale times the sum of x
  // What some instruction sets make of it besides. AVX2: where the sums of each part of a group start, [groups][parts][R]
  // (WholeTiles::parts). AVX-512 takes the scale into the sum, each [groups][R]: where the sum starts, the float that its
  // bits then are when there is nothing to add, and which scales of the weight are left to multiply by.
  struct Fold {
    int32_t* start;
    float* zero;
    int32_t* root;
  } fold;
};

constexpr int kByteTileRows = 12;

// ByteRows::start of a sum; of any sum, those that NaN left behind included.
constexpr int32_t start_of(WeightKind kind, int32_t sum) {
  return static_cast<int32_t>(0u - static_cast<uint32_t>(implied_zero(kind)) * static_cast<uint32_t>(sum));
}

// Whole tiles of one plane, where codes are unpacked once for all of them.
struct WholeTiles {
  // Of each group, the starts of its sums in ByteRows::fold, each of R.
  int64_t (*parts)(const PackedLinear& w);
  // Bytes of `groups` unpacked groups of a panel.
  int64_t (*bytes)(const PackedLinear& w, int64_t groups);
  void (*unpack)(const PackedLinear& w, int64_t panel, int64_t g0, int64_t g1, uint8_t* out);
  // As ByteKernels::quantize for kByteTileRows rows and all groups, laid out for tile below.
  void (*quantize)(const PackedLinear& w, const float* const* x, const ByteRows& out);
  // As ByteKernels::tile, of groups as they were unpacked. `sums` are its own until all groups have come, whose product is
  // then written to y.
  void (*tile)(const PackedLinear& w, const uint8_t* unpacked, int64_t g0, int64_t g1, const ByteRows& in, float* sums,
               float* y, int64_t ldy);
};

// Products of weight bytes with signed activation bytes.
struct ByteKernels {
  // Whether these kernels are the ones for `rows` rows of activations of `planes` bytes each.
  bool (*serves)(const PackedLinear& w, int planes, int64_t rows);
  // Groups [g0, g1) of rows x[0 .. rows) of length padded_k as a tile of rows * planes rows (planes 1 or 2).
  void (*quantize)(const PackedLinear& w, const float* const* x, int rows, int planes, int64_t g0, int64_t g1,
                   const ByteRows& out);
  // Groups [g0, g1) of a panel times `rows` <= kByteTileRows rows (in begins at g0), added to the sums of the groups
  // before g0 [rows][16], into y: rows of 16, ldy apart. g0 = 0: there are none; y may be sums (ldy 16).
  void (*tile)(const PackedLinear& w, int64_t panel, int64_t g0, int64_t g1, const ByteRows& in, int rows,
               const float* sums, float* y, int64_t ldy);
  // A panel times one row of two planes, planes added: y [16]. Null: tile does it.
  void (*row)(const PackedLinear& w, int64_t panel, const ByteRows& in, float* y) = nullptr;
  // Null: tiles unpack in registers, which costs no more.
  const WholeTiles* whole = nullptr;
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
  const ByteKernels* bytes;  // or null
};

const LinearKernels& linear_kernels_scalar();
const LinearKernels& linear_kernels_avx2();
const LinearKernels& linear_kernels_avx512();
const LinearKernels& linear_kernels_neon();

}  // namespace qwen_rt
