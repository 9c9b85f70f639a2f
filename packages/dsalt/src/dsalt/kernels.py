"""Window + landmark attention and the choice of landmarks: the functions, and the scorer."""

from ._scorer import HybridEnergyScorer, Landmarks
from .api import (
    compute_hybrid_energy_scores,
    dsalt_attention,
    explain,
    hybrid_energy,
    select_landmarks,
)

__all__ = [
    "HybridEnergyScorer",
    "Landmarks",
    "compute_hybrid_energy_scores",
    "dsalt_attention",
    "explain",
    "hybrid_energy",
    "select_landmarks",
]
