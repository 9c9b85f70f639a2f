"""Break real compiled kernels on purpose, one place at a time: the sanitizer tells.

Each row breaks the first places of one kind in a kernel of adasplash. Some places stay silent and
rightly so (a barrier behind the last use, a wait for a copy that nobody reads any more), so at
least half of them have to be told.
"""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

from adasplash import adasplash
from shared_kernels import device
from shared_kernels.offline.ptx import FaultError, Sanitizer, executing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(device.interpreting(), reason="compiles, so Triton must not interpret"),
]

# fault -> (what is broken, what stands there instead, the kind that is told)
FAULTS = {
    "barrier dropped": (r"^\s*bar\.sync\s+0;", "", "race"),
    "wait for copies dropped": (r"^\s*cp\.async\.wait_group\s+\d+;", "", "missing wait"),
    "copy not limited": (
        r"^(\s*cp\.async\.c[ag]\.shared\.global .*?), %r\d+;",
        r"\1;",
        "out of bounds",
    ),
    "shared store dropped": (
        r"^\s*(?:@%p\d+ )?st\.shared[^;]*;",
        "",
        "uninitialised",
    ),
    "shared load shifted": (r"^(\s*ld\.shared[^\[]*\[%r\d+)\]", r"\1+2]", "misaligned"),
    "shared load far off": (r"^(\s*ld\.shared[^\[]*\[%r\d+)\]", r"\1+1048576]", "out of bounds"),
    "wait for wgmma dropped": (r"^\s*wgmma\.wait_group[^;]*;", "", "missing wait"),
    "proxy fence dropped": (r"^\s*fence\.proxy[^;]*;", "", "missing proxy fence"),
}
SCORE, FORWARD = "_score_forward_kernel", "_attention_forward_kernel"
ROWS = [
    *(("sm_80", SCORE, fault) for fault in list(FAULTS)[:6]),
    *(("sm_90", SCORE, fault) for fault in FAULTS),
    *(("sm_80", FORWARD, fault) for fault in list(FAULTS)[:2]),
    *(("sm_90", FORWARD, fault) for fault in (*list(FAULTS)[:2], *list(FAULTS)[6:])),
]
PLACES = 4


def launch(target, edit):
    """The kinds of what is found."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 64, generator=generator).bfloat16() for n in (64, 150, 150))
    sanitizer = Sanitizer()
    try:
        with executing(target, sanitizer, edit=edit):
            adasplash(q, k, v, alpha=1.5, backend="triton")
    except FaultError as fault:
        return {str(fault).split(":")[0]}
    return sanitizer.kinds()


@pytest.fixture(scope="module")
def texts():
    """target -> kernel -> PTX; nothing is found in what is not broken."""
    found = {}
    for target in ("sm_80", "sm_90"):
        found[target] = {}

        def keep(text, kernels=found[target]):
            kernels[re.search(r"\.entry (\w+)", text)[1]] = text
            return text

        assert launch(target, keep) == set()
    return found


@pytest.mark.parametrize(("target", "kernel", "fault"), ROWS)
def test_a_broken_kernel_is_told(texts, target, kernel, fault):
    pattern, instead, kind = FAULTS[fault]
    text = texts[target][kernel]
    places = list(re.finditer(pattern, text, re.M))[:PLACES]
    assert places, f"{kernel} on {target} has no place for: {fault}"
    told = 0
    for place in places:
        changed = re.sub(pattern, instead, place[0], flags=re.M)
        broken = text[: place.start()] + changed + text[place.end() :]
        found = launch(target, lambda t, broken=broken: broken if t == text else t)
        told += kind in found
    assert 2 * told >= len(places)
