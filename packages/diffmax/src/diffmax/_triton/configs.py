"""Tiles, warps and stages. Data only: the first entry of a key is the default."""

from shared_kernels.configs import ANY, Config, Table

LINEAR = Table(
    "diffmax linear loss",
    {
        (ANY, ANY): (
            Config(BLOCK_R=64, BLOCK_V=32, BLOCK_D=64, num_warps=8, why="64 columns spill"),
        )
    },
    axis="features",
)

LINEAR_FP32 = Table(
    "diffmax linear loss, fp32",
    {
        (ANY, ANY): (
            Config(BLOCK_R=64, BLOCK_V=32, BLOCK_D=32, num_warps=8, why="fp32: 64 columns spill"),
        )
    },
    axis="features",
)

# No matrix unit takes fp64 everywhere: products are summed one by one.
LINEAR_FP64 = Table(
    "diffmax linear loss, fp64",
    {
        (ANY, ANY): (
            Config(BLOCK_R=16, BLOCK_V=32, BLOCK_D=8, num_warps=8, why="16 products a thread"),
        )
    },
    axis="features",
)
