#!/usr/bin/env bash
# package: MDAnalysis 2.11.0
# date: 2026-11-30
# expected: capped_distance finds the same pairs by each of its methods ("bruteforce", "nsgrid", "pkdtree"): the pairs within max_cutoff by the minimum image, as distance_array with the same box says; a method that cannot do so refuses, as "nsgrid" does for a cutoff above half the box
# seen: in a cubic box of 10 with a cutoff of 7, "pkdtree" silently leaves out 161 of 6146 pairs of random points, among them some that are 3.7 apart; in a rhombic dodecahedron of that size (60, 60, 90 degrees) with a cutoff of 6 it leaves out a tenth, among them some that are 1.7 apart. "bruteforce" finds them all, and so does "pkdtree" while the cutoff is less than half of the shortest height of the box
# ours: nothing; flashdiffusion.sources asks MDAnalysis for positions and bonds alone
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q MDAnalysis==2.11.0 numpy==2.4.6

cat >"$work/pairs.py" <<'PY'
import numpy as np
from MDAnalysis.lib.distances import capped_distance, distance_array
from MDAnalysis.lib.mdamath import triclinic_vectors

rng = np.random.default_rng(0)
for name, angles, fine, cutoff in (
    ("cube", (90, 90, 90), 4.9, 7.0),
    ("rhombic dodecahedron", (60, 60, 90), 3.0, 6.0),
):
    box = np.array([10, 10, 10, *angles], dtype=np.float32)
    a, b = (rng.random((80, 3)) @ triclinic_vectors(box) for _ in range(2))
    a, b = a.astype(np.float32), b.astype(np.float32)
    exact = distance_array(a, b, box=box)
    for most in (fine, cutoff):
        wanted = set(map(tuple, np.argwhere(exact <= most)))
        by = {method: set(map(tuple, capped_distance(a, b, most, box=box, method=method,
                                                      return_distances=False)))
              for method in ("bruteforce", "pkdtree")}
        assert by["bruteforce"] == wanted and by["pkdtree"] <= wanted
        missed = sorted(exact[i, j] for i, j in wanted - by["pkdtree"])
        span = f", {missed[0]:.2f} to {missed[-1]:.2f} apart" if missed else ""
        print(f"{name}, cutoff {most}: {len(missed)} of {len(wanted)} pairs missed{span}")
        assert bool(missed) == (most == cutoff)
        if most == cutoff:
            try:
                capped_distance(a, b, most, box=box, method="nsgrid")
            except ValueError as error:
                print("   nsgrid:", error)
            else:
                raise AssertionError("nsgrid took it")
PY
"$work/venv/bin/python" "$work/pairs.py"
