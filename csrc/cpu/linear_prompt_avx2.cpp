// Six rows times a panel of unpacked codes, bytes by bytes or words by words: what prompts are made of.
//
// Every group is one piece of asm. Its 12 sums, two vectors of codes and two temporaries are the 16 registers, and what a
// compiler moves between them, or to memory and back, takes a tenth of the time. ymm0 - ymm11 are sums, columns 0-7 and
// 8-15 of each row; ymm12 and ymm13 the codes that a step takes, 4 k as bytes or 2 as words, at the end of a part or a group
// its scales; ymm14 and ymm15 temporaries.
#if defined(__x86_64__)

#include "linear_prompt_avx2.h"

namespace qwen_rt {
namespace {

#define LINE(...) __VA_ARGS__ "\n\t"

// Sums of 16 bits wrap around, and that is harmless where the sum of all that was added fits: a part of a unit starts at
// minus the zero point times its activations, so that it ends as a sum of centred codes, which are half as large, and twice
// as many fit.

// Of one row: the registers of its sums, and 4 * its number. A sum begins, or is added to: products first, then sums, for
// Zen 3 is faster so than with each sum behind its product.
#define BEGIN(multiply, x, lo, hi)                           \
  LINE("vpbroadcastd " x "(%[x]), %%ymm" #hi)                \
  LINE(multiply " %%ymm" #hi ", %%ymm12, %%ymm" #lo)         \
  LINE(multiply " %%ymm" #hi ", %%ymm13, %%ymm" #hi)
#define ADD(multiply, sum, x, lo, hi)                        \
  LINE("vpbroadcastd " x "(%[x]), %%ymm14")                  \
  LINE(multiply " %%ymm14, %%ymm12, %%ymm15")                \
  LINE(multiply " %%ymm14, %%ymm13, %%ymm14")                \
  LINE(sum " %%ymm15, %%ymm" #lo ", %%ymm" #lo)              \
  LINE(sum " %%ymm14, %%ymm" #hi ", %%ymm" #hi)
#define BEGIN_BYTES_ROW(lo, hi, at)                          \
  LINE("vpbroadcastd " #at "(%[start]), %%ymm14")            \
  BEGIN("vpmaddubsw", #at, lo, hi)                           \
  LINE("vpaddw %%ymm14, %%ymm" #lo ", %%ymm" #lo)            \
  LINE("vpaddw %%ymm14, %%ymm" #hi ", %%ymm" #hi)
#define ADD_BYTES_ROW(lo, hi, at) ADD("vpmaddubsw", "vpaddw", #at, lo, hi)
#define BEGIN_WORDS_ROW(lo, hi, at) BEGIN("vpmaddwd", #at, lo, hi)
#define ADD_WORDS_ROW(lo, hi, at) ADD("vpmaddwd", "vpaddd", #at, lo, hi)
// Rows of kWordRow words.
#define BEGIN_LONG_ROW(lo, hi, at) BEGIN("vpmaddwd", "32*" #at, lo, hi)
#define ADD_LONG_ROW(lo, hi, at) ADD("vpmaddwd", "vpaddd", "32*" #at, lo, hi)
#define WIDEN_ROW(lo, hi, at)                                \
  LINE("vpmaddwd %%ymm12, %%ymm" #lo ", %%ymm" #lo)          \
  LINE("vpmaddwd %%ymm13, %%ymm" #hi ", %%ymm" #hi)
// The sums of a unit's parts so far.
#define KEEP_ROW(lo, hi, at)                                 \
  LINE("vmovdqa %%ymm" #lo ", 16*" #at "(%[sums])")          \
  LINE("vmovdqa %%ymm" #hi ", 32+16*" #at "(%[sums])")
#define ADD_KEPT_ROW(lo, hi, at)                             \
  LINE("vpaddd 16*" #at "(%[sums]), %%ymm" #lo ", %%ymm" #lo) \
  LINE("vpaddd 32+16*" #at "(%[sums]), %%ymm" #hi ", %%ymm" #hi)
// Sums as floats, and the activations' scale in ymm14.
#define FLOATS_ROW(lo, hi, at)                               \
  LINE("vcvtdq2ps %%ymm" #lo ", %%ymm" #lo)                  \
  LINE("vbroadcastss " #at "(%[x_scale]), %%ymm14")          \
  LINE("vcvtdq2ps %%ymm" #hi ", %%ymm" #hi)
#define X_SCALE_ROW(lo, hi, at)                              \
  FLOATS_ROW(lo, hi, at)                                     \
  LINE("vmulps %%ymm14, %%ymm" #lo ", %%ymm" #lo)            \
  LINE("vmulps %%ymm14, %%ymm" #hi ", %%ymm" #hi)
// Sums times those registers, plus y.
#define PLUS_Y_ROW(by_lo, by_hi, lo, hi, at)                            \
  LINE("vfmadd213ps 16*" #at "(%[y]), %%ymm" #by_lo ", %%ymm" #lo)      \
  LINE("vfmadd213ps 32+16*" #at "(%[y]), %%ymm" #by_hi ", %%ymm" #hi)
#define SCALE_ROW(lo, hi, at) X_SCALE_ROW(lo, hi, at) PLUS_Y_ROW(12, 13, lo, hi, at)
// The same where widening has multiplied by the weights' scales.
#define STEP_ROW(lo, hi, at) FLOATS_ROW(lo, hi, at) PLUS_Y_ROW(14, 14, lo, hi, at)
#define MIN_ROW(lo, hi, at)                                  \
  LINE("vbroadcastss " #at "(%[x_sum]), %%ymm14")            \
  LINE("vfmadd231ps (%[min]), %%ymm14, %%ymm" #lo)           \
  LINE("vfmadd231ps 32(%[min]), %%ymm14, %%ymm" #hi)
// Of the second group of a unit.
#define SECOND_MIN_ROW(lo, hi, at)                           \
  LINE("vbroadcastss " #at "(%[x_sum],%[step]), %%ymm14")    \
  LINE("vfmadd231ps 64(%[min]), %%ymm14, %%ymm" #lo)         \
  LINE("vfmadd231ps 96(%[min]), %%ymm14, %%ymm" #hi)
#define WRITE_ROW(lo, hi, at)                                \
  LINE("vmovups %%ymm" #lo ", 16*" #at "(%[y])")             \
  LINE("vmovups %%ymm" #hi ", 32+16*" #at "(%[y])")

#define SET(lo, hi, at)                                      \
  X_SCALE_ROW(lo, hi, at)                                    \
  LINE("vmulps %%ymm12, %%ymm" #lo ", %%ymm" #lo)            \
  LINE("vmulps %%ymm13, %%ymm" #hi ", %%ymm" #hi)            \
  WRITE_ROW(lo, hi, at)
// The end of a group of words, with and without minimums.
#define FINISH(lo, hi, at) SCALE_ROW(lo, hi, at) WRITE_ROW(lo, hi, at)
#define FINISH_MIN(lo, hi, at) SCALE_ROW(lo, hi, at) MIN_ROW(lo, hi, at) WRITE_ROW(lo, hi, at)
// The end of a unit, by the number of its minimums.
#define END_0(lo, hi, at) STEP_ROW(lo, hi, at) WRITE_ROW(lo, hi, at)
#define END_1(lo, hi, at) STEP_ROW(lo, hi, at) MIN_ROW(lo, hi, at) WRITE_ROW(lo, hi, at)
#define END_2(lo, hi, at) STEP_ROW(lo, hi, at) MIN_ROW(lo, hi, at) SECOND_MIN_ROW(lo, hi, at) WRITE_ROW(lo, hi, at)

#define ROWS(ROW) ROW(0, 1, 0) ROW(2, 3, 4) ROW(4, 5, 8) ROW(6, 7, 12) ROW(8, 9, 16) ROW(10, 11, 20)

#define STEP(ROW, i)                              \
  LINE("vmovdqu 64*" #i "(%[codes]), %%ymm12")    \
  LINE("vmovdqu 32+64*" #i "(%[codes]), %%ymm13") \
  ROWS(ROW)                                       \
  LINE("add %[step], %[x]")
#define BYTES_4 STEP(BEGIN_BYTES_ROW, 0) STEP(ADD_BYTES_ROW, 1) STEP(ADD_BYTES_ROW, 2) STEP(ADD_BYTES_ROW, 3)
#define BYTES_8 BYTES_4 STEP(ADD_BYTES_ROW, 4) STEP(ADD_BYTES_ROW, 5) STEP(ADD_BYTES_ROW, 6) STEP(ADD_BYTES_ROW, 7)
#define BYTES_16                                                                                                      \
  BYTES_8 STEP(ADD_BYTES_ROW, 8) STEP(ADD_BYTES_ROW, 9) STEP(ADD_BYTES_ROW, 10) STEP(ADD_BYTES_ROW, 11)              \
  STEP(ADD_BYTES_ROW, 12) STEP(ADD_BYTES_ROW, 13) STEP(ADD_BYTES_ROW, 14) STEP(ADD_BYTES_ROW, 15)

#define HEAD                              \
  LINE("vmovups (%[head]), %%ymm12")      \
  LINE("vmovups 32(%[head]), %%ymm13")
// The quads of a part, to 32 bits.
#define PART(n)                        \
  BYTES_##n                            \
  LINE("add $64*" #n ", %[codes]")     \
  LINE("add %[step], %[start]")        \
  HEAD ROWS(WIDEN_ROW)

#define ASM(code, ...)                                                                                          \
  __asm__ volatile(code                                                                                         \
                   : [codes] "+r"(codes), [x] "+r"(x), [count] "+r"(steps), [start] "+r"(start)                 \
                   : [step] "r"(step), [y] "r"(y), [head] "r"(head), [min] "r"(min), [x_scale] "r"(x_scale),    \
                     __VA_ARGS__                                                                                \
                   : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",   \
                     "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "memory", "cc")
#define ASM_BYTES(code) ASM(code, [x_sum] "r"(x_sum), [sums] "r"(sums))
#define UNIT(n, END_ROW)                                            \
  if constexpr (kOne) {                                             \
    ASM_BYTES(PART(n) ROWS(END_ROW));                               \
  } else {                                                          \
    ASM_BYTES(PART(n) ROWS(KEEP_ROW)                                \
              LINE("sub $2, %[count]")                              \
              LINE("jle 2f")                                        \
              "1:\n\t" PART(n) ROWS(ADD_KEPT_ROW) ROWS(KEEP_ROW)    \
              LINE("sub $1, %[count]")                              \
              LINE("jg 1b")                                         \
              "2:\n\t" PART(n) ROWS(ADD_KEPT_ROW) ROWS(END_ROW));   \
  }
#define UNIT_MINS(n)          \
  if constexpr (kMins == 0) { \
    UNIT(n, END_0)            \
  } else if constexpr (kMins == 1) { \
    UNIT(n, END_1)            \
  } else {                    \
    UNIT(n, END_2)            \
  }
#define TWO_STEPS(FIRST_ROW, ROW) STEP(FIRST_ROW, 0) STEP(ROW, 1) LINE("add $128, %[codes]")
#define ASM_WORDS(BEGIN_ROW, ADD_ROW, FINISH_ROW) \
  ASM(TWO_STEPS(BEGIN_ROW, ADD_ROW)               \
      "1:\n\t" TWO_STEPS(ADD_ROW, ADD_ROW)        \
      LINE("sub $2, %[count]")                    \
      LINE("jg 1b") HEAD ROWS(FINISH_ROW), [x_sum] "r"(x_sum))

template <int kQuads, bool kOne, int kMins>
void units(const PackedLinear& w, const uint8_t* head, int64_t count, const ByteRows& in, int64_t stride, float* y) {
  alignas(32) int32_t sums[kPromptRows * kPanel];
  const Unit unit = unit_of(w);
  const int8_t* x = in.x;
  const float *x_scale = in.scale, *x_sum = in.scaled_sum;
  const int64_t step = 4 * stride, header = unit_header(w, unit), groups = unit.groups * stride;
  const int64_t starts = whole_parts_avx2(w) * groups;
  for (int64_t u = 0; u < count; ++u, x_scale += groups, x_sum += groups) {
    const uint8_t *min = head + 64, *codes = head + header;
    const int32_t* start = in.fold.start + u * starts;
    int64_t steps = unit.parts;
    if constexpr (kQuads == 16) {
      UNIT_MINS(16)
    } else if constexpr (kQuads == 8) {
      UNIT_MINS(8)
    } else {
      UNIT_MINS(4)
    }
    head = codes;
  }
}

template <int kQuads, bool kOne>
auto units_of(const PackedLinear& w, const Unit& unit) {
  return w.aux == Aux::kNone ? units<kQuads, kOne, 0> : unit.groups == 1 ? units<kQuads, kOne, 1> : units<kQuads, kOne, 2>;
}

}  // namespace

void prompt_rows_avx2(const PackedLinear& w, const uint8_t* unpacked, int64_t count, const ByteRows& in, int64_t stride,
                      float* y) {
  const Unit unit = unit_of(w);
  const bool one = unit.parts == 1;
  const auto kernel = unit.quads == 16  ? (one ? units_of<16, true>(w, unit) : units_of<16, false>(w, unit))
                      : unit.quads == 8 ? (one ? units_of<8, true>(w, unit) : units_of<8, false>(w, unit))
                                        : (one ? units_of<4, true>(w, unit) : units_of<4, false>(w, unit));
  kernel(w, unpacked, count, in, stride, y);
}

void grouped_tile_avx2(const GroupedTile& t, float* y) {
  const int16_t *x = t.x, *codes = t.codes;
  const float *head = t.w_scale, *min = t.w_min, *x_scale = t.scale, *x_sum = t.scaled_sum;
  const int32_t* start = nullptr;
  constexpr int64_t step = 4 * kGroupedRows;
  for (int64_t g = 0; g < t.groups; ++g, head += kPanel, x_scale += kGroupedRows, x_sum += kGroupedRows) {
    int64_t steps = t.group / 2 - 2;
    if (min) {
      ASM_WORDS(BEGIN_WORDS_ROW, ADD_WORDS_ROW, FINISH_MIN);
      min += kPanel;
    } else {
      ASM_WORDS(BEGIN_WORDS_ROW, ADD_WORDS_ROW, FINISH);
    }
  }
}

void word_products_avx2(const int16_t* x, const int16_t* codes, int64_t k, const float* x_scale, const float* head,
                        float* y) {
  const float *min = nullptr, *x_sum = nullptr;
  const int32_t* start = nullptr;
  constexpr int64_t step = 4 * kPromptRows;
  int64_t steps = k / 2 - 2;
  ASM_WORDS(BEGIN_WORDS_ROW, ADD_WORDS_ROW, SET);
}

void add_word_products_avx2(const int16_t* x, const int16_t* codes, int64_t k, const float* x_scale, const float* head,
                            float* y) {
  static_assert(4 * 32 == kWordRow * sizeof(int16_t));
  const float *min = nullptr, *x_sum = nullptr;
  const int32_t* start = nullptr;
  constexpr int64_t step = 4;
  int64_t steps = k / 2 - 2;
  ASM_WORDS(BEGIN_LONG_ROW, ADD_LONG_ROW, FINISH);
}

}  // namespace qwen_rt

#endif
