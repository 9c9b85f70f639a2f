"""Small models, loaders and trainers for the tests of training."""

from __future__ import annotations

import json

import torch
from torch.utils.data import DataLoader, TensorDataset

from dsalt.model import DSALTLMHeadModel
from dsalt.training import DSALTTrainer

VOCAB = 20
QUIET = {"progress": False, "device": "cpu", "warmup_steps": 2, "grad_accum": 1, "lr": 1e-2}
QUIET |= {"dtype": torch.float32, "log_every": 0, "val_every": 0, "save_every": 0}


def make(**options) -> DSALTLMHeadModel:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_min": 2, "n_max": 8, "k_lmk": 2}
    sizes |= {"dropout": 0.0, "landmark_block": 4}
    return DSALTLMHeadModel(VOCAB, **{**sizes, **options})


def data(n: int = 12, length: int = 9, seed: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (n, length), generator=g)


def loader(x: torch.Tensor | None = None, **options) -> DataLoader:
    options = {"batch_size": 4, **options}
    return DataLoader(TensorDataset(data() if x is None else x), **options)


def trainer(tmp_path, model=None, train=None, **options) -> DSALTTrainer:
    options = {**QUIET, "total_steps": 4, "save_dir": tmp_path / "run", **options}
    options.setdefault("overwrite", options.get("resume_from") is None)
    options["warmup_steps"] = min(options["warmup_steps"], options["total_steps"] - 1)
    return DSALTTrainer(
        make() if model is None else model, loader() if train is None else train, **options
    )


def same(a, b) -> bool:
    """Exact equality of nested states."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def logs(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
