"""Weights on an NPU, and the products.

    dense     [N, K] in the compute dtype; x W^T by matmul
    grouped   npu_weight_quant_batchmatmul: y = x @ ((W + offset) * scale) + bias, W [K, N] signed int8, or int4 as
              npu_convert_weight_to_int4pack packs it, 8 to an int32

Grouped weights are stored by rows, [N, K] with scale and offset [N, K / group], and handed over transposed, which the
operator takes as it is: a row chunk of the checkpoint is a chunk of the weight, the table's rows are embeddings, and N
may be cut anywhere. The operator's page asks for groups that are multiples of 32 below K (one group per row is its "per
channel" form), K and N up to 65535, scale and offset of x's dtype, bias in float16 for float16 and float32 for
bfloat16. Its NZ layout takes groups of 64 and 128 with 4 bits only, untransposed, and is not used. Weights of other
groups, and all grouped ones on a SoC without the operator, are held dense.

Codes are moved into the signed range by whole numbers: with c the move of a group, W = code - c and

    zero points   offset = c - zero                    exact: whole numbers up to 256
    minimums      offset = minimum / scale + c         rounded to the compute dtype; c is chosen near -minimum / scale,
                                                       as far as the range allows, so that little is lost

Scale is float16 in a checkpoint: exact for float16, rounded for bfloat16. An embedding wants it as it was, so what the
product's copy loses stays on the host and follows to the device when a table is first looked up.
Source: op-plugin docs/context, npu_weight_quant_batchmatmul and npu_convert_weight_to_int4pack; CANN's operator
library, aclnnWeightQuantBatchMatmulV2 and V3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen_rt.backends.torch_backend import from_host, to_host
from qwen_rt.dtypes import DType
from qwen_rt.errors import CheckpointError
from qwen_rt.quant.formats import LinearFormat, LinearRows, RawLinear, all_finite, dense_format, dequantize_rows

PACK_ELEMENTS = 1 << 22  # weights in flight on the host while packing
MAX_DIM = 65535  # K and N of one call
NIBBLES = 8  # int4 codes in an int32


@dataclass
class AscendPacked:
    """A weight on the device: `dense`, or `codes` with `scales` and `offsets`."""

    shape: tuple[int, int]
    format: LinearFormat
    dtype: torch.dtype  # compute dtype
    dense: Tensor | None = None  # dtype [N, K]
    codes: Tensor | None = None  # int8 [N, K], or int32 [N, K / 8]
    scales: Tensor | None = None  # dtype [N, G]
    offsets: Tensor | None = None  # dtype [N, G]
    bias: Tensor | None = None  # dtype [N]; grouped bfloat16: float32
    perm: Tensor | None = None  # int32 [K], as RawLinear.perm; dense weights have it undone
    exact: tuple[Tensor, Tensor] | None = (
        None  # float32 (scale, offset) [N, G] on the host, where `scales` lost something
    )

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        held = (self.dense, self.codes, self.scales, self.offsets, self.bias, self.perm)
        return sum(t.nbytes for t in held if t is not None)


def serves(fmt: LinearFormat, k: int, fused: bool) -> bool:
    """Whether the quantised product takes weights of this format with K inputs."""
    return fused and fmt.grouped and k <= MAX_DIM and fmt.group_size % 32 == 0


def empty(raw: RawLinear, device: torch.device, compute_dtype: DType, fused: bool) -> AscendPacked:
    """The tensors of `raw`, unfilled; the bias and the order of inputs are there already."""
    (n, k), fmt, dtype = raw.shape, raw.format, getattr(torch, compute_dtype)
    grouped = serves(fmt, k, fused)
    out = AscendPacked(raw.shape, fmt if grouped else dense_format(compute_dtype), dtype)
    if raw.bias is not None:
        wide = grouped and dtype == torch.bfloat16
        out.bias = from_host(raw.bias).to(torch.float32 if wide else dtype).to(device)
    if not grouped:
        out.dense = torch.empty((n, k), dtype=dtype, device=device)
        return out
    if raw.perm is not None:
        out.perm = from_host(raw.perm).to(torch.int32).to(device)
    packed = fmt.bits == 4
    out.codes = torch.empty(
        (n, k // NIBBLES if packed else k), dtype=torch.int32 if packed else torch.int8, device=device
    )
    out.scales = torch.empty((n, k // fmt.group_size), dtype=dtype, device=device)
    out.offsets = torch.empty_like(out.scales)
    return out


def pack(npu: Any, raw: RawLinear, device: torch.device, compute_dtype: DType) -> AscendPacked:
    """`raw` on the device, by chunks of rows. npu None: dense. Not finite (in `compute_dtype`): CheckpointError."""
    out = empty(raw, device, compute_dtype, npu is not None)
    fmt, dtype, exact = raw.format, out.dtype, []
    perm = None if raw.perm is None else from_host(raw.perm).long()
    if raw.bias is not None:
        _finite(raw, from_host(raw.bias).to(dtype), "the bias")
    for start, stop, part in raw.chunks(PACK_ELEMENTS):
        rows = slice(start, stop)
        if out.dense is not None:
            held = dequantize_rows(part, fmt) if fmt.grouped else part.values
            assert held is not None
            values = _finite(raw, from_host(held).to(dtype), f"values of rows {start} to {stop}")
            if perm is not None:
                values = torch.empty_like(values).index_copy_(1, perm, values)
            out.dense[rows] = values.to(device)
            continue
        assert out.codes is not None and out.scales is not None and out.offsets is not None
        codes, scale, offset = signed(part, fmt)
        exact.append((scale, offset))
        out.scales[rows] = _finite(raw, scale.to(dtype), f"scales of rows {start} to {stop}").to(device)
        out.offsets[rows] = _finite(raw, offset.to(dtype), f"offsets of rows {start} to {stop}").to(device)
        if fmt.bits == 4:
            out.codes[rows] = npu.npu_convert_weight_to_int4pack(codes.to(device, torch.int32))
        else:
            out.codes[rows] = codes.to(device)
    if exact:
        scales, offsets = (torch.cat(t) for t in zip(*exact, strict=True))
        if not (torch.equal(scales.to(dtype).float(), scales) and torch.equal(offsets.to(dtype).float(), offsets)):
            out.exact = (scales, offsets)
    return out


def signed(part: LinearRows, fmt: LinearFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Signed codes int8 [n, K], and (scale, offset) float32 [n, G]: w = (code + offset) * scale."""
    assert part.codes is not None and part.scales is not None
    half = 1 << (fmt.bits - 1)
    scale = from_host(part.scales).float()
    codes = from_host(part.codes).to(torch.int16).unflatten(1, (-1, fmt.group_size))
    if part.mins is None:
        zeros = torch.full_like(scale, half) if part.zeros is None else from_host(part.zeros).float()
        return (codes - half).flatten(1).to(torch.int8), scale, half - zeros
    mins = from_host(part.mins).float()
    degenerate = scale == 0  # the group is its minimum: any scale will do that gives it back
    scale = torch.where(degenerate, torch.where(mins == 0, torch.ones_like(mins), mins), scale)
    codes = torch.where(degenerate.unsqueeze(-1), torch.zeros_like(codes), codes)
    ratio = mins / scale
    lowest, highest = codes.amax(-1) - (half - 1), codes.amin(-1) + half
    move = (-ratio).round().clamp(min=lowest.float(), max=highest.float())
    return (codes - move.to(torch.int16).unsqueeze(-1)).flatten(1).to(torch.int8), scale, ratio + move


