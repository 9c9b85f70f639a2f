"""Window + landmark attention whose windows learn, a language model on it and its trainer.

O((w + K) N) on CPU and GPU, strictly causal.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from shared_kernels.installed import warn_of_another_project

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
from .published import (
    RMSENorm,
    RMSNorm,
    SwiGLUFFN,
    apply_rotary_emb,
    build_rope_cache,
    compute_landmark_idx,
    get_cosine_schedule_with_warmup,
)

if TYPE_CHECKING:
    from .huggingface import DSALTConfig as DSALTConfig
    from .huggingface import DSALTForCausalLM as DSALTForCausalLM
    from .training import DSALTTrainer, Schedule, TrainConfig, TrainerCallback

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
    "RMSENorm",
    "RMSNorm",
    "Schedule",
    "SwiGLU",
    "SwiGLUFFN",
    "TrainConfig",
    "TrainerCallback",
    "TransformerOutput",
    "WindowSizePredictor",
    "__version__",
    "apply_rotary_emb",
    "build_rope_cache",
    "compute_hybrid_energy_scores",
    "compute_landmark_idx",
    "dsalt_attention",
    "explain",
    "get_cosine_schedule_with_warmup",
    "hybrid_energy",
    "plot_attention_pattern",
    "select_landmarks",
    "window_regulariser",
]

warn_of_another_project(__name__)


# Found on first use: `python -m dsalt.training` must not find it imported already, and
# transformers is an optional package.
_LAZY = {
    "DSALTTrainer": "training",
    "Schedule": "training",
    "TrainConfig": "training",
    "TrainerCallback": "training",
    "DSALTConfig": "huggingface",
    "DSALTForCausalLM": "huggingface",
}

if not TYPE_CHECKING:

    def __getattr__(name):
        if name in _LAZY:
            return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
