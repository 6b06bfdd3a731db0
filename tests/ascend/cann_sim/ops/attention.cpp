// aclnnFusedInferAttentionScoreV3: out = softmax(scale * q k^T + pse, masked) v, per sequence and query head, in
// float32, rounded once. Grouped heads, paged or dense keys and values, INT8 caches (x = (code + offset) * scale).
//
// Layouts: BSH [B,S,N*D], BSND, BNSD (BNSD_BSND: output transposed), TND [T,N,D] with cumulative lengths. With a block
// table the cache is [pages, block, N*D] or, in layout BNSD, [pages, N, block, D], and key lengths are per sequence in
// every layout.
//
// Masks (sparse mode): 0 the given mask, limited to [i - pre, i + next]; 1 the given mask; 2 causal from the first
// position; 3 causal to the last; 4 a band of pre and next around the diagonal that ends at the last position. 2, 3 and
// 4 take the 2048 x 2048 upper triangle. Rows without any position give zeros. With one query a sequence in layouts
// other than TND, sparse mode, pre and next have no effect.
//
// Not simulated, and refused by name: INT8 queries and outputs, pse, left padding, shared prefixes, separate rope
// inputs, tensor lists, INT4 caches.
#include <cmath>

#include "registry.h"

using namespace cannsim;

