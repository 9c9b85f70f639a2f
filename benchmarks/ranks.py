"""Sequences that ranks share: bytes beside ring attention's, and time beside one process's.

python -m benchmarks.ranks            # writes benchmarks/results/ranks.json
python -m benchmarks.ranks --lesson   # of it what examples/long_context.py shows alone
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shared_kernels.testing.ranks import on_ranks

RESULTS = Path(__file__).parent / "results" / "ranks.json"
PAGE = Path(__file__).parent.parent / "docs" / "ranks.md"
ATTENTION = {"N": 4096, "H": 4, "D": 64, "alpha": 1.5, "ranks": 4}
LAYER = {"N": 32768, "d_model": 256, "n_heads": 4, "n_max": 256, "k_lmk": 64}


def scores(kind: str, N: int, H: int, D: int) -> tuple[torch.Tensor, ...]:
    """q, k and v (1, H, N, D) whose scores are of a kind."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 1, H, N, D, generator=g)
    v = noise[2]
    if kind == "noise":
        return noise[0], noise[1], v
    if kind == "local":  # scores fall with the distance: pairs of coordinates that turn
        rate = 0.5 * 0.8 ** torch.arange(D // 2)
        angle = torch.arange(N)[:, None] * rate
        x = torch.cat((angle.cos(), angle.sin()), -1).expand(1, H, N, D) * 2.0
        return x + 0.1 * noise[0], x + 0.1 * noise[1], v
    topics = torch.randn(1, H, 32, D, generator=g)
    run = 128 if kind == "topics in runs of 128 tokens" else 1
    topic = torch.randint(32, (N // run,), generator=g).repeat_interleave(run)
    x = topics[:, :, topic] * 1.5
    return x + 0.3 * noise[0], x + 0.3 * noise[1], v


KINDS = ("noise", "topics, shuffled", "topics in runs of 128 tokens", "local")


def attention_bytes(rank: int, kind: str, sizes: dict[str, Any]) -> dict[str, float]:
    """What this rank sends in a forward and in a backward pass of causal attention."""
    from adasplash import adasplash, sequence_places
    from shared_kernels.distributed import Ranks

    q, k, v = scores(kind, sizes["N"], sizes["H"], sizes["D"])
    places = sequence_places(sizes["N"], "world", "zigzag")
    q, k, v = (x[:, :, places].clone().requires_grad_() for x in (q, k, v))
    ranks = Ranks(None)
    ranks.sent = 0
    out = adasplash(
        q, k, v, sizes["alpha"], is_causal=True, group=dist.group.WORLD, layout="zigzag"
    )
    forward, ranks.sent = ranks.sent, 0
    out.sum().backward()
    return {"forward": forward, "backward": ranks.sent}


def ring_bytes(sizes: dict[str, Any]) -> dict[str, float]:
    """The same of ring attention: keys and values go around, in the backward pass twice.

    Once as they are, and with them their gradients, which return to where they began.
    """
    own = 2 * sizes["H"] * sizes["D"] * 4 * sizes["N"] // sizes["ranks"]
    return {
        "forward": (sizes["ranks"] - 1) * own,
        "backward": (sizes["ranks"] - 1) * own + sizes["ranks"] * own,
    }


def attention_table(sizes: dict[str, Any]) -> dict[str, Any]:
    table: dict[str, Any] = {"sizes": sizes, "ring attention": ring_bytes(sizes)}
    for kind in KINDS:
        every = on_ranks(sizes["ranks"], attention_bytes, kind, sizes)
        table[kind] = {
            name: sum(each[name] for each in every) / len(every) for name in ("forward", "backward")
        }
    return table


def layer(sizes: dict[str, Any]) -> Any:
    from dsalt.modules import DSALTAttention

    torch.manual_seed(0)
    options = {name: x for name, x in sizes.items() if name != "N"}
    return DSALTAttention(n_min=32, **options)


def layer_step(attention: Any, x: torch.Tensor, group: Any) -> None:
    x = x.detach().requires_grad_()
    attention(x, group=group)[0].square().mean().backward()


def layer_ranks(rank: int, repeats: int, sizes: dict[str, Any]) -> dict[str, Any]:
    """Seconds of steps of the layer, all ranks together and rank 0 alone, in turns; bytes."""
    from dsalt._context import Chunk
    from shared_kernels.distributed import Ranks

    attention, size = layer(sizes), dist.get_world_size()
    x = torch.randn(1, sizes["N"], sizes["d_model"], generator=torch.Generator().manual_seed(1))
    part = x.chunk(size, 1)[rank]
    wall: dict[str, list[float]] = {"ranks": [], "alone": []}
    cpu: dict[str, list[float]] = {"ranks": [], "alone": []}
    for i in range(repeats + 1):
        for name in wall:
            dist.barrier()
            start, start_cpu = time.perf_counter(), time.process_time()
            if name == "ranks":
                layer_step(attention, part, Chunk.of(dist.group.WORLD, part))
            elif rank == 0:
                layer_step(attention, x, None)
            used = time.process_time() - start_cpu
            dist.barrier()
            if i:  # the first one warms up
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(used)
    ranks = Ranks(None)
    ranks.sent = 0
    layer_step(attention, part, Chunk.of(dist.group.WORLD, part))
    found: dict[str, Any] = {"sent": ranks.sent}
    for kind, every in (("wall", wall), ("cpu", cpu)):
        found[kind] = {name: statistics.median(seconds) for name, seconds in every.items()}
    return found


def layer_table(repeats: int, sizes: dict[str, Any]) -> dict[str, Any]:
    """Wall time needs two idle cores; the CPU time of the slower rank hardly does."""
    every = on_ranks(2, layer_ranks, repeats, sizes)
    wall, alone = every[0]["wall"], every[0]["cpu"]["alone"]
    slowest = max(each["cpu"]["ranks"] for each in every)
    return {
        "sizes": sizes,
        "ranks": 2,
        "repeats": repeats,
        "wall seconds": wall,
        "times faster by wall time": wall["alone"] / wall["ranks"],
        "cpu seconds": {"slower rank": slowest, "alone": alone},
        "times less cpu time": alone / slowest,
        "bytes per rank": max(each["sent"] for each in every),
    }


def lesson(processes: int) -> dict[str, Any]:
    """What examples/long_context.py prints, by as many processes."""
    program = Path(__file__).parent.parent / "examples" / "long_context.py"
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, *torchrun, str(program), "--out", folder],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
    length, size, loss, steps, rate, grown = re.search(
        r"(\d+) characters, (\d+) process.*loss ([\d.]+) after (\d+) steps, (\d+) characters per "
        r"second; training took ([\d, ]+) MB",
        done.stdout,
    ).groups()  # type: ignore[union-attr]
    return {
        "length": int(length),
        "processes": int(size),
        "loss": float(loss),
        "steps": int(steps),
        "seconds per step": int(length) / int(rate),
        "MB": [int(n) for n in grown.split(", ")],
    }


# A model of a billion parameters, a million tokens, 64 ranks.
PLAN = {
    "N": 2**20,
    "ranks": 64,
    "layers": 24,
    "d_model": 2048,
    "heads": 16,
    "halo": 264,
    "K": 64,
    "bytes": 2,
    "vocab": 32768,
    "gb_per_second": 25,
    "hop_us": 10,
    "tflops": 400,
}


def plan(sizes: dict[str, int]) -> dict[str, float]:
    """Seconds of a training step of dsalt by a model: what computes, and what travels."""
    d, H, K, p = sizes["d_model"], sizes["heads"], sizes["K"], sizes["ranks"]
    bandwidth = sizes["gb_per_second"] * 1e9
    halo = sizes["halo"] * (2 * d + H) * sizes["bytes"]
    best = H * K * (2 * d // H + 1) * sizes["bytes"] + 8 * H * K
    parameters = sizes["layers"] * 12 * d * d + sizes["vocab"] * d
    passes = 2 * sizes["layers"]  # forward and backward
    return {
        "megabytes per layer and rank": 2 * (halo + best) / 1e6,
        "parameters in billions": parameters / 1e9,
        "computing": 6 * parameters * sizes["N"] / p / (sizes["tflops"] * 1e12),
        "halos": passes * (halo / bandwidth + sizes["hop_us"] * 1e-6),
        "landmarks, rank after rank": passes
        * (p - 1)
        * (best / bandwidth + sizes["hop_us"] * 1e-6),
        "gradients of the parameters": 2 * (p - 1) / p * parameters * 4 / bandwidth,
    }


def tables(found: dict[str, Any]) -> dict[str, str]:
    """The tables of the page, by the name of their mark."""
    attention, layer_ = found["adasplash"], found["dsalt"]
    ring = attention["ring attention"]
    rows = ["| scores | forward | backward | of ring attention |", "|---|---|---|---|"]
    for kind in ("ring attention", *KINDS):
        mean = attention[kind]
        share = sum(mean.values()) / sum(ring.values())
        rows.append(
            f"| {kind} | {mean['forward'] / 1e6:.2f} MB | {mean['backward'] / 1e6:.2f} MB "
            f"| {share:.0%} |"
        )
    seconds, cpu = layer_["wall seconds"], layer_["cpu seconds"]
    layer_rows = [
        "| | one process | two ranks | ratio |",
        "|---|---|---|---|",
        f"| CPU time (of the slower rank) | {cpu['alone']:.2f} s | {cpu['slower rank']:.2f} s "
        f"| {layer_['times less cpu time']:.2f} |",
        f"| wall time | {seconds['alone']:.2f} s | {seconds['ranks']:.2f} s "
        f"| {layer_['times faster by wall time']:.2f} |",
    ]
    one, two = found["lesson"]["one"], found["lesson"]["two"]
    lesson_rows = [
        "| | one process | two processes |",
        "|---|---|---|",
        f"| seconds of a step | {one['seconds per step']:.1f} | {two['seconds per step']:.1f} |",
        f"| memory of training, MB in each | {one['MB'][0]} | {two['MB'][0]} and {two['MB'][1]} |",
        f"| loss after {one['steps']} steps | {one['loss']:.4f} | {two['loss']:.4f} |",
    ]
    plan_rows = ["| part of a step | by the model |", "|---|---|"]
    for name, value in plan(PLAN).items():
        unit = "" if name.startswith(("megabytes", "parameters")) else " s"
        plan_rows.append(f"| {name} | {value:.3g}{unit} |")
    return {
        "attention": "\n".join(rows),
        "layer": "\n".join(layer_rows),
        "lesson": "\n".join(lesson_rows),
        "plan": "\n".join(plan_rows),
    }


def page(text: str, found: dict[str, Any]) -> str:
    """The page with its tables made from the results."""
    for name, table in tables(found).items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{table}\n\n{end}{rest.split(end)[1]}"
    return text


def main() -> None:
    if "--lesson" in sys.argv:
        found = json.loads(RESULTS.read_text(encoding="utf-8"))
        found["lesson"] = {"one": lesson(1), "two": lesson(2)}
        RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    elif "--page" not in sys.argv:
        found = {"adasplash": attention_table(ATTENTION), "dsalt": layer_table(5, LAYER)}
        found["lesson"] = {"one": lesson(1), "two": lesson(2)}
        found["torch"] = torch.__version__
        RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()
