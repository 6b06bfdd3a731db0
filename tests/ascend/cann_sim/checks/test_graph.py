"""A captured step through torch_npu's NPUGraph: new inputs, updated lengths. Not under ASCEND_LAUNCH_BLOCKING, where
torch_npu waits for the replay before the update that the replay waits for."""

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor

D = "npu:0"


def test_a_captured_step_follows_new_inputs_and_updated_lengths() -> None:
    query = torch.zeros(2, 1, 256, dtype=torch.float16, device=D)
    pages = [torch.randn(5, 128, 128).half().to(D) for _ in "kv"]
    table = torch.tensor([[3, 1], [4, 0]], dtype=torch.int32).to(D)

    def step(lens: list[int]) -> Tensor:
        out = torch_npu.npu_fused_infer_attention_score(
            query, *pages, num_heads=4, num_key_value_heads=2, input_layout="BSH", scale=0.125, block_size=128,
            block_table=table, actual_seq_lengths_kv=lens,
        )[0]  # fmt: skip
        return out * 2

    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, auto_dispatch_capture=True):
        out = step([5, 7])
    for lens in ([130, 7], [1, 200]):
        query.copy_(torch.randn(2, 1, 256).half())
        graph.replay()
        graph.update(cpu_update_input=[{"actual_seq_lengths_kv": lens}])
        torch.npu.synchronize()
        got = out.cpu()
        assert torch.equal(got, step(lens).cpu())
        assert not torch.equal(got, step([5, 7]).cpu())