namespace {

constexpr int64_t kMaskSide = 2048;

struct Shapes {
  bool tnd = false, paged = false;
  int64_t batch = 0, heads = 0, kv_heads = 0, size = 0, q_len = 0;  // q_len: the longest
};

std::string base_layout(const Text& layout) { return layout.substr(0, layout.find('_')); }

int64_t sum_to(const std::vector<int64_t>& cumulative, int64_t b) { return b ? cumulative[b - 1] : 0; }
int64_t length_of(const std::vector<int64_t>& lens, int64_t b) { return lens[lens.size() == 1 ? 0 : b]; }

Shapes shapes_of(const Desc& q, const Ints& q_lens, const Desc& table, int64_t heads, int64_t kv_heads,
                 const Text& layout) {
  Shapes s;
  const std::string base = base_layout(layout);
  s.tnd = base == "TND";
  s.paged = static_cast<bool>(table);
  s.heads = heads;
  s.kv_heads = kv_heads ? kv_heads : heads;
  if (s.tnd) {
    require(q.rank() == 3, "query must be [T, N, D], not " + q.shape());
    require(q_lens && !q_lens->empty(), "actualSeqLengths must be given in layout TND");
    s.batch = static_cast<int64_t>(q_lens->size());
    s.size = q.dim(2);
    for (int64_t b = 0; b < s.batch; ++b) {
      const int64_t n = (*q_lens)[b] - sum_to(*q_lens, b);
      require(n >= 0, "actualSeqLengths must not decrease in layout TND");
      s.q_len = std::max(s.q_len, n);
    }
    require(q_lens->back() == q.dim(0), "actualSeqLengths ends at " + std::to_string(q_lens->back()) + ", query has " +
                                            std::to_string(q.dim(0)) + " tokens");
    require(q.dim(1) == heads, "numHeads must be query's N");
  } else if (base == "BSH") {
    require(q.rank() == 3 && q.dim(2) % heads == 0, "query must be [B, S, N*D], not " + q.shape());
    s.batch = q.dim(0), s.q_len = q.dim(1), s.size = q.dim(2) / heads;
  } else if (base == "BSND" || base == "BNSD") {
    require(q.rank() == 4, "query must have 4 dimensions in layout " + layout);
    const int n = base == "BSND" ? 2 : 1;
    require(q.dim(n) == heads, "numHeads must be query's N");
    s.batch = q.dim(0), s.q_len = q.dim(3 - n), s.size = q.dim(3);
  } else {
    throw Refused(kParamInvalid, "inputLayout '" + layout + "' is not simulated");
  }
  return s;
}

void require_mask(const Desc& mask, int64_t sparse, const Shapes& s, const Ints& kv_lens) {
  require(sparse >= 0 && sparse <= 4, "sparseMode must be 0 to 4, not " + std::to_string(sparse));
  if (s.q_len == 1 && !s.tnd) sparse = 0;  // documented as without effect there
  if (mask)
    require(mask.type() == ACL_BOOL || mask.type() == ACL_INT8 || mask.type() == ACL_UINT8,
            "attenMask must be BOOL, INT8 or UINT8");
  if (sparse >= 2) {
    require(static_cast<bool>(mask), "attenMask must be given in sparse mode " + std::to_string(sparse));
    require(mask.rank() >= 2 && mask.dim(-1) == kMaskSide && mask.dim(-2) == kMaskSide &&
                mask.numel() == kMaskSide * kMaskSide,
            "attenMask must be 2048 x 2048 in sparse mode " + std::to_string(sparse) + ", not " + mask.shape());
  } else if (sparse == 1 || mask) {
    require(static_cast<bool>(mask), "attenMask must be given in sparse mode 1");
    int64_t longest = 0;
    if (kv_lens) longest = *std::max_element(kv_lens->begin(), kv_lens->end());
    require(mask.dim(-1) >= longest, "attenMask " + mask.shape() + " is narrower than the longest key");
    require(s.q_len == 1 || (mask.rank() >= 2 && mask.dim(-2) >= s.q_len),
            "attenMask " + mask.shape() + " has too few rows");
  }
}

void require_paging(const Desc& k, const Desc& table, const Ints& kv_lens, int64_t block, const Shapes& s,
                    const Text& layout) {
  const std::string base = base_layout(layout);
  const bool int8 = k.type() == ACL_INT8;
  require(kv_lens.has_value(), "actualSeqLengthsKv must be given with a block table");
  require(table.type() == ACL_INT32 && table.rank() == 2, "blockTable must be INT32 of 2 dimensions");
  require(table.dim(0) == s.batch,
          "blockTable has " + std::to_string(table.dim(0)) + " rows for a batch of " + std::to_string(s.batch));
  require(block > 0, "blockSize must be given with a block table");
  if (s.tnd)
    require(block <= 128 && block % 16 == 0,
            "blockSize must be a multiple of 16 up to 128 in layout TND, not " + std::to_string(block));
  else if (s.q_len == 1)
    require(block <= 512 && block % (int8 ? 32 : 16) == 0,
            "blockSize must be a multiple of " + std::string(int8 ? "32" : "16") + " up to 512 for one query, not " +
                std::to_string(block));
  else
    require(block >= 128 && block <= 512 && block % 128 == 0,
            "blockSize must be 128, 256, 384 or 512 for several queries, not " + std::to_string(block));
  if (k.rank() == 3) {
    require(k.dim(1) == block && k.dim(2) == s.kv_heads * s.size,
            "the cache " + k.shape() + " must be [pages, blockSize, N*D]");
    require(k.dim(2) <= 65535, "N*D must be at most 65535 in a cache [pages, blockSize, N*D]");
  } else {
    require(!s.tnd && base == "BNSD",
            "layout " + layout + " takes a cache [pages, blockSize, N*D] only, not " + k.shape());
    require(k.rank() == 4 && k.dim(1) == s.kv_heads && k.dim(2) == block && k.dim(3) == s.size,
            "the cache " + k.shape() + " must be [pages, N, blockSize, D]");
  }
  for (int64_t b = 0; b < s.batch; ++b)
    require((length_of(*kv_lens, b) + block - 1) / block <= table.dim(1),
            "blockTable's " + std::to_string(table.dim(1)) + " pages hold less than " +
                std::to_string(length_of(*kv_lens, b)) + " keys");
}

// Shapes and types of the dequantisation inputs, by mode (keyAntiquantMode).
void require_antiquant(const Desc& q, const Desc& k, const Desc& scale, const Desc& offset, int64_t mode,
                       const Shapes& s, int64_t block, const char* name) {
  const std::string who = name;
  require(k.type() == ACL_INT8, who + " must be INT8 with antiquant inputs");
  require(!s.tnd, "INT8 caches are not supported in layout TND");
  if (offset) {
    require_same_shape(scale, offset, "antiquant scale and offset");
    require_same_type(scale, offset, "antiquant scale and offset");
  }
  const int64_t pages = k.dim(0), kv = s.kv_heads, n = scale.numel();
  if (s.q_len > 1) {
    require(mode == 0 || mode == 1, "antiquant mode " + std::to_string(mode) + " needs one query a sequence");
    require(s.q_len <= 16, "antiquant inputs need at most 16 queries a sequence, not " + std::to_string(s.q_len));
    require(!s.paged, "antiquant inputs with several queries a sequence do not support a block table");
    require(q.type() == ACL_BF16, "antiquant inputs with several queries need BFLOAT16 queries");
  }
  require(mode >= 0 && mode <= 5, "antiquant mode must be 0 to 5");
  require((mode == 4 || mode == 5) <= s.paged, "antiquant modes 4 and 5 need a block table");
  const bool token = mode == 1 || mode >= 3;
  require(scale.type() == (token ? ACL_FLOAT : q.type()),
          who + "AntiquantScale must be " + (token ? "FLOAT" : "of query's type") + " in mode " + std::to_string(mode));
  const auto shape = [&](std::vector<int64_t> expected, const char* text) {
    require(scale.dims() == expected,
            who + "AntiquantScale " + scale.shape() + " must be " + text + " in mode " + std::to_string(mode));
  };
  switch (mode) {
    case 0: require(n == 1 || n == kv * s.size, who + "AntiquantScale must be (1) or (1,N,1,D)"); break;
    case 1: require(scale.rank() >= 2 && scale.dim(-2) == s.batch, who + "AntiquantScale must be (1,B,S)"); break;
    case 2: shape({kv}, "(N)"); break;
    case 3:
      require(scale.rank() == 3 && scale.dim(0) == s.batch && scale.dim(1) == kv,
              who + "AntiquantScale must be (B,N,S)");
      break;
    case 4: shape({pages, block}, "(pages, blockSize)"); break;
    default: shape({pages, kv, block}, "(pages, N, blockSize)");
  }
}

using Lists = const Descs&;
void check_attention(const Desc& q, Lists key, Lists value, const Desc& pse, const Desc& mask, const Ints& q_lens,
                     const Ints& kv_lens, const Desc& dequant1, const Desc& quant1, const Desc& dequant2,
                     const Desc& quant2, const Desc& quant_offset2, const Desc& antiquant_scale,
                     const Desc& antiquant_offset, const Desc& table, const Desc& q_padding, const Desc& kv_padding,
                     const Desc& k_scale, const Desc& k_offset, const Desc& v_scale, const Desc& v_offset,
                     const Desc& k_prefix, const Desc& v_prefix, const Ints& prefix, const Desc& q_rope,
                     const Desc& k_rope, const Desc& k_rope_scale, int64_t heads, double, int64_t pre, int64_t next,
                     const Text& layout, int64_t kv_heads, int64_t sparse, int64_t inner, int64_t block, int64_t, bool,
                     int64_t k_mode, int64_t v_mode, const Desc& out, const Desc& lse) {
  const std::pair<const Desc*, const char*> unsupported[] = {{&pse, "pseShift"},
                                                             {&dequant1, "deqScale1"},
                                                             {&quant1, "quantScale1"},
                                                             {&dequant2, "deqScale2"},
                                                             {&quant2, "quantScale2"},
                                                             {&quant_offset2, "quantOffset2"},
                                                             {&antiquant_scale, "antiquantScale"},
                                                             {&antiquant_offset, "antiquantOffset"},
                                                             {&q_padding, "queryPaddingSize"},
                                                             {&kv_padding, "kvPaddingSize"},
                                                             {&k_prefix, "keySharedPrefix"},
                                                             {&v_prefix, "valueSharedPrefix"},
                                                             {&q_rope, "queryRope"},
                                                             {&k_rope, "keyRope"},
                                                             {&k_rope_scale, "keyRopeAntiquantScale"}};
  for (const auto& [desc, name] : unsupported) require(!*desc, std::string(name) + " is not simulated");
  require(!prefix || prefix->empty(), "actualSharedPrefixLen is not simulated");
  require_half(q, "query");
  require(key.size() == 1 && value.size() == 1, "lists of keys and values are not simulated");
  const Desc &k = key[0], &v = value[0];
  require_contiguous(q, "query");
  require_contiguous(k, "key");
  require_contiguous(v, "value");
  require(heads > 0 && heads <= 256, "numHeads must be within [1, 256]");
  require(kv_heads >= 0 && (!kv_heads || heads % kv_heads == 0), "numHeads must be a multiple of numKeyValueHeads");
  const Shapes s = shapes_of(q, q_lens, table, heads, kv_heads, layout);
  require(s.batch <= 65536, "the batch must be at most 65536");
  require_same_type(k, v, "key and value");
  require_same_shape(k, v, "key and value");
  require(k.type() == q.type() || k.type() == ACL_INT8, "key must have query's type or be INT8");
  require(inner >= 0 && inner <= 3, "innerPrecise must be 0 to 3");
  const bool int8 = k.type() == ACL_INT8;
  // The page states the alignment of D for several queries only.
  const int64_t align = s.tnd || s.q_len > 1 ? (int8 ? 32 : 16) : 1;
  require(s.size <= 512 && s.size % align == 0,
          "D must be a multiple of " + std::to_string(align) + " up to 512, not " + std::to_string(s.size));
  for (const Ints* lens : {&q_lens, &kv_lens})
    if (*lens)
      for (int64_t n : **lens) require(n >= 0, "a sequence length is negative");
  if (kv_lens)
    require(kv_lens->size() == 1 || static_cast<int64_t>(kv_lens->size()) >= s.batch,
            "actualSeqLengthsKv must have 1 or B elements");
  if (!s.tnd && q_lens && s.q_len > 1)
    require(q_lens->size() == 1 || static_cast<int64_t>(q_lens->size()) >= s.batch,
            "actualSeqLengths must have 1 or B elements");
  require_mask(mask, sparse, s, s.tnd && !s.paged ? Ints() : kv_lens);
  if (s.tnd) {
    require(kv_lens && static_cast<int64_t>(kv_lens->size()) == s.batch,
            "actualSeqLengthsKv must have an element for every sequence in layout TND");
    require(s.size <= 256, "D must be at most 256 in layout TND");
    require((sparse == 0 && !mask) || sparse == 3 || sparse == 4,
            "layout TND takes sparse mode 0 without attenMask, or 3 or 4 with it");
    // Grouped heads and BFLOAT16 run in high precision without correction of empty rows; FLOAT16 MHA may choose.
    const bool choice = q.type() == ACL_FLOAT16 && s.heads == s.kv_heads;
    require(inner == 0 || (choice && inner == 1), "innerPrecise must be 0 in layout TND");
  }
  if (sparse == 4 && (s.tnd || s.q_len > 1)) require(pre + next >= 0, "preTokens + nextTokens must not be negative");
  if (s.paged) {
    require_paging(k, table, kv_lens, block, s, layout);
  } else if (!s.tnd) {
    const std::string base = base_layout(layout);
    require(k.dim(0) == s.batch, "key's batch differs from query's");
    const int64_t expected = base == "BSH" ? s.kv_heads * s.size : s.size;
    require(k.dim(-1) == expected, "key " + k.shape() + " does not fit numKeyValueHeads and D");
    const int64_t room = k.dim(base == "BNSD" ? 2 : 1);
    if (kv_lens)
      for (int64_t b = 0; b < s.batch; ++b)
        require(length_of(*kv_lens, b) <= room, "actualSeqLengthsKv exceeds key's S");
  } else {
    require(k.rank() == 3 && k.dim(1) == s.kv_heads && k.dim(2) == s.size, "key must be [T, N, D], not " + k.shape());
    require(kv_lens->back() <= k.dim(0), "actualSeqLengthsKv ends behind key's tokens");
  }
  require(int8 == static_cast<bool>(k_scale) && int8 == static_cast<bool>(v_scale),
          "INT8 keys and values need both antiquant scales, others none");
  require(static_cast<bool>(k_offset) == static_cast<bool>(v_offset),
          "antiquant offsets must be given for key and value alike");
  if (int8) {
    require(k_mode == v_mode || (k_mode == 0 && v_mode == 1), "keyAntiquantMode and valueAntiquantMode must agree");
    require_antiquant(q, k, k_scale, k_offset, k_mode, s, block, "key");
    require_antiquant(q, v, v_scale, v_offset, v_mode, s, block, "value");
  }
  require_same_type(q, out, "query and attentionOut");
  if (base_layout(layout) == layout) require_same_shape(q, out, "query and attentionOut");
  if (lse && lse.numel() > 1) require(lse.type() == ACL_FLOAT, "softmaxLse must be FLOAT");
}

// A sequence's pages as [heads, length, D].
Tensor gather_pages(const Tensor& cache, const Tensor& row, int64_t length, int64_t heads, int64_t block) {
  std::vector<Tensor> pages;
  for (int64_t i = 0; i * block < length; ++i) {
    const int64_t page = row[i].item<int64_t>();
    require(page >= 0 && page < cache.size(0),
            "blockTable names page " + std::to_string(page) + " of " + std::to_string(cache.size(0)),
            kVectorCoreException);
    Tensor t = cache.select(0, page);
    pages.push_back(t.dim() == 2 ? t.unflatten(1, {heads, -1}).transpose(0, 1) : t);
  }
  return at::cat(pages, 1).narrow(1, 0, length);
}

// (code + offset) * scale of x [heads, length, D]; `pick` brings a parameter into the shape of x.
Tensor dequantise(const Tensor& x, const Tensor& scale, const Tensor& offset,
                  const std::function<Tensor(const Tensor&)>& pick) {
  Tensor y = x.to(at::kFloat);
  if (offset.defined()) y = y + pick(wide(offset));
  return y * pick(wide(scale));
}

struct Antiquant {
  Tensor scale, offset;
  int64_t mode;
  Tensor apply(const Tensor& x, int64_t b, const Tensor& row, int64_t block) const {
    if (!scale.defined()) return wide(x);
    const int64_t heads = x.size(0), length = x.size(1);
    return dequantise(x, scale, offset, [&](const Tensor& p) -> Tensor {
      switch (mode) {
        case 0: return p.numel() == 1 ? p.reshape({1, 1, 1}) : p.reshape({heads, 1, -1});
        case 1: return p.reshape({-1, p.size(-1)})[b].narrow(0, 0, length).reshape({1, length, 1});
        case 2: return p.reshape({heads, 1, 1});
        case 3: return p[b].narrow(1, 0, length).unsqueeze(-1);
        default: {
          std::vector<Tensor> parts;
          for (int64_t i = 0; i * block < length; ++i) parts.push_back(p[row[i].item<int64_t>()].reshape({-1, block}));
          return at::cat(parts, 1).narrow(1, 0, length).unsqueeze(-1);
        }
      }
    });
  }
};

// True where a query may not look. `i` and `j` count from the first query and key of the sequence.
Tensor hidden(const Tensor& mask, int64_t b, int64_t rows, int64_t columns, int64_t sparse, int64_t pre, int64_t next,
              bool one_query) {
  const Tensor i = at::arange(rows).unsqueeze(1), j = at::arange(columns).unsqueeze(0);
  if (one_query || sparse <= 1) {
    if (!mask.defined()) return at::zeros({rows, columns}, at::kBool);
    Tensor m = mask;
    if (m.dim() > 2 || (m.dim() == 2 && one_query && rows == 1 && m.size(0) != rows)) {
      m = m.select(0, m.size(0) == 1 ? 0 : b);
      while (m.dim() > 2) m = m.select(0, 0);
      if (m.dim() == 1) m = m.unsqueeze(0);
    }
    Tensor h = m.narrow(0, 0, rows).narrow(1, 0, columns).to(at::kBool);
    if (sparse == 0 && !one_query) h = h.logical_or(j < i - pre).logical_or(j > i + next);
    return h;
  }
  // The triangle must really be there: the device reads it.
  for (int64_t r : {int64_t{0}, int64_t{1}, kMaskSide / 2, kMaskSide - 1}) {
    const Tensor row = mask.reshape({kMaskSide, kMaskSide})[r].to(at::kBool);
    require(!row.narrow(0, 0, r + 1).any().item<bool>() && row.narrow(0, r + 1, kMaskSide - r - 1).all().item<bool>(),
            "attenMask is not the upper triangle that sparse mode " + std::to_string(sparse) + " needs",
            kVectorCoreException);
  }
  if (sparse == 2) return j > i;
  const Tensor last = i + (columns - rows);
  if (sparse == 3) return j > last;
  return (j < last - pre).logical_or(j > last + next);
}

}  // namespace

