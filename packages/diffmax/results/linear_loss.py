"""What `diffmax_linear_loss` costs beside cross entropy, forward and backward, on one CPU thread.

`python packages/diffmax/results/linear_loss.py` writes `linear_loss.jsonl`: medians of CPU time in
seconds, all calls of a size interleaved in one process, and the most memory held at once beyond the
returned gradients. The logits are those of rows that point at their target in noise; how sharply
they do decides the share of the vocabulary that has a weight above zero.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmax import diffmax_bisect, diffmax_linear_loss
from shared_kernels.testing.memory import measure_memory

HERE = Path(__file__).parent
D, V, ALPHA = 512, 128_000, 0.5
# rows, sharpness, repeats: one case in full, and a sweep of the density on fewer rows
SWEEP = (1.0, 0.5, 0.15, 0.1, 0.03, 1e-3)
CASES = ((2048, 0.25, 3), *((1024, sharpness, 2) for sharpness in SWEEP))


def inputs(n: int, sharpness: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=generator) / D**0.5
    spread = 0.75 + 0.5 * torch.rand(n, 1, generator=generator)
    target = torch.randint(V, (n,), generator=generator)
    noise = torch.randn(n, D, generator=generator) * spread
    return sharpness * (noise + 2 * weight[target]), weight, target


def cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, target)


class Chunked(torch.autograd.Function):
    """Cross entropy whose logits are made for some rows at a time, the gradient with them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        d_hidden, d_weight, total = torch.empty_like(hidden), torch.zeros_like(weight), 0.0
        for rows in torch.arange(len(hidden)).split(256):
            logits = hidden[rows] @ weight.T
            lse = logits.logsumexp(-1, keepdim=True)
            total = total + (lse - logits.gather(1, target[rows, None])).sum()
            p = logits.sub_(lse).exp_()
            p[torch.arange(len(rows)), target[rows]] -= 1
            p.div_(len(hidden))
            d_hidden[rows] = p @ weight
            d_weight.addmm_(p.T, hidden[rows])
        ctx.save_for_backward(d_hidden, d_weight)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden.mul_(g), d_weight.mul_(g), None


def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return diffmax_linear_loss(hidden, weight, target, ALPHA)


CALLS: dict[str, Callable[..., Tensor]] = {
    "diffmax_linear_loss": loss,
    "cross_entropy": cross_entropy,
    "chunked cross_entropy": Chunked.apply,
}


def step(call: Callable[..., Tensor], hidden: Tensor, weight: Tensor, target: Tensor) -> None:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    call(hidden, weight, target).backward()


def measure(n: int, sharpness: float, repeats: int) -> dict[str, Any]:
    hidden, weight, target = inputs(n, sharpness)
    p = torch.cat([diffmax_bisect(some @ weight.T, ALPHA) for some in hidden[:64].split(16)])
    share = (p > 0).double().mean(-1)
    del p
    returned = 4 * (hidden.numel() + weight.numel())
    memory = {
        name: measure_memory(lambda call=call: step(call, hidden, weight, target)).peak - returned
        for name, call in CALLS.items()
    }
    seen: dict[str, list[float]] = {name: [] for name in [*CALLS, "product"]}
    for _ in range(repeats):
        for name, call in CALLS.items():
            start = time.process_time()
            step(call, hidden, weight, target)
            seen[name].append(time.process_time() - start)
        start = time.process_time()
        hidden @ weight.T
        seen["product"].append(time.process_time() - start)
    seconds = {name: round(statistics.median(times), 3) for name, times in seen.items()}
    density = {"least": share.min(), "mean": share.mean(), "most": share.max()}
    return {
        "rows": n,
        "sharpness": sharpness,
        "density": {name: float(f"{x:.3g}") for name, x in density.items()},
        "seconds": seconds,
        "times cross_entropy": round(seconds["diffmax_linear_loss"] / seconds["cross_entropy"], 3),
        "bytes": memory,
        "repeats": repeats,
    }


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=str(HERE / "linear_loss.jsonl"))
    parser.add_argument("--only", type=int, nargs="*", default=range(len(CASES)))
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
    )
    origin = {
        "d": D,
        "V": V,
        "alpha": ALPHA,
        "command": "python packages/diffmax/results/linear_loss.py",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"cpu ({platform.machine()}), one thread",
        "commit": commit.stdout.strip() or "unknown",
    }
    with open(options.out, "w", encoding="utf-8") as file:
        for i in options.only:
            found = measure(*CASES[i])
            file.write(json.dumps({**found, **origin}) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
