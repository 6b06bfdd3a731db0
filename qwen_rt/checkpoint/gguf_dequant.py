"""The tensor types of GGUF and how their blocks become RawLinear rows, without quantising anything again.

Formulas and bit layouts are those of the block structs of ggml (`ggml-common.h`). Codes are exact. Where a type keeps
one float16 scale a block (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0) the scales are exact as well. In a K-quant the scale of a group
is a product d * sc of a float16 and a small integer; here it is rounded to float16, a relative error of at most 2^-11.
That bound holds for subnormals too: such a product is a multiple of 2^-24, as is every float16 below 2^-14. A product
beyond float16, or a scale that is not finite, is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen_rt.native import extension
from qwen_rt.quant.formats import LinearFormat, WeightBits, dense_format

U8 = NDArray[np.uint8]
F16 = NDArray[np.float16]
Decoded = tuple[F16, F16 | None]
"""Scales and mins of B blocks, [B, groups of a block] each."""
Decoder = Callable[[np.ndarray, U8], Decoded]
"""Of blocks [B] of a struct dtype; writes codes [B, block]."""


@dataclass(frozen=True)
class TensorType:
    """A ggml tensor type: `block` elements are stored in `nbytes` bytes."""

    name: str
    block: int
    nbytes: int
    format: LinearFormat
    codec: tuple[np.dtype, Decoder] | None = None  # a block's struct and its decoder; None: dense


def _nibbles(qs: U8, out: U8) -> None:
    """Bytes [B, m, w] -> out [B, m*2*w]: of each run of w bytes the low nibbles, then the high ones."""
    qs = np.ascontiguousarray(qs)
    runs = out.reshape(qs.shape[0], qs.shape[1], 2, qs.shape[2])
    np.bitwise_and(qs, 15, out=runs[:, :, 0])
    np.right_shift(qs, 4, out=runs[:, :, 1])


def _crumbs(qs: U8, out: U8) -> None:
    """Bytes [B, 2*w] -> out [B, 2*4*w]: of each run of w bytes bits 0-1, then 2-3, 4-5, 6-7."""
    half = np.ascontiguousarray(qs).reshape(len(qs), 2, -1)
    runs = out.reshape(len(qs), 2, 4, -1)
    for i in range(4):
        np.bitwise_and(half >> np.uint8(2 * i), 3, out=runs[:, :, i])


def _planes(bits: U8, weight: int) -> U8:
    """Bytes [B, w] -> [B, 8, w]: `weight` where bit i of a byte is set, else 0."""
    masks = np.left_shift(np.uint8(1), np.arange(8, dtype=np.uint8))[:, None]
    return ((np.ascontiguousarray(bits)[:, None] & masks) != 0).view(np.uint8) * np.uint8(weight)


def _fives(b: np.ndarray, out: U8) -> None:
    """Blocks of 32 five-bit codes: nibbles in qs, bit j of the word qh is bit 4 of code j."""
    _nibbles(b["qs"][:, None], out)
    high = np.unpackbits(np.ascontiguousarray(b["qh"]).reshape(-1), bitorder="little").reshape(out.shape)
    out |= high << np.uint8(4)


def _product(d: F16, factors: NDArray[np.integer]) -> F16:
    """d [B] times integers [B, G], rounded once to float16 (exact in float32 before)."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (d.astype(np.float32)[:, None] * factors).astype(np.float16)


def _six_bit(packed: U8) -> tuple[U8, U8]:
    """The 12 bytes of a Q4_K/Q5_K block -> 8 scales and 8 mins of 6 bits, [B, 8] each."""
    a, b, c = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([a & 63, (c & 15) | ((a >> 6) << 4)], axis=1)
    mins = np.concatenate([b & 63, (c >> 4) | ((b >> 6) << 4)], axis=1)
    return scales, mins


def _q4_0(b: np.ndarray, out: U8) -> Decoded:
    _nibbles(b["qs"][:, None], out)  # w = d * (q - 8)
    return b["d"][:, None], None


def _q4_1(b: np.ndarray, out: U8) -> Decoded:
    _nibbles(b["qs"][:, None], out)  # w = d * q + m
    return b["d"][:, None], b["m"][:, None]


def _q5_0(b: np.ndarray, out: U8) -> Decoded:
    _fives(b, out)  # w = d * (q - 16)
    return b["d"][:, None], None


def _q5_1(b: np.ndarray, out: U8) -> Decoded:
    _fives(b, out)  # w = d * q + m
    return b["d"][:, None], b["m"][:, None]


def _q8_0(b: np.ndarray, out: U8) -> Decoded:
    np.bitwise_xor(b["qs"], 128, out=out)  # w = d * q, q signed: q + 128 flips the top bit
    return b["d"][:, None], None


def _q2_k(b: np.ndarray, out: U8) -> Decoded:
    _crumbs(b["qs"], out)  # w = d * (low nibble) * q - dmin * (high nibble)
    s = b["scales"]
    return _product(b["d"], s & 15), _product(b["dmin"], -(s >> 4).astype(np.int8))


