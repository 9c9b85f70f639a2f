"""ONNX: rows become standard operators by the table of decompositions, and keep their numbers."""

from __future__ import annotations

import pytest
import torch

from adasplash import triton_entmax, triton_entmax15, triton_sparsemax
from shared_kernels import ops
from shared_kernels.testing import assert_close, others_thorough

pytestmark = pytest.mark.extras


class Rows(torch.nn.Module):
    """A function of rows after a causal mask, whose first row has one key."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        hidden = torch.ones(x.shape[-2], x.shape[-1], dtype=torch.bool, device=x.device).triu(1)
        return self.function(x.masked_fill(hidden, -torch.inf))


FUNCTIONS = {
    "entmax15": triton_entmax15,
    "sparsemax": triton_sparsemax,
    "alpha of each head": lambda x: triton_entmax(x, torch.tensor([1.2, 1.5, 2.0]).view(3, 1, 1)),
    "other dim": lambda x: triton_entmax(x, 1.7, dim=-2),
}


@pytest.mark.parametrize("name", others_thorough(FUNCTIONS))
def test_onnx_gives_the_same_weights(name, tmp_path):
    from onnx.reference import ReferenceEvaluator

    module = Rows(FUNCTIONS[name]).eval()
    x = 3 * torch.randn(2, 3, 20, 20)
    program = torch.export.export(module, (x,)).run_decompositions(ops.decompositions())
    path = tmp_path / "rows.onnx"
    torch.onnx.export(program, (x,), str(path), dynamo=True, verbose=False)
    graph = ReferenceEvaluator(str(path))
    assert all(node.domain == "" for node in graph.nodes_)  # nothing of ours is left
    for inputs in (x, torch.zeros_like(x), 100 * x):
        (found,) = graph.run(None, {graph.input_names[0]: inputs.numpy()})
        with torch.no_grad():
            assert_close(torch.from_numpy(found), module(inputs))
