"""Peak memory of training: dense with an N x N matrix, PyTorch's fused attention, DSALT.

    python packages/dsalt/results/memory.py            # measures, writes memory.json
    python packages/dsalt/results/memory.py --table

On the CPU, in float32, counted by PyTorch's allocator: the most that is held at once beyond the
weights, their gradients and the input. The body is 12 blocks of width 1024 with 16 heads on a batch
of 4 sequences of 1024 tokens; the operator is one layer's attention without its projections.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from language_model import Dense, fused, materialised
from torch import Tensor

from dsalt.kernels import dsalt_attention
from dsalt.modules import DSALTTransformer
from shared_kernels.testing.memory import measure_memory

RESULTS = Path(__file__).with_suffix(".json")
D_MODEL, HEADS, LAYERS = 1024, 16, 12
N_MIN, N_MAX, K = 32, 512, 64
ARMS = ("dense, N x N in memory", "dense, fused (SDPA)", "DSALT")
SIZES = {"operator, 4 x 1024": (4, 1024), "operator, 1 x 4096": (1, 4096)}


def attention(arm: str, N: int, B: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if arm == ARMS[0]:
        return materialised
    if arm == ARMS[1]:
        return fused
    windows = N_MIN + (N_MAX - N_MIN) * torch.rand(B, HEADS, N)
    landmarks = torch.rand(B, HEADS, N).topk(K, -1).indices.sort(-1).values.to(torch.int32)
    windows.requires_grad_()
    return lambda q, k, v: dsalt_attention(q, k, v, windows, landmarks)


def operator(arm: str, B: int, N: int) -> int:
    torch.manual_seed(0)
    qkv = torch.randn(3, B, HEADS, N, D_MODEL // HEADS).requires_grad_()
    function = attention(arm, N, B)
    qkv.grad = torch.zeros_like(qkv)
    upstream = torch.randn(B, HEADS, N, D_MODEL // HEADS)
    return measure_memory(lambda: function(*qkv).backward(upstream)).peak


def body(arm: str) -> int:
    torch.manual_seed(0)
    model = DSALTTransformer(D_MODEL, HEADS, LAYERS, N_MIN, N_MAX, K)
    if arm != "DSALT":
        for block in model.blocks:
            block.attention = Dense(D_MODEL, HEADS, materialise=arm == ARMS[0])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    x, upstream = torch.randn(2, 4, 1024, D_MODEL)
    return measure_memory(lambda: model(x).backward(upstream)).peak


def cases() -> dict[str, Callable[[str], int]]:
    found: dict[str, Callable[[str], int]] = {
        name: lambda arm, size=size: operator(arm, *size) for name, size in SIZES.items()
    }
    return {**found, "body, 4 x 1024": body}


def table(measured: dict[str, dict[str, int]]) -> str:
    lines = ["| peak in MB | " + " | ".join(ARMS) + " |", "|---" * (len(ARMS) + 1) + "|"]
    for name, by_arm in measured.items():
        if len(by_arm) < len(ARMS):
            continue
        base = by_arm[ARMS[0]]
        cells = [f"{by_arm[arm] / 1e6:.0f} ({by_arm[arm] / base:.2f}x)" for arm in ARMS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--arm", default="", help="arms whose name contains this")
    parser.add_argument("--table", action="store_true", help="show the results, measure nothing")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    stored = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"bytes": {}}
    command = ["git", "rev-parse", "--short", "HEAD"]
    for name, call in ({} if chosen.table else cases()).items():
        for arm in ARMS:
            if chosen.only in name and chosen.arm in arm:
                stored["bytes"].setdefault(name, {})[arm] = call(arm)
                stored |= {
                    "date": datetime.date.today().isoformat(),
                    "commit": subprocess.run(command, capture_output=True, text=True).stdout[:-1],
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                    "device": f"cpu ({platform.machine()}), float32",
                }
                RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
    sys.stdout.write(table(stored["bytes"]) + "\n")


if __name__ == "__main__":
    main()
