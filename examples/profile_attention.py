"""Where the time goes: a small model under torch's profiler, on a GPU if there is one.

    python examples/profile_attention.py [--length 1024] [--out lessons]

Four questions that are worth asking before a model is blamed for being slow: which backend really
ran, which part of the model takes the time, which operators that part is made of, and how much
memory it holds. On a GPU the times are the kernels'; on a CPU they are the operators'. The trace
(lessons/trace.json) opens in chrome://tracing and in Perfetto.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import adasplash
from adasplash import EntmaxAttention
from diffmax import diffmax_bisect
from dsalt import DSALTAttention

PARTS = ("entmax attention", "window attention", "feed-forward", "readout", "backward")


class Model(nn.Module):
    """Two kinds of attention, a feed-forward layer and a sparse readout; every part has a name."""

    def __init__(self, d: int = 64) -> None:
        super().__init__()
        self.entmax = EntmaxAttention(d, n_heads=4, causal=True)
        self.window = DSALTAttention(d, n_heads=4, n_min=16, n_max=64, k_lmk=8)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
        self.classes = nn.Linear(d, 32)

    def forward(self, x: Tensor) -> Tensor:
        with record_function("entmax attention"):
            x = x + self.entmax(x)
        with record_function("window attention"):
            x = x + self.window(x)[0]
        with record_function("feed-forward"):
            x = x + self.mlp(x)
        with record_function("readout"):
            return diffmax_bisect(self.classes(x), 0.5)


def step(model: Model, x: Tensor) -> None:
    loss = model(x).square().mean()
    with record_function("backward"):
        loss.backward()


def measured(event: Any, on_gpu: bool) -> float:
    """Milliseconds with everything inside: of kernels on a GPU, of operators on a CPU."""
    return (event.device_time_total if on_gpu else event.cpu_time_total) / 1e3


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=Path("lessons"))
    options = parser.parse_args(arguments)

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(0)
    model, x = Model().to(device), torch.randn(1, options.length, 64, device=device)

    q = torch.randn(1, 4, options.length, 16, device=device)
    print("1. Which backend runs?")
    print(adasplash.explain(adasplash.adasplash, q, q, q))

    # the first step compiles kernels and fills caches: it is not what you want to see
    step(model, x)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, profile_memory=True) as profiler:
        step(model, x)
        if on_gpu:
            torch.cuda.synchronize()
    events = profiler.key_averages()

    named = {event.key: event for event in events}
    parts = {name: measured(named[name], on_gpu) for name in PARTS if name in named}
    print("\n2. Which part takes the time?")
    for name, milliseconds in parts.items():
        print(f"   {name}: {milliseconds:.1f} ms")
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    operators = sorted(
        (event for event in events if event.key not in PARTS),
        key=lambda event: getattr(event, own),
        reverse=True,
    )[:8]
    print("\n3. Which operators?")
    for event in operators[:5]:
        print(f"   {event.key}: {getattr(event, own) / 1e3:.1f} ms in {event.count} calls")
    most = max(events, key=lambda event: event.self_cpu_memory_usage)
    print(
        f"\n4. What holds memory? {most.key}: {most.self_cpu_memory_usage / 1e6:.1f} MB on the CPU"
    )
    if on_gpu:
        print(f"   {torch.cuda.max_memory_allocated() / 1e6:.1f} MB on the GPU at most")

    import matplotlib.pyplot as plt

    plt.style.use("shared_kernels.pictures")

    options.out.mkdir(parents=True, exist_ok=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.4))
    left.barh(list(parts), list(parts.values()))
    right.barh([event.key[:24] for event in operators], [getattr(e, own) / 1e3 for e in operators])
    for ax, title in ((left, "parts of the model"), (right, "operators alone")):
        ax.invert_yaxis()
        ax.set(xlabel="ms", title=f"{title}, {device.type}")
    figure.savefig(options.out / "profile.png")
    plt.close(figure)
    profiler.export_chrome_trace(str(options.out / "trace.json"))
    print(f"drew {options.out / 'profile.png'}")
    return parts


if __name__ == "__main__":
    main()
