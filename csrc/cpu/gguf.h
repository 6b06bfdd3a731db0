// GGUF's strings, and the blocks of its quantised tensors -> codes, scales and minimums of a RawLinear
// (qwen_rt/quant/formats.py).
//
// The layouts, the formulas and what is exact are those of qwen_rt/checkpoint/gguf_dequant.py, whose decoders define the
// result: this one gives the same bytes.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "linear.h"

namespace qwen_rt {

struct GgufType {
  const char* name;
  int64_t block, bytes, group;  // elements and bytes of a block, elements of a group
  bool has_mins;
  WeightKind kind;
  void (*decode)(const uint8_t* block, uint8_t* codes, uint16_t* scales, uint16_t* mins);
};

// Null when there is no such quantised type.
const GgufType* gguf_type(const char* name);

// codes [blocks * block], scales and mins (null without) [blocks * block / group].
void gguf_decode(const GgufType& type, const uint8_t* data, int64_t blocks, uint8_t* codes, uint16_t* scales,
                 uint16_t* mins);

// What one thread makes of blocks of a row or of several: memory that serves again.
struct GgufDecoded {
  std::vector<uint8_t> codes;
  std::vector<uint16_t> scales, mins;  // mins: empty without

  // Whether all scales and minimums are finite.
  bool decode(const GgufType& type, const uint8_t* data, int64_t blocks);
};

// Whether blocks of the type are what a grouped weight holds.
bool gguf_fits(const GgufType& type, const PackedLinear& w);

// Rows [start, start + rows) of a weight that the type fits; start a multiple of 16, rows too unless they end at n. An open
// file has their blocks from `offset` on.
struct GgufRows {
  PackedLinear* w;
  int64_t start, rows;
  const GgufType* type;
  int file;
  int64_t offset;
};

// Packs each of them as pack_grouped does; threads read what they pack. The number of the first that cannot be read or has
// a scale or minimum that is not finite (what comes after it may be packed or not); their count where there is none.
int64_t gguf_pack(const std::vector<GgufRows>& parts);

// The string at the start of `data`, 64 bits of length before it; false when it does not lie there whole.
bool gguf_string(std::string_view data, std::string_view* text);

}  // namespace qwen_rt
