"""A model of characters on sequences that are longer than one process wants to hold.

    torchrun --nproc-per-node 2 examples/long_context.py [--length 65536] [--steps 3]

The processes share each sequence: every one computes its part of the tokens, and receives the
window and the landmarks of the tokens before. Losses and weights are those of one process, which
`python examples/long_context.py` shows. A layer sends as many bytes for any length, and a process
needs memory for its part of the tokens alone.

The text is this repository's documentation, repeated; a checkpoint can be continued with another
number of processes (`--resume`).
"""

from __future__ import annotations

import argparse
import os
import resource
from pathlib import Path

import torch

from dsalt.model import DSALTLMHeadModel
from dsalt.training import DSALTTrainer

DOCS = Path(__file__).resolve().parent.parent / "docs"


def characters(n: int) -> torch.Tensor:
    """(n,) bytes of the documentation, as often as it takes."""
    text = b"".join(path.read_bytes() for path in sorted(DOCS.glob("*.md")))
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return ids.repeat(-(-n // len(ids)))[:n]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=65_536)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("lessons/long_context"))
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = DSALTLMHeadModel(256, 64, 2, 4, n_min=16, n_max=64, k_lmk=8, dropout=0.0, d_ff=128)
    # one more character than the sequence has places: the last one has no next
    batches = [characters(2 * options.length + 2).view(2, -1)[:1]]
    trainer = DSALTTrainer(
        model,
        batches,
        lr=3e-3,
        warmup_steps=1,
        total_steps=options.steps,
        grad_accum=1,
        log_every=1,
        save_every=0,
        save_dir=options.out,
        dtype=torch.float32,
        device="cpu",
        schedule="constant",
        progress=False,
        health=False,
        overwrite=not options.resume,
        resume_from="latest" if options.resume else None,
        context_parallel=int(os.environ.get("WORLD_SIZE", "1")),
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    logs = trainer.train()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # kilobytes on Linux
    grown = trainer.world.gather((most - before) / 1024)
    if trainer.world.is_main:
        print(
            f"{options.length} characters, {trainer.world.size} process(es): loss "
            f"{logs['loss']:.4f} after {logs['step']} steps, "
            f"{logs['tokens_per_second']:.0f} characters per second; training took "
            f"{', '.join(f'{mb:.0f}' for mb in grown)} MB in each process"
        )
    return logs


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
