"""Rows -> a Markdown table: case | size | density | ours | noise | best peer | ratio | floor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NOT_PEERS = ("ours", "ours again", "floor")  # rows before the noise column keep the second slot


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _noise(row: dict[str, Any]) -> float:
    if "noise" in row:
        return row["noise"]
    slots = (row["seconds"]["ours"], row["seconds"]["ours again"])
    return max(slots) / min(slots)


def bar_lines(row: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(peer, times faster than it, the bar) for each bar whose peer was measured."""
    ours = row["seconds"]["ours"]
    return [
        (peer, row["seconds"][peer] / ours, bar)
        for peer, bar in row["bars"].items()
        if peer in row["seconds"]
    ]


def line(row: dict[str, Any]) -> str:
    seconds = row["seconds"]
    ours = seconds["ours"]
    peers = {name: t for name, t in seconds.items() if name not in NOT_PEERS}
    best = min(peers, key=peers.__getitem__) if peers else None
    ratios = ", ".join(f"{name} {t / ours:.2f}×" for name, t in sorted(peers.items()))
    share = f"{seconds['floor'] / ours:.0%}" if "floor" in seconds else "–"
    density = f"{row['density']:.3f}" if row["density"] is not None else "–"
    cells = (
        row["case"],
        row["size"],
        density,
        _time(ours),
        f"{_noise(row):.2f}×",
        f"{best} {_time(peers[best])}" if best else "–",
        ratios or "–",
        share,
    )
    return "| " + " | ".join(cells) + " |"


def table(rows: list[dict[str, Any]]) -> str:
    """Ratios above 1: ours is that many times faster. Noise: how far ours's two slots are apart."""
    head = ("case", "size", "density", "ours", "noise", "best peer", "peer time / ours")
    head = (*head, "share of floor")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += [line(row) for row in rows]
    missed = [
        f"- {row['case']} {row['size']}: {ratio:.2f}× against {peer}, the bar is {bar:.3g}×"
        for row in rows
        for peer, ratio, bar in bar_lines(row)
        if ratio < bar
    ]
    refused = sorted(
        {f"- {row['case']}: {name}: {why}" for row in rows for name, why in row["refused"].items()}
    )
    text = "\n".join(lines)
    if missed:
        text += "\n\nBars not met:\n" + "\n".join(missed)
    if refused:
        text += "\n\nPeers that did not run:\n" + "\n".join(refused)
    return text
