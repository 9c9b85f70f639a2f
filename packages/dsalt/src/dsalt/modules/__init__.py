"""Layers of a transformer on window + landmark attention."""

from __future__ import annotations

from .._cache import AttentionCache
from .attention import DSALTAttention
from .scorer import HybridEnergyScorer, Landmarks
from .transformer import DSALTBlock, DSALTTransformer, SwiGLU, TransformerOutput
from .windows import WindowSizePredictor, window_regulariser

__all__ = [
    "AttentionCache",
    "DSALTAttention",
    "DSALTBlock",
    "DSALTTransformer",
    "HybridEnergyScorer",
    "Landmarks",
    "SwiGLU",
    "TransformerOutput",
    "WindowSizePredictor",
    "window_regulariser",
]
