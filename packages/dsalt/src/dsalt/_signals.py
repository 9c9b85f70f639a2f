"""Signals that ask a run to end: they are noted when they come and acted on after the step."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

__all__: list[str] = []

_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")
_DEFAULT = (signal.SIG_DFL, signal.default_int_handler)


class Signals:
    """While it is entered, Ctrl-C, SIGTERM and SIGUSR1 are noted in ``received``.

    A handler that somebody else has set stays, as does a signal that is ignored (nohup). The second
    Ctrl-C ends the program at once, unless ``patient``: torchrun passes on what its group has
    received already.
    """

    def __init__(self, patient: bool) -> None:
        self.received: int | None = None
        self._patient, self._process = patient, os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for name in _NAMES:
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) in _DEFAULT:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked worker: its parent tells it when to end
        if self.received is not None and number == signal.SIGINT and not self._patient:
            raise KeyboardInterrupt
        if self.received is None and os.environ.get("RANK", "0") == "0":
            again = "" if self._patient else "; Ctrl-C again ends it at once"
            what = f"{signal.Signals(number).name}: saving a checkpoint after this step{again}"
            sys.stderr.write(f"\ndsalt: {what}\n")
        self.received = number


def end(number: int) -> None:
    """End the program as the signal asks: KeyboardInterrupt, or SystemExit with 128 + number."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


class QuietWorker:
    """``worker_init_fn`` of a loader: a worker leaves signals to the process group to its parent.

    A worker that such a signal ends would make the parent raise before its checkpoint is written.
    A signal that the parent itself sends is obeyed, and a worker whose parent is gone ends.
    """

    def __init__(self, then: Any) -> None:
        self.then = then

    def __call__(self, worker: int) -> None:
        for name in ("SIGINT", "SIGUSR1"):
            number = getattr(signal, name, None)
            if number is not None:
                signal.signal(number, signal.SIG_IGN)
        if hasattr(signal, "sigwaitinfo"):  # other systems do not tell which process sent SIGTERM
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
        if self.then is not None:
            self.then(worker)


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def quiet_workers(loader: Any) -> None:
    """Give a loader's workers a :class:`QuietWorker`, once."""
    if getattr(loader, "num_workers", 0) and hasattr(loader, "worker_init_fn"):
        if not isinstance(loader.worker_init_fn, QuietWorker):
            loader.worker_init_fn = QuietWorker(loader.worker_init_fn)
