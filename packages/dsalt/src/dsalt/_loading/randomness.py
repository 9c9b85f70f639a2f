"""Random numbers that the data draws, apart from those of the model."""

from __future__ import annotations

import hashlib
import random
from typing import Any, NamedTuple

import numpy as np
import torch

from .._checkpoint import rng_state, set_rng_state

_CPU = torch.device("cpu")


class Numbers(NamedTuple):
    """The states of the global generators of torch on the CPU, python and numpy."""

    torch: torch.Tensor
    python: Any
    numpy: Any

    @classmethod
    def now(cls) -> Numbers:
        numpy = np.random.get_state(legacy=True)
        return cls(torch.get_rng_state(), random.getstate(), numpy)

    def use(self) -> None:
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        np.random.set_state(self.numpy)

    def plain(self) -> dict[str, Any]:
        """As a checkpoint holds them."""
        before = Numbers.now()
        self.use()
        state = rng_state(_CPU)
        before.use()
        return state

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Numbers:
        before = cls.now()
        set_rng_state(plain, _CPU)
        found = cls.now()
        before.use()
        return found


def mixed(*numbers: int) -> int:
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(seed: int) -> None:
    """The global generators of the CPU; those of accelerators belong to the model."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
