"""How a command ends: its exit code, and one line for what went wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .._monitor import MonitorError
from .arguments import UsageError


def run(program: str, command: Callable[[Any], None], argv: Sequence[str] | None) -> int:
    """0; 2 after one line that says what cannot be used; 1 if it diverged or the disk is full.

    130 after Ctrl-C, 128 + number after another signal.
    """
    try:
        command(argv)
    except BrokenPipeError:
        return 0
    except (
        UsageError,
        FileNotFoundError,
        FileExistsError,
        BlockingIOError,
        ImportError,
        MonitorError,
    ) as error:
        return complain(program, error)
    except (FloatingPointError, OSError) as error:
        return complain(program, error, code=1)
    except (KeyboardInterrupt, SystemExit) as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else error.code
        if code == 130 or (isinstance(code, int) and code > 128):
            line = "interrupted; --resume goes on from the last checkpoint"
            sys.stderr.write(f"\n{program}: {line}\n")
            return code
        raise
    return 0


def complain(program: str, error: Exception, code: int = 2) -> int:
    if os.environ.get("RANK", "0") == "0":
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {text}"
        sys.stderr.write(f"{program}: error: {' '.join(text.split())}\n")
    return code