def _finite(raw: RawLinear, values: Tensor, what: str) -> Tensor:
    host = to_host(values)
    if not all_finite(host):
        raise CheckpointError(f"{raw.name}: {what} overflow {host.dtype.name}; compute in another")
    return values


def run(npu: Any, x: Tensor, w: AscendPacked) -> Tensor:
    """x [T, K] -> [T, N]."""
    if w.dense is not None:
        return torch.mm(x, w.dense.t()) if w.bias is None else torch.addmm(w.bias, x, w.dense.t())
    assert w.codes is not None and w.scales is not None and w.offsets is not None
    x = x if w.perm is None else x.index_select(1, w.perm)
    group = 0 if w.format.group_size == w.shape[1] else w.format.group_size
    parts = []
    for start in range(0, w.shape[0], MAX_DIM):
        rows = slice(start, start + MAX_DIM)
        bias = None if w.bias is None else w.bias[rows]
        parts.append(
            npu.npu_weight_quant_batchmatmul(
                x.contiguous(),
                w.codes[rows].t(),
                w.scales[rows].t(),
                w.offsets[rows].t(),
                bias=bias,
                antiquant_group_size=group,
            )
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def embedding(ids: Tensor, w: AscendPacked) -> Tensor:
    """Rows of the table, [T, K] in the compute dtype; ids are on the device and within it."""
    if w.dense is not None:
        return w.dense.index_select(0, ids)
    assert w.codes is not None and w.scales is not None and w.offsets is not None
    if w.exact is not None:  # from here on in the device's memory, float32: this weight is a table
        scales, offsets = w.exact = (w.exact[0].to(w.codes.device), w.exact[1].to(w.codes.device))
    else:
        scales, offsets = w.scales, w.offsets
    codes = w.codes.index_select(0, ids)
    if w.format.bits == 4:
        codes = unpack(codes)
    wide = codes.float().unflatten(1, (-1, w.format.group_size))
    scale, offset = (t.index_select(0, ids).float().unsqueeze(-1) for t in (scales, offsets))
    rows = ((wide + offset) * scale).flatten(1)
    if w.perm is not None:
        rows = torch.empty_like(rows).index_copy_(1, w.perm.long(), rows)
    return rows.to(w.dtype)


def unpack(words: Tensor) -> Tensor:
    """int32 [n, K / 8] as npu_convert_weight_to_int4pack makes them, the first code lowest -> int32 [n, K], -8 .. 7."""
    shifts = torch.arange(28, -4, -4, dtype=torch.int32, device=words.device)  # brings each nibble to the top
    top = torch.bitwise_left_shift(words.unsqueeze(-1), shifts)
    return torch.bitwise_right_shift(top, torch.full_like(shifts, 28)).flatten(1)  # arithmetic: the sign comes along
