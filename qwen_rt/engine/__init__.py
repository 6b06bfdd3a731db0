"""Request, scheduler, runner: continuous batching over one model and one paged cache."""

from qwen_rt.engine.engine import Engine
from qwen_rt.engine.generation_config import GenerationConfig
from qwen_rt.engine.params import SamplingParams
from qwen_rt.engine.sequence import FinishReason, Output, Request, TokenLogprob

__all__ = ["Engine", "FinishReason", "GenerationConfig", "Output", "Request", "SamplingParams", "TokenLogprob"]
