"""Reports of each pass of a solve: to a progress bar, and to scikit-learn's callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["CallbackSupportMixin", "Progress", "begin_fit", "end_fit", "with_callbacks"]

try:
    from sklearn.callback import CallbackSupportMixin, with_callbacks
except ImportError:  # scikit-learn before 1.9

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """An estimator without callbacks."""

    def with_callbacks(method: Any) -> Any:
        return method


def begin_fit(dm: Any, X: Any) -> None:
    """Tell the callbacks of `dm.set_callbacks` that the fit begins; `with_callbacks` ends it."""
    if hasattr(dm, "_init_callback_context"):
        # how many passes there will be is not known
        context = dm._init_callback_context(max_subtasks=None)
        context.call_on_fit_task_begin(estimator=dm, X=X)


def end_fit(dm: Any, X: Any) -> None:
    """Tell the callbacks that the estimator is ready."""
    if hasattr(dm, "_callback_fit_ctx"):
        dm._callback_fit_ctx.call_on_fit_task_end(estimator=dm, X=X, reconstruction_attributes={})


class Progress:
    """Called with (passes, largest residual) each time that a solver has looked at its residuals.

    The bar over the digits of the residual is shown only when asked for. Each call is a task of the
    fit for callbacks, with "passes", "residual" and "tol" as its metadata. Returns whether a
    callback wants the solve to stop; `stopped` remembers it.
    """

    def __init__(self, dm: Any, *, shown: bool) -> None:
        self.dm, self.bar, self.tol, self.stopped = dm, None, float(dm.tol), False
        self.context: Any = getattr(dm, "_callback_fit_ctx", None)
        if shown:
            from tqdm.auto import tqdm

            self.bar = tqdm(desc="diffusion map", unit="pass")

    def __call__(self, n_passes: int, residual: float) -> bool:
        if self.bar is not None:
            self.bar.update(n_passes - self.bar.n)
            self.bar.set_postfix_str(f"residual {residual:.1e}, tol {self.tol:.0e}")
        if self.context is not None:
            metadata = {"passes": n_passes, "residual": residual, "tol": self.tol}
            task = self.context.subcontext("passes")
            task.call_on_fit_task_begin(estimator=self.dm, metadata=metadata)
            self.stopped |= bool(task.call_on_fit_task_end(estimator=self.dm, metadata=metadata))
        return self.stopped

    def after(self, passes: int) -> Callable[[int, float], bool]:
        """The same report, for a solver that counts from so many passes on."""
        return lambda n_passes, residual: self(passes + n_passes, residual)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.close()
