"""Small data sets on which associative memories can be watched."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from shared_kernels import checks


class LookupTableDataset(Dataset[Any]):
    """Pairs of keys and values: item i is (keys[i], values[i])."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        checks.tensor("keys", keys)
        checks.tensor("values", values)
        if len(keys) != len(values):
            checks.fail("values", f"have as many rows as `keys`, {len(keys)}", len(values))
        self.keys, self.values = keys, values

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.keys[i], self.values[i]


class BitPatternSet(Dataset[Any]):
    """Bags of bit patterns (multiple-instance learning): a positive bag hides signal patterns.

    Items are ``{"data": (num_instances, num_bits), "target": ()}``. No instance is all zeros, and
    none but the implanted ones is a signal; the first ``num_targets_high`` bags are positive.

    Args:
        num_bags, num_instances, num_bits: sizes. num_signals: different signals.
        num_signals_per_bag: implanted in each positive bag. fraction_targets: of positive bags.
        seed_signals, seed_data: of the signals and of everything else.
    """

    def __init__(
        self,
        num_bags: int,
        num_instances: int,
        num_signals: int,
        num_signals_per_bag: int = 1,
        fraction_targets: float = 0.5,
        num_bits: int = 8,
        dtype: torch.dtype = torch.float32,
        seed_signals: int = 43,
        seed_data: int = 44,
    ) -> None:
        for name, value in (
            ("num_bags", num_bags),
            ("num_instances", num_instances),
            ("num_signals", num_signals),
            ("num_bits", num_bits),
        ):
            checks.positive_int(name, value)
        if not 0 <= num_signals_per_bag <= num_instances:
            checks.fail("num_signals_per_bag", f"be in [0, {num_instances}]", num_signals_per_bag)
        if not 0.0 < fraction_targets < 1.0:
            checks.fail("fraction_targets", "be in (0, 1)", fraction_targets)
        if num_bits > 30 or num_signals >= 2**num_bits - 1:
            checks.fail(
                "num_signals",
                "be less than 2**num_bits - 1, with at most 30 bits",
                (num_signals, num_bits),
            )
        self.num_bags, self.num_instances, self.num_bits = num_bags, num_instances, num_bits
        self.num_signals, self.num_signals_per_bag = num_signals, num_signals_per_bag
        self.num_targets_high = min(num_bags, max(1, math.ceil(num_bags * fraction_targets)))
        self.num_targets_low = num_bags - self.num_targets_high
        self.initial_seed, self._dtype = seed_signals, dtype

        # A pattern is its number; the non-zero numbers are shuffled, the first are the signals.
        generator = torch.Generator().manual_seed(seed_signals)
        codes = torch.randperm(2**num_bits - 1, generator=generator) + 1
        signals, others = codes[:num_signals], codes[num_signals:]
        generator = torch.Generator().manual_seed(seed_data)
        pick = torch.randint(len(others), (num_bags, num_instances), generator=generator)
        bags = others[pick]
        high, n = self.num_targets_high, num_signals_per_bag
        where = torch.rand(high, num_instances, generator=generator).argsort(1)[:, :n]
        which = signals[torch.randint(num_signals, (high, n), generator=generator)]
        bags[:high] = bags[:high].scatter(1, where, which)
        bits = torch.arange(num_bits)
        self._bags = (bags[..., None] >> bits) & 1
        self._signals = (signals[:, None] >> bits) & 1
        self._targets = (torch.arange(num_bags) < high).to(torch.int64)

    def __len__(self) -> int:
        return self.num_bags

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"data": self._bags[i].to(self._dtype), "target": self._targets[i].to(self._dtype)}

    @property
    def bags(self) -> Tensor:
        """(num_bags, num_instances, num_bits), int64."""
        return self._bags.clone()

    @property
    def targets(self) -> Tensor:
        """(num_bags,), int64."""
        return self._targets.clone()

    @property
    def signals(self) -> Tensor:
        """(num_signals, num_bits), int64."""
        return self._signals.clone()


class LatchSequenceSet(Dataset[Any]):
    """One-hot sequences whose first character, 0 or 1, is the target; the others are noise >= 2.

    Items are ``{"data": (num_instances, num_characters), "target": ()}``.
    """

    def __init__(
        self,
        num_samples: int,
        num_instances: int = 20,
        num_characters: int = 6,
        dtype: torch.dtype = torch.float32,
        seed: int = 43,
    ) -> None:
        for name, value in (("num_samples", num_samples), ("num_instances", num_instances)):
            checks.positive_int(name, value)
        if num_characters < 3:
            checks.fail("num_characters", "be at least 3: two symbols and noise", num_characters)
        self.num_samples, self.num_instances = num_samples, num_instances
        self.num_characters, self.initial_seed, self._dtype = num_characters, seed, dtype
        generator = torch.Generator().manual_seed(seed)
        shape = (num_samples, num_instances)
        characters = torch.randint(2, num_characters, shape, generator=generator)
        self._targets = torch.randint(2, (num_samples,), generator=generator)
        characters[:, 0] = self._targets
        self._data = torch.nn.functional.one_hot(characters, num_characters)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"data": self._data[i].to(self._dtype), "target": self._targets[i].to(self._dtype)}

    @property
    def targets(self) -> Tensor:
        """(num_samples,), int64."""
        return self._targets.clone()
