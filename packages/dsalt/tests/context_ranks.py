"""Sequences that are split over ranks: a program of forked processes for test_context.py.

Few groups of processes run all cases: starting one costs more than a case.
"""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from dsalt import _context
from dsalt.model import DSALTLMHeadModel
from dsalt.modules import DSALTAttention
from dsalt.training import DSALTTrainer
from shared_kernels.testing.ranks import refused

from . import processes

N, D = 90, 24
LAYERS = {
    "plain": {},
    "groups of heads": {"n_kv_heads": 2},
    "soft edges": {"window_ramp": 2.5},
    "wide windows": {"n_min": 10, "n_max": 70},  # several neighbours, and wider than the rest
    "wider than the sequence": {"n_max": 500},
    "sinks": {"n_sink": 2},
    "a sink and large blocks": {"n_sink": 1, "landmark_block": 40},
    "blocks of one": {"landmark_block": 1, "k_lmk": 5},
    "no landmarks": {"k_lmk": 0},
    "more landmarks than tokens": {"k_lmk": 120},
    "another hidden state": {"previous": True},
    "no positions": {"rope_base": None},
    "a normaliser": {"normalizer": lambda scores, dim: torch.softmax(scores, dim)},
    "packed": {"documents": (0, 7, 30, 30, 77, 90)},
    "packed with sinks": {"documents": (0, 45, 46, 90), "n_sink": 1, "landmark_block": 4},
    "packed, and one over all chunks": {"documents": (0, 1, 89, 90), "n_kv_heads": 1},
    "recomputed": {"gradient_checkpointing": True},
    "recomputed and packed": {"gradient_checkpointing": True, "documents": (0, 50, 90)},
}
# how many tokens each rank holds: as equal as can be, and not at all equal
SPLITS = {2: ((45, 45), (71, 19)), 4: ((23, 23, 23, 21), (3, 60, 2, 25))}


def layer(dtype, **options):
    torch.manual_seed(0)
    sizes = {"n_min": 3, "n_max": 9, "k_lmk": 3, "landmark_block": 8, "alpha": 0.4}
    attention = DSALTAttention(D, 4, **{**sizes, **options}).to(dtype)
    with torch.no_grad():  # windows that differ from token to token
        attention.window.proj.weight *= 20
    return attention.train()


def tokens(dtype, batch):
    generator = torch.Generator().manual_seed(1)
    x, previous, d_out = torch.randn(3, batch, N, D, generator=generator, dtype=dtype)
    # norms differ: which tokens are landmarks is not up to rounding
    return x * (0.5 + torch.rand(batch, N, 1, generator=generator, dtype=dtype)), previous, d_out


def result(name, dtype, group=None, part=slice(None)):
    """Output, windows, the gradients of x and x_prev, and those of the parameters."""
    options = dict(LAYERS[name])
    documents, previous = options.pop("documents", None), options.pop("previous", False)
    attention = layer(dtype, **options)
    x, x_prev, d_out = tokens(dtype, 1 if documents else 2)
    x, x_prev = (t[:, part].clone().requires_grad_() for t in (x, x_prev))
    bounds = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    out, windows = attention(x, x_prev if previous else None, True, cu_seqlens=bounds, group=group)
    (out * d_out[:, part]).sum().backward()
    of_tokens = [out.detach(), windows.detach().mT, x.grad]
    if previous:
        of_tokens.append(x_prev.grad)
    grads = {n: p.grad for n, p in attention.named_parameters() if p.grad is not None}
    return of_tokens, grads


def parts(split):
    ends = torch.tensor(split).cumsum(0).tolist()
    return [slice(end - n, end) for n, end in zip(split, ends, strict=True)]


def layers(rank, size):
    found = {}
    for split in SPLITS[size]:
        for name in LAYERS:
            for dtype in (torch.float64, torch.float32):
                part = parts(split)[rank]
                found[split, name, dtype] = result(name, dtype, dist.group.WORLD, part)
    return found


def model(**options):
    torch.manual_seed(2)
    sizes = {"n_min": 2, "n_max": 6, "k_lmk": 2, "landmark_block": 4, "dropout": 0.0}
    return DSALTLMHeadModel(30, 16, 2, 2, **{**sizes, **options}).double()


def refusals(rank, size):
    """What is refused, on which rank, and what the others hear."""
    world, x = dist.group.WORLD, tokens(torch.float64, 1)[0][:, : 10 + rank]
    attention = layer(torch.float64)
    whole = layer(torch.float64, landmark_mode="global")
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, size), mesh_dim_names=("dp", "cp"))
    bad = torch.tensor([0, 5, 20], dtype=torch.int32)
    ids = torch.zeros(1, 5 + rank, dtype=torch.long)
    calls = {
        "empty": lambda: attention(x[:, : 10 * (1 - rank)], group=world),
        "batch": lambda: attention(x.expand(1 + rank, -1, -1), group=world),
        "mask": lambda: attention(x, attention_mask=torch.ones(x.shape[:2]), group=world),
        "cache": lambda: attention(x, use_cache=True, group=world),
        "global": lambda: whole(x, group=world),
        "bounds": lambda: attention(x, cu_seqlens=bad, group=world),
        "other bounds": lambda: attention(x, cu_seqlens=bad + rank, group=world),
        "mesh": lambda: attention(x, group=mesh),
        "group": lambda: attention(x, group="everybody"),
        "shift": lambda: model()(ids, ids, shift_labels=True, group=world),
        "length": lambda: model(max_seq_len=10)(ids, group=world),
    }
    return refused(calls)


