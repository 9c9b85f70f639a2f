"""ONNX: rows become standard operators by the table of decompositions, and keep their numbers."""

from __future__ import annotations

import pytest
import torch

from diffmax import DiffmaxBisectModule, HillMap
from shared_kernels import ops
from shared_kernels.testing import assert_close, others_thorough

pytestmark = pytest.mark.extras


class Rows(torch.nn.Module):
    """The layer after a causal mask, whose first row has one key."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.layer = DiffmaxBisectModule(**options)

    def forward(self, x):
        hidden = torch.ones(x.shape[-2], x.shape[-1], dtype=torch.bool, device=x.device).triu(1)
        return self.layer(x.masked_fill(hidden, -torch.inf))


@pytest.mark.parametrize(
    "options",
    others_thorough(
        [
            {"alpha": 0.85, "alpha_map": HillMap(c=0.3)},
            {"alpha": 0.5},
            {"alpha": 0.5, "dim": -2},
        ]
    ),
    ids=str,
)
def test_onnx_gives_the_same_weights(options, tmp_path):
    from onnx.reference import ReferenceEvaluator

    module = Rows(**options).eval()
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
