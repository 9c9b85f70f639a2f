"""Window + landmark attention whose windows learn, a language model on it and its trainer.

O((w + K) N) on CPU and GPU, strictly causal.
"""

from __future__ import annotations

from typing import Any

from ._version import __version__
from .kernels import (
    HybridEnergyScorer,
    Landmarks,
    compute_hybrid_energy_scores,
    dsalt_attention,
    explain,
    hybrid_energy,
    select_landmarks,
)
from .model import DSALTLMHeadModel, LMOutput
from .modules import (
    AttentionCache,
    DSALTAttention,
    DSALTBlock,
    DSALTTransformer,
    SwiGLU,
    TransformerOutput,
    WindowSizePredictor,
    window_regulariser,
)
from .plotting import plot_attention_pattern

__all__ = [
    "AttentionCache",
    "DSALTAttention",
    "DSALTBlock",
    "DSALTLMHeadModel",
    "DSALTTrainer",
    "DSALTTransformer",
    "HybridEnergyScorer",
    "LMOutput",
    "Landmarks",
    "SwiGLU",
    "TrainerCallback",
    "TransformerOutput",
    "WindowSizePredictor",
    "__version__",
    "compute_hybrid_energy_scores",
    "dsalt_attention",
    "explain",
    "hybrid_energy",
    "plot_attention_pattern",
    "select_landmarks",
    "window_regulariser",
]


def __getattr__(name: str) -> Any:
    # the trainer on first use: `python -m dsalt.training` must not find it imported already
    if name in ("DSALTTrainer", "TrainerCallback"):
        from . import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
