#include "gptq.h"

#include <algorithm>
#include <cstring>

#include "file.h"
#include "half.h"
#include "memory.h"
#include "parts.h"

namespace qwen_rt {
namespace {

// A word of the file holds the inputs that a word of the panel holds, in another order (linear.h).
template <WeightKind kKind>
uint32_t reordered(uint32_t word) {
  if constexpr (kKind == WeightKind::kInt8) {
    return ((word & 0xff0000ff) | (word << 8 & 0xff0000) | (word >> 8 & 0xff00)) ^ 0x80808080;
  } else {
    const auto every_second = [](uint32_t nibbles) {  // of eight nibbles the even ones, side by side
      const uint32_t bytes = (nibbles & 0x000f000f) | (nibbles >> 4 & 0x00f000f0);
      return (bytes & 0xff) | (bytes >> 8 & 0xff00);
    };
    return every_second(word) | every_second(word >> 4) << 16;
  }
}

// A panel's words of a group: `in` has rows of `stride`.
template <WeightKind kKind>
void pack_words(const uint32_t* in, int64_t stride, int count, int64_t vectors, uint8_t* out) {
  for (int64_t v = 0; v < vectors; ++v, in += stride, out += 64) {
    uint32_t packed[kPanel];
    if (count == kPanel) {
      for (int c = 0; c < kPanel; ++c) packed[c] = reordered<kKind>(in[c]);
    } else {
      for (int c = 0; c < kPanel; ++c) packed[c] = c < count ? reordered<kKind>(in[c]) : 0;
    }
    std::memcpy(out, packed, 64);
  }
}

// The scales and zero points of a group; false when one is not finite.
bool pack_header(const GptqWords& words, int64_t column, int count, int64_t group, uint8_t* out) {
  uint16_t head[2 * kPanel] = {};
  const uint16_t* scales = words.scales + words.source[group] * words.scales_stride + column;
  std::copy(scales, scales + count, head);
  if (words.zeros) {
    const uint8_t* zeros = words.zeros + words.source[group] * words.zeros_stride + column;
    for (int c = 0; c < count; ++c) head[kPanel + c] = float_to_f16(static_cast<float>(zeros[c]));
  }
  std::memcpy(out, head, words.zeros ? sizeof(head) : sizeof(head) / 2);
  return all_finite<uint16_t>(head, kPanel, 0x7c00);
}

}  // namespace

bool gptq_fits(const PackedLinear& w, bool zeros) {
  return (w.kind == WeightKind::kInt4 || w.kind == WeightKind::kInt8) && w.k == w.padded_k &&
         w.aux == (zeros ? Aux::kZeros : Aux::kNone);
}

int64_t gptq_pack(const std::vector<GptqWords>& parts) {
  constexpr int64_t kTaskBytes = 1 << 19;  // of words, read at a time, a row of them by itself
  constexpr int64_t kRun = 8;              // panels: a row of words is used 512 bytes at a time
  const auto word_rows = [](const GptqWords& part) { return part.w->k / layout_of(part.w->kind).ks; };
  const auto step = [&](const GptqWords& part) {
    return std::max<int64_t>(1, kTaskBytes / (word_rows(part) * kRun * kPanel * 4)) * kRun * kPanel;
  };
  std::vector<int64_t> tasks;
  for (const GptqWords& part : parts) tasks.push_back((part.count + step(part) - 1) / step(part));
  return each_part(tasks, [&](int64_t at, int64_t task) {
    static thread_local Scratch<uint32_t> scratch;
    const GptqWords& part = parts[at];
    PackedLinear& w = *part.w;
    const int64_t first = task * step(part), count = std::min(step(part), part.count - first);
    uint32_t* words = scratch.room(word_rows(part) * count);
    for (int64_t row = 0; row < word_rows(part); ++row) {
      auto* to = reinterpret_cast<uint8_t*>(words + row * count);
      if (!read_at(part.file, part.offset + (row * part.stride + first) * 4, count * 4, to)) return false;
    }
    const auto pack = w.kind == WeightKind::kInt4 ? pack_words<WeightKind::kInt4> : pack_words<WeightKind::kInt8>;
    const int64_t vectors = w.group / layout_of(w.kind).ks;
    for (int64_t run = 0; run < count; run += kRun * kPanel) {
      for (int64_t g = 0; g < w.groups(); ++g) {
        for (int64_t column = run; column < std::min(count, run + kRun * kPanel); column += kPanel) {
          const int live = static_cast<int>(std::min<int64_t>(kPanel, count - column));
          uint8_t* out = w.panel((part.start + first + column) / kPanel) + g * w.group_bytes;
          if (!pack_header(part, first + column, live, g, out)) return false;
          pack(words + g * vectors * count + column, count, live, vectors, out + header_bytes(w.aux));
        }
      }
    }
    return true;
  });
}

}  // namespace qwen_rt