def _q3_k(b: np.ndarray, out: U8) -> Decoded:
    _crumbs(b["qs"], out)  # w = d * (sc - 32) * (q - 4), q of 3 bits; the zero point of an int4 format is 8
    out += _planes(b["hmask"], 4).reshape(out.shape)
    out += np.uint8(4)
    s = b["scales"]
    low = np.concatenate([s[:, :8] & 15, s[:, :8] >> 4], axis=1)
    high = np.concatenate([(s[:, 8:] >> np.uint8(i)) & 3 for i in (0, 2, 4, 6)], axis=1)
    return _product(b["d"], (low | high << np.uint8(4)).view(np.int8) - np.int8(32)), None


def _q4_k(b: np.ndarray, out: U8) -> Decoded:
    _nibbles(b["qs"].reshape(-1, 4, 32), out)  # w = d * sc * q - dmin * m
    scales, mins = _six_bit(b["scales"])
    return _product(b["d"], scales), _product(b["dmin"], -mins.astype(np.int8))


def _q5_k(b: np.ndarray, out: U8) -> Decoded:
    decoded = _q4_k(b, out)
    out += _planes(b["qh"], 16).reshape(out.shape)
    return decoded


def _q6_k(b: np.ndarray, out: U8) -> Decoded:
    """w = d * sc * (q - 32): low nibbles of ql serve codes 0-63 of a half, high ones 64-127; qh the two bits above."""
    _crumbs(b["qh"], out)
    ql = np.ascontiguousarray(b["ql"]).reshape(-1, 2, 1, 64)
    low = np.concatenate([ql & 15, ql >> 4], axis=2).reshape(out.shape)
    out <<= np.uint8(4)
    out |= low
    return _product(b["d"], b["scales"]), None


def _type(name: str, block: int, fields: list[tuple], format: LinearFormat, decode: Decoder) -> TensorType:
    struct = np.dtype(fields)
    return TensorType(name, block, struct.itemsize, format, (struct, decode))


def _int(bits: WeightBits, group: int, mins: bool = False) -> LinearFormat:
    return LinearFormat(bits, group, has_mins=mins)


_D, _M, _DMIN = ("d", "<f2"), ("m", "<f2"), ("dmin", "<f2")


def _bytes(name: str, n: int) -> tuple[str, str, tuple[int]]:
    return (name, "u1", (n,))


TENSOR_TYPES: dict[int, TensorType] = {
    0: TensorType("F32", 1, 4, dense_format("float32")),
    1: TensorType("F16", 1, 2, dense_format("float16")),
    30: TensorType("BF16", 1, 2, dense_format("bfloat16")),
    2: _type("Q4_0", 32, [_D, _bytes("qs", 16)], _int(4, 32), _q4_0),
    3: _type("Q4_1", 32, [_D, _M, _bytes("qs", 16)], _int(4, 32, mins=True), _q4_1),
    6: _type("Q5_0", 32, [_D, _bytes("qh", 4), _bytes("qs", 16)], _int(5, 32), _q5_0),
    7: _type("Q5_1", 32, [_D, _M, _bytes("qh", 4), _bytes("qs", 16)], _int(5, 32, mins=True), _q5_1),
    8: _type("Q8_0", 32, [_D, _bytes("qs", 32)], _int(8, 32), _q8_0),
    10: _type("Q2_K", 256, [_bytes("scales", 16), _bytes("qs", 64), _D, _DMIN], _int(4, 16, mins=True), _q2_k),
    11: _type("Q3_K", 256, [_bytes("hmask", 32), _bytes("qs", 64), _bytes("scales", 12), _D], _int(4, 16), _q3_k),
    12: _type("Q4_K", 256, [_D, _DMIN, _bytes("scales", 12), _bytes("qs", 128)], _int(4, 32, mins=True), _q4_k),
    13: _type(
        "Q5_K",
        256,
        [_D, _DMIN, _bytes("scales", 12), _bytes("qh", 32), _bytes("qs", 128)],
        _int(5, 32, mins=True),
        _q5_k,
    ),
    14: _type("Q6_K", 256, [_bytes("ql", 128), _bytes("qh", 64), ("scales", "i1", (16,)), _D], _int(6, 16), _q6_k),
}
"""By ggml type id."""


def decode_blocks(kind: TensorType, raw: U8, codes: U8, scales: F16, mins: F16 | None) -> None:
    """Bytes of whole blocks of a quantised type -> codes [n, K], scales and mins [n, K / group], all contiguous.

    The decoders above define the result; the native extension, where it is there, gives the same, in parallel.
    """
    if native := extension():
        native.gguf_decode(kind.name, raw, codes, scales, mins)
        return
    assert kind.codec is not None
    struct, decode = kind.codec
    s, m = decode(raw.view(struct), codes.reshape(-1, kind.block))
    scales[:] = s.reshape(scales.shape)
    if mins is not None and m is not None:
        mins[:] = m.reshape(mins.shape)


UNSUPPORTED_TYPES: dict[int, str] = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
"""Names of ggml types that exist but are not read, for the error message."""
