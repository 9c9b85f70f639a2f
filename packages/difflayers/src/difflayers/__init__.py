"""Modern Hopfield memories as layers, smoothed over a kNN graph of their patterns."""

from shared_kernels.installed import warn_of_another_project

from ._version import __version__ as __version__
from .activation import HopfieldCore
from .api import energy, explain, retrieve
from .attention_operator import AttentionOperator
from .diffused_attention import DiffusedHopfield
from .diffusion import (
    DiffusionOperator,
    FactoredDiffusion,
    IterativeDiffusion,
    SimpleDiffusion,
    SpectralDiffusion,
    apply_diffusion,
)
from .dynamics_engine import DiffusionConfig, DynamicsEngine, EnergyTracker, GraphCache
from .graph.builder import GraphBuilder
from .graph.laplacian_builder import LaplacianBuilder
from .hopfield import Hopfield
from .learned import HopfieldLayer, HopfieldPooling
from .pages import PatternPages
from .transformer import HopfieldDecoderLayer, HopfieldEncoderLayer

__all__ = [
    "AttentionOperator",
    "DiffusedHopfield",
    "DiffusionConfig",
    "DiffusionOperator",
    "DynamicsEngine",
    "EnergyTracker",
    "FactoredDiffusion",
    "GraphBuilder",
    "GraphCache",
    "Hopfield",
    "HopfieldCore",
    "HopfieldDecoderLayer",
    "HopfieldEncoderLayer",
    "HopfieldLayer",
    "HopfieldPooling",
    "IterativeDiffusion",
    "LaplacianBuilder",
    "PatternPages",
    "SimpleDiffusion",
    "SpectralDiffusion",
    "__version__",
    "apply_diffusion",
    "energy",
    "explain",
    "retrieve",
]

warn_of_another_project(__name__)
