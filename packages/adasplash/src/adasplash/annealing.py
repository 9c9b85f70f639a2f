"""From softmax to entmax while a model of transformers is fine-tuned: alpha rises from 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shared_kernels import checks

from . import _checks, huggingface


class AnnealedStep(NamedTuple):
    """What :class:`EntmaxAnneal` saw at one step.

    Attributes:
        step: how many steps were made before it.
        alpha: the mean alpha of the heads.
        density: the share of visible keys with a weight above 0, over all layers and queries.
        loss: what was given to ``step``; None if nothing was.
    """

    step: int
    alpha: float
    density: float
    loss: float | None


class EntmaxAnneal:
    r"""The schedule that :func:`entmax_anneal` returns.

    Call :meth:`step` after each step of the optimiser, and :meth:`close` (or leave the ``with``)
    at the end.

    Attributes:
        modules: name -> module whose ``entmax_alpha`` is set.
        history: one :class:`AnnealedStep` for each step that was measured.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        steps: int,
        alpha: float | Tensor,
        measure_every: int,
        log: Callable[[AnnealedStep], object] | None,
    ) -> None:
        self.modules, self.steps, self.alpha = modules, steps, alpha
        self.measure_every, self.log = measure_every, log
        self.history: list[AnnealedStep] = []
        self._made = 0
        self._seen: list[tuple[float, float]] = []  # keys with a weight, keys that are visible
        self._set()

    def current_alpha(self) -> float | Tensor:
        """1 + (alpha - 1) min(1, steps made / steps), per head where alpha is."""
        return 1.0 + (self.alpha - 1.0) * min(1.0, self._made / self.steps)

    def _set(self) -> None:
        alpha = self.current_alpha()
        for module in self.modules.values():
            own = alpha
            if isinstance(alpha, Tensor):
                own = alpha.to(next((p.device for p in module.parameters()), alpha.device))
            module.entmax_alpha = own  # type: ignore[assignment]
        measured = self._made % self.measure_every == 0
        if measured and self._seen not in huggingface.measuring:
            huggingface.measuring.append(self._seen)

    def step(self, loss: float | Tensor | None = None) -> None:
        """Count one step, record what was measured in it, and set the next alpha."""
        if self._seen:
            with_weight, visible = (sum(x) for x in zip(*self._seen, strict=True))
            alpha = self.current_alpha()
            mean = float(alpha.double().mean()) if isinstance(alpha, Tensor) else alpha
            density = with_weight / max(visible, 1.0)
            found = None if loss is None else float(torch.as_tensor(loss).detach())
            self.history.append(AnnealedStep(self._made, mean, density, found))
            if self.log is not None:
                self.log(self.history[-1])
        self.close()
        self._made += 1
        self._set()

    def close(self) -> None:
        """Measure no more; alpha stays as it is."""
        huggingface.measuring[:] = [x for x in huggingface.measuring if x is not self._seen]
        self._seen = []

    def __enter__(self) -> EntmaxAnneal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def entmax_anneal(
    model: nn.Module,
    steps: int,
    alpha: float | Tensor = 1.5,
    *,
    modules: Iterable[str] | None = None,
    measure_every: int = 50,
    log: Callable[[AnnealedStep], object] | None = None,
) -> EntmaxAnneal:
    r"""Turn a softmax model into an entmax model while it is fine-tuned: alpha rises from 1.

    alpha_h(t) = 1 + (alpha_h - 1) min(1, t / steps). At t = 0 the model is what it was.

    Args:
        model: a model of transformers, built with ``attn_implementation=name`` for a name given to
            :func:`register_transformers`.
        steps: how many steps alpha takes to its end.
        alpha: the end, in (1, 2]: a number, or a tensor (H,) with one for each head of a layer.
        modules: names of the attention modules; by default those that call the registered function
            when two tokens run, see :func:`check_transformers`.
        measure_every: in one step of so many the density is measured, which solves all rows twice.
        log: called with each :class:`AnnealedStep`.

    Returns:
        :class:`EntmaxAnneal`, whose ``step(loss)`` belongs behind that of the optimiser.

    Raises:
        ValueError: alpha outside (1, 2], a name that the model lacks, a model without text input,
            or a module with a learned ``entmax_alpha``.

    Example (needs transformers)::

        with entmax_anneal(model, steps=1000, alpha=1.5, log=print) as anneal:
            for batch in batches:
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                anneal.step(loss)
        save_entmax_alpha(model, folder)
    """
    checks.positive_int("steps", steps)
    checks.positive_int("measure_every", measure_every)
    _checks.alpha(alpha)
    lowest = float(alpha.min()) if isinstance(alpha, Tensor) else float(alpha)
    if lowest <= 1.0:
        checks.fail("alpha", "be in (1, 2]", lowest, "1 is where it starts")
    names = huggingface.check_transformers(model).called if modules is None else tuple(modules)
    every = dict(model.named_modules())
    missing = [x for x in names if x not in every]
    if missing:
        checks.fail("modules", "be names of the model's modules", ", ".join(missing))
    if not names:
        checks.fail("model", "call the registered attention function", "a model that never does")
    for name in names:
        if isinstance(getattr(every[name], "entmax_alpha", None), (nn.Module, nn.Parameter)):
            checks.fail(
                f"{name}.entmax_alpha", "be no parameter: the schedule sets it", "a learned one"
            )
    alpha = alpha.detach().clone() if isinstance(alpha, Tensor) else float(alpha)
    chosen = {name: every[name] for name in names}
    return EntmaxAnneal(chosen, int(steps), alpha, int(measure_every), log)
