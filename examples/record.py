"""Write what a lesson measured: its figures, and the machine, versions and commit they are of."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def record(path: Path, figures: dict[str, Any]) -> None:
    """Write the figures as JSON; floats have four decimals."""
    if str(ROOT) not in sys.path:  # a script has only its own folder there
        sys.path.append(str(ROOT))
    from benchmarks.runner import environment

    found = {"environment": environment(torch.device("cpu")), **_rounded(figures)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def _rounded(x: Any) -> Any:
    if isinstance(x, dict):
        return {str(name): _rounded(y) for name, y in x.items()}
    if isinstance(x, list | tuple):
        return [_rounded(y) for y in x]
    return round(x, 4) if isinstance(x, float) else x
