"""The picture shows what the attention does."""

from __future__ import annotations

import pytest
import torch

from dsalt import plot_attention_pattern, select_landmarks
from dsalt.kernels import dsalt_attention
from shared_kernels.testing import assert_close


def test_weights_windows_and_landmarks_are_drawn(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    Q, K = torch.randn(1, 4, 60, 8), torch.randn(1, 2, 60, 8)
    windows = 5 + 10 * torch.rand(1, 4, 60)
    idx = select_landmarks(torch.randn(1, 4, 60), 3, landmark_block=8)
    options = {"landmark_block": 8, "landmark_bias": torch.randn(idx.shape), "window_ramp": 4.0}
    ax = plot_attention_pattern(Q, K, windows, idx, head=3, **options)
    drawn = torch.tensor(ax.images[0].get_array().filled(float("nan")))
    weights = torch.where(drawn.isnan(), 0, 10.0**drawn)
    # each column of the weights is the output for a value that is one at that key
    for j in range(0, 60, 8):
        V = torch.zeros(1, 2, 60, 8)
        V[0, 1, range(j, min(60, j + 8)), range(min(8, 60 - j))] = 1
        exact = dsalt_attention(Q, K, V, windows, idx, **options)[0, 3, :, : min(8, 60 - j)]
        assert_close(weights[:, j : j + 8], exact.clamp(max=1), scale=10)  # drawn as logarithms
    assert bool(drawn.triu(1).isnan()[torch.ones(60, 60).triu(1) > 0].all())
    (edge,) = [line for line in ax.lines if line.get_label() == "window edge"]
    exact_edge = (torch.arange(60) - windows[0, 3]).clamp(min=0)
    assert_close(torch.tensor(edge.get_xdata()), exact_edge)
    ax.figure.savefig(tmp_path / "pattern.png")
    assert (tmp_path / "pattern.png").stat().st_size > 5000
    pyplot.close(ax.figure)


def test_bad_heads():
    Q = torch.randn(1, 2, 10, 4)
    given = (Q, Q, torch.ones(1, 2, 10), torch.zeros(1, 2, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"`head` must be in \[0, 2\), got 2"):
        plot_attention_pattern(*given, head=2)
