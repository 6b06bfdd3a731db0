"""Questions about weight names that readers, converters and the graph share (the lists themselves: layout.py)."""

from __future__ import annotations

from collections.abc import Mapping

from qwen_rt.checkpoint.base import Checkpoint
from qwen_rt.checkpoint.layout import Shape, expected_shapes
from qwen_rt.config import ModelConfig
from qwen_rt.errors import CheckpointError


def model_names(config: ModelConfig) -> tuple[dict[str, tuple[int, int]], dict[str, Shape]]:
    """(linears [N, K], other tensors) of a model, named as in checkpoint/base.py; biases belong to their linears."""
    linears: dict[str, tuple[int, int]] = {}
    tensors: dict[str, Shape] = {}
    for name, shape in expected_shapes(config).items():
        if len(shape) == 2:
            linears[name.removesuffix(".weight")] = (shape[0], shape[1])
        elif name.endswith(".weight"):
            tensors[name] = shape
    return linears, tensors


def in_layer(name: str) -> bool:
    """True for the linears of the layers, those that quantisation replaces; False for embedding and head."""
    return name.startswith(("model.layers.", "transformer.h."))


def verify_names(
    checkpoint: Checkpoint, expected_linears: Mapping[str, Shape], expected_tensors: Mapping[str, Shape]
) -> None:
    """Raise one CheckpointError that lists every missing, extra and wrong-shaped weight.

    With `config.tied_head` an lm_head may be there or not.
    """
    found: dict[str, Shape] = {**checkpoint.linears(), **checkpoint.tensors()}
    expected = {**expected_linears, **expected_tensors}
    if checkpoint.config.tied_head and ("lm_head" in found) != ("lm_head" in expected):
        found.pop("lm_head", None)
        expected.pop("lm_head", None)
    wrong = [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    kinds = (
        ("missing", sorted(expected.keys() - found.keys())),
        ("extra", sorted(found.keys() - expected.keys())),
        ("of a wrong shape", wrong),
    )
    problems = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in kinds if names]
    if problems:
        raise CheckpointError(
            f"{checkpoint.source}: its weights are not those of its config: {'; '.join(problems)}; "
            "a part is missing or they belong to different models: fetch the model again"
        )
