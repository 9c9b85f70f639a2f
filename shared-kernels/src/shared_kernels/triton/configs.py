"""Tiles, warps and stages. Data only: the first entry of a key is the default."""

from ..configs import ANY, Config, Table

KNN_FORWARD = Table(
    "shared_kernels knn forward",
    {(ANY, ANY): (Config(BLOCK_Q=64, BLOCK_K=32, num_warps=8, why="fp32: 64 keys spill"),)},
    axis="features",
)