def traffic(rank, size):
    """Bytes that a layer's forward and backward pass send, for sequences of two lengths."""
    from dsalt._context import Chunk

    sent = {}
    for length in (200, 800):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, length, D, generator=generator)[:, : length // size].requires_grad_()
        attention = layer(torch.float32)
        chunk = Chunk.of(dist.group.WORLD, x)
        chunk.ranks.sent = 0
        attention(x, group=chunk)[0].sum().backward()
        sent[length] = chunk.ranks.sent
    return sent


PACKED = [
    {"input_ids": processes.data(13, seed)[:, :7].reshape(1, -1), "cu_seqlens": bounds}
    for seed, bounds in enumerate(
        torch.tensor(x, dtype=torch.int32) for x in ((0, 20, 91), (0, 91), (0, 5, 5, 60, 61, 91))
    )
]


def packed(folder, **options):
    """Two steps over packed rows, whose documents cross the borders of chunks."""
    trainer = DSALTTrainer(
        model(n_sink=1),
        PACKED,
        PACKED[:1],
        lr=1e-2,
        total_steps=2,
        warmup_steps=1,
        grad_accum=2,
        save_dir=folder,
        dtype=torch.float32,
        log_every=1,
        val_every=2,
        device="cpu",
        progress=False,
        window_reg_coef=0.1,
        health=False,
        **options,
    )
    trainer.train()


def train(rank, size, folder):
    """Runs of the trainer that test_context.py compares with those of one process."""
    run, context = processes.run, {"context_parallel": 2}
    if size == 2:
        run(folder / "two", 8, **context)
        packed(folder / "packed-two", gradient_checkpointing=True, **context)
        run(folder / "sharded", 8, fsdp=True, gradient_checkpointing=True, **context)
        run(folder / "from-one", 8, resume_from=folder / "one" / "step-00000003", **context)
        run(folder / "again", 8, resume_from=folder / "two" / "step-00000003", **context)
        run(folder / "float32", 8, precision=torch.float32, **context)
    else:
        run(folder / "two-by-two", 4, ddp=True, **context)
        packed(folder / "packed-four", context_parallel=4)
        start = {"resume_from": folder / "two" / "step-00000006"}
        run(folder / "four-from-two", 8, context_parallel=4, **start)
    ids = torch.ones(4, 9, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    cases = {
        "padding": ({"input_ids": ids, "attention_mask": mask}, {}),
        "short": (ids[:, :2], {}),
        "different": (ids + rank, {}),
        "ranks": (ids, {"context_parallel": 3}),
        "model": (ids, {"model": torch.nn.Embedding(9, 9)}),
        "compile": (ids, {"compile": True}),
    }

    def trained(batch, more):
        options = {"context_parallel": size, "dtype": torch.float32, "total_steps": 1, **more}
        mine = options.pop("model", None) or model()
        DSALTTrainer(
            mine,
            [batch],
            warmup_steps=0,
            device="cpu",
            progress=False,
            save_dir=folder / f"refused-{size}",
            health=False,
            **options,
        ).train()

    return refused({name: partial(trained, *case) for name, case in cases.items()})


def failing(folder: Path, **options) -> DSALTTrainer:
    """Six steps of training, each with a checkpoint."""
    tokens = torch.randint(1, 20, (1, 30), generator=torch.Generator().manual_seed(2))
    return DSALTTrainer(
        model().double(),
        [tokens],
        lr=1e-2,
        total_steps=6,
        warmup_steps=1,
        grad_accum=1,
        save_every=1,
        keep_last=2,
        save_dir=folder / "run",
        dtype=torch.float32,
        log_every=1,
        device="cpu",
        progress=False,
        health=False,
        **options,
    )


def dying(rank: int, moment: str, folder: Path) -> None:
    """Rank 1 is killed, or stops to answer, after three steps; the others note what they hear."""
    trainer = failing(folder, context_parallel=3, fsdp=moment == "sharded")

    def end():
        if rank == 1 and trainer.step == 3:
            if moment == "never answers":
                time.sleep(60)
            os.kill(os.getpid(), signal.SIGKILL)

    part = {"in a layer": "forward", "in a backward pass": "backward"}.get(moment)
    if part is not None:
        within = getattr(_context._Earlier, part)

        def ending(*args):
            end()
            return within(*args)

        setattr(_context._Earlier, part, staticmethod(ending))
    else:
        one_step = trainer._one_step
        trainer._one_step = lambda: (end(), one_step())
    started = time.monotonic()
    try:
        trainer.train()
    except RuntimeError as error:
        torch.save((str(error), time.monotonic() - started), folder / f"{rank}.pt")
    os._exit(1)
