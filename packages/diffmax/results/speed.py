"""What diffmax costs on one CPU thread beside torch.softmax, entmax and its own floor.

`python packages/diffmax/results/speed.py` writes `speed.jsonl`: nanoseconds of CPU time for each
score, medians, all calls of a size interleaved in one process. The floor of a real power is
`log2` and `exp2`, the fastest way to it in PyTorch.
"""

from __future__ import annotations

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

from diffmax import diffmax_bisect

HERE = Path(__file__).parent
SHAPES = ((8192, 64), (1024, 512), (128, 4096), (8, 65536))
ALPHAS = (0.05, 0.3, 0.5, 0.85)


def calls(X: torch.Tensor, G: torch.Tensor) -> dict[str, Callable[[], Any]]:
    x, y, out = X.clone().requires_grad_(), X.softmax(-1), torch.empty_like(X)

    def gradient(weights: torch.Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(weights, x, G, retain_graph=True)

    found: dict[str, Callable[[], Any]] = {
        "softmax": lambda: torch.softmax(X, -1),
        "softmax backward": gradient(torch.softmax(x, -1)),
        "log2": lambda: torch.log2(y, out=out),
        "exp2": lambda: torch.exp2(X, out=out),
        "pow": lambda: torch.pow(y, 0.85, out=out),
        "clamp and rsqrt": lambda: torch.clamp(y, min=1e-37, out=out).rsqrt_(),
    }
    for alpha in ALPHAS:
        found[f"diffmax {alpha}"] = lambda alpha=alpha: diffmax_bisect(X, alpha)
        found[f"diffmax {alpha} with gradient"] = lambda alpha=alpha: diffmax_bisect(x, alpha)
        found[f"diffmax {alpha} backward"] = gradient(diffmax_bisect(x, alpha))
    try:
        import entmax
    except ImportError:
        return found
    for alpha in ALPHAS:
        found[f"entmax {alpha}"] = lambda alpha=alpha: entmax.entmax_bisect(X, 2 - alpha)
        found[f"entmax {alpha} backward"] = gradient(entmax.entmax_bisect(x, 2 - alpha))
    return found


def main() -> None:
    torch.set_num_threads(1)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
    )
    origin = {
        "command": "python packages/diffmax/results/speed.py",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"cpu ({platform.machine()}), one thread",
        "commit": commit.stdout.strip() or "unknown",
    }
    with (HERE / "speed.jsonl").open("w", encoding="utf-8") as file:
        for shape in SHAPES:
            generator = torch.Generator().manual_seed(shape[1])
            X, G = (torch.randn(*shape, generator=generator) for _ in range(2))
            seen: dict[str, list[float]] = {}
            for _ in range(9):
                for name, call in calls(X, G).items():
                    if not name.startswith("entmax"):
                        call()  # nobody pays for the cache that the one before left behind
                    start = time.process_time()
                    call()
                    seen.setdefault(name, []).append(time.process_time() - start)
            found = {n: round(statistics.median(t) * 1e9 / X.numel(), 3) for n, t in seen.items()}
            file.write(json.dumps({"shape": shape, "ns": found, **origin}) + "\n")


if __name__ == "__main__":
    main()
