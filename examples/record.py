"""Write what a lesson measured: its figures, and the machine, versions and commit they are of."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def record(path: Path, sizes: dict[str, Any], seeds: dict[int, Any]) -> dict[str, Any]:
    """Write what each seed gave; what an earlier run of the same sizes measured stays."""
    if str(ROOT) not in sys.path:  # a script has only its own folder there
        sys.path.append(str(ROOT))
    from benchmarks.runner import environment

    found = _rounded({"environment": environment(torch.device("cpu")), "sizes": sizes})
    found["seeds"] = _rounded(seeds)
    before = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if before.get("sizes") == found["sizes"]:
        for seed, run in before["seeds"].items():
            found["seeds"][seed] = {**run, **found["seeds"].get(seed, {})}
        found["seeds"] = dict(sorted(found["seeds"].items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return found


def _rounded(x: Any) -> Any:
    if isinstance(x, dict):
        return {str(name): _rounded(y) for name, y in x.items()}
    if isinstance(x, list | tuple):
        return [_rounded(y) for y in x]
    return round(x, 4) if isinstance(x, float) else x
