"""Peak memory and time of the loss of a large vocabulary: all logits at once, and in chunks.

    python packages/dsalt/results/loss.py            # measures, writes loss.json
    python packages/dsalt/results/loss.py --table

Forward and backward of mean cross-entropy of a linear head, float32, V = 128 000, d = 256, on one
thread of the CPU; memory counted by PyTorch's allocator. All logits of 8192 tokens are 4.2 GB and
three such tensors exist at once: that side is measured on 256 and on 512 tokens and carried on
along the line through both. Times are CPU time of both sides in turn in one process, 512 tokens,
medians.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsalt import _loss
from shared_kernels.testing.memory import measure_memory

RESULTS = Path(__file__).with_suffix(".json")
V, D, TOKENS, FEW, REPEATS = 128_000, 256, 8192, 512, 5


def whole(hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden), labels)


def chunks(hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    return _loss.linear_cross_entropy(hidden, head, labels, V)


def make(tokens: int) -> tuple[Tensor, nn.Module, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, D, requires_grad=True)
    return hidden, nn.Linear(D, V, bias=False), torch.randint(0, V, (tokens,))


def peak(loss, tokens: int) -> int:
    given = make(tokens)
    return measure_memory(lambda: loss(*given).backward()).peak


def seconds(loss, given) -> float:
    begin = time.process_time()
    loss(*given).backward()
    return time.process_time() - begin


def measure() -> dict:
    torch.set_num_threads(1)
    some, twice = peak(whole, FEW // 2), peak(whole, FEW)
    all_logits = some + (twice - some) * (TOKENS - FEW // 2) // (FEW // 2)
    ours = peak(chunks, TOKENS)
    given = make(FEW)
    pairs = [(seconds(whole, given), seconds(chunks, given)) for _ in range(REPEATS)]
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "commit": commit,
        "peak_all_logits_mb": round(all_logits / 1e6),
        "peak_all_logits_measured_mb": {FEW // 2: round(some / 1e6), FEW: round(twice / 1e6)},
        "peak_chunks_mb": round(ours / 1e6),
        "memory_ratio": round(ours / all_logits, 4),
        "seconds_all_logits": round(a, 3),
        "seconds_chunks": round(b, 3),
        "time_ratio": round(statistics.median(y / x for x, y in pairs), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true")
    if not parser.parse_args().table:
        RESULTS.write_text(json.dumps(measure(), indent=2) + "\n", encoding="utf-8")
    for name, value in json.loads(RESULTS.read_text(encoding="utf-8")).items():
        sys.stdout.write(f"{name:30s} {value}\n")


if __name__ == "__main__":
    main()