SIM_OP(aclnnFusedInferAttentionScoreV3, kOnly910B, "ops-transformer/attention/fused_infer_attention_score",
       check_attention,
       [](Tensor q, Tensors key, Tensors value, Tensor, Tensor mask, Ints q_lens, Ints kv_lens, Tensor, Tensor, Tensor,
          Tensor, Tensor, Tensor, Tensor, Desc table_desc, Tensor, Tensor, Tensor k_scale, Tensor k_offset,
          Tensor v_scale, Tensor v_offset, Tensor, Tensor, Ints, Tensor, Tensor, Tensor, int64_t heads, double scale,
          int64_t pre, int64_t next, Text layout, int64_t kv_heads, int64_t sparse, int64_t, int64_t block, int64_t,
          bool want_lse, int64_t k_mode, int64_t v_mode, Tensor out, Tensor lse) {
         const std::string base = base_layout(layout);
         const bool tnd = base == "TND", paged = static_cast<bool>(table_desc);
         const Tensor table = paged ? table_desc.view().to(at::kLong) : Tensor();
         if (!kv_heads) kv_heads = heads;
         const auto by_head = [&](const Tensor& t, int64_t n, const std::string& as) {  // [B, n, S, D]
           return as == "BNSD" ? t : (as == "BSH" ? t.unflatten(-1, {n, -1}) : t).transpose(1, 2);
         };
         const int64_t batch = tnd ? static_cast<int64_t>(q_lens->size()) : q.size(0);
         const Tensor out4 = tnd ? out : by_head(out, heads, layout == "BNSD_BSND" ? "BSND" : base);
         const Antiquant k_quant{k_scale, k_offset, k_mode}, v_quant{v_scale, v_offset, v_mode};
         for (int64_t b = 0; b < batch; ++b) {
           const int64_t first = tnd ? sum_to(*q_lens, b) : 0;
           Tensor rows =
               tnd ? q.narrow(0, first, (*q_lens)[b] - first).transpose(0, 1) : by_head(q, heads, base).select(0, b);
           const bool one_query = !tnd && rows.size(1) == 1;
           if (!tnd && q_lens && !one_query) rows = rows.narrow(1, 0, length_of(*q_lens, b));
           const int64_t count = rows.size(1);
           if (!count) continue;
           const auto keys = [&](const Tensor& t, const Antiquant& quant) {
             Tensor x, row;
             if (paged) {
               row = table[b];
               x = gather_pages(t, row, length_of(*kv_lens, b), kv_heads, block);
             } else if (tnd) {
               const int64_t start = sum_to(*kv_lens, b);
               x = t.narrow(0, start, (*kv_lens)[b] - start).transpose(0, 1);
             } else {
               x = by_head(t, kv_heads, base).select(0, b);
               if (kv_lens) x = x.narrow(1, 0, length_of(*kv_lens, b));
             }
             return quant.apply(x, b, row, block).repeat_interleave(heads / kv_heads, 0);
           };
           const bool empty = paged && length_of(*kv_lens, b) == 0;
           Tensor y = at::zeros({heads, count, rows.size(-1)}, at::kFloat), sums;
           if (!empty) {
             const Tensor k = keys(key[0], k_quant), v = keys(value[0], v_quant);
             const Tensor hide = hidden(mask, b, count, k.size(1), sparse, pre, next, one_query);
             const Tensor scores = at::matmul(wide(rows), k.transpose(1, 2)).mul_(scale).masked_fill_(hide, -INFINITY);
             sums = at::logsumexp(scores, -1);
             y = at::matmul(at::softmax(scores, -1), v).masked_fill_(hide.all(-1, true), 0.0);
           }
           const Tensor place =
               tnd ? out4.narrow(0, first, count).transpose(0, 1) : out4.select(0, b).narrow(1, 0, count);
           place.copy_(y);
           if (want_lse && sums.defined())
             (tnd ? lse.narrow(0, first, count).squeeze(-1).transpose(0, 1)
                  : lse.select(0, b).squeeze(-1).narrow(1, 0, count))
                 .copy_(sums);
         }
       })

// torch_npu asks for the workspace of a graph's operators once and for all; none of these needs any.
CANNSIM_API int aclnnFusedInferAttentionScoreV3GetMaxWorkspaceSize() { return 0; }
