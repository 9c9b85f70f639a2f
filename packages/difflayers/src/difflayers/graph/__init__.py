"""Neighbour graphs of patterns and their Laplacians."""

from .build_graph import build_knn_graph, build_similarity_matrix
from .builder import GraphBuilder
from .laplacian import compute_laplacian, compute_normalized_laplacian
from .laplacian_builder import LaplacianBuilder
from .ranks import RankLaplacian

__all__ = [
    "GraphBuilder",
    "LaplacianBuilder",
    "RankLaplacian",
    "build_knn_graph",
    "build_similarity_matrix",
    "compute_laplacian",
    "compute_normalized_laplacian",
]
