#!/usr/bin/env bash
# package: mdtraj 1.11.1.post2
# date: 2026-11-30
# expected: the chunks of mdtraj.iterload, one after another, are the frames of mdtraj.load: every stride-th one behind the first skip, with the atoms of atom_indices, in any format and with any chunk (its page: 0 loads all)
# seen: chunk=0 takes stride and atom_indices and uses neither: all frames and all atoms come. For a PDB file skip is taken and not used with any other chunk. Nothing is said; a time series has another number of frames, or another spacing, than was asked for
# ours: flashdiffusion.sources.Source passes neither stride nor skip to iterload, and counts the frames of its chunks itself (packages/flashdiffusion/tests/test_sources.py, test_files_are_read_by_batches); README, "Trajectories"
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q mdtraj==1.11.1.post2 numpy==2.4.6

cat >"$work/iterload.py" <<'PY'
import sys

import mdtraj as md
import numpy as np

N, ATOMS = 30, 40
topology = md.Topology()
residue = topology.add_residue("GLY", topology.add_chain())
for _ in range(ATOMS):
    topology.add_atom("C", md.element.carbon, residue)
start = np.random.default_rng(0).random((ATOMS, 3)).astype(np.float32)
start[0] = 0
xyz = np.repeat(start[None], N, 0)
xyz[:, :, 0] += 0.1 * np.arange(N, dtype=np.float32)[:, None]  # frame t is t Angstrom further
whole = md.Trajectory(xyz, topology, time=np.arange(N))
whole.unitcell_lengths, whole.unitcell_angles = np.full((N, 3), 9.0), np.full((N, 3), 90.0)


def frames(kind, **options):
    top = {} if kind == "pdb" else {"top": topology}
    parts = list(md.iterload(f"{sys.argv[1]}/t.{kind}", **top, **options))
    atoms = parts[0].n_atoms
    return atoms, [round(10 * float(x)) for part in parts for x in part.xyz[:, 0, 0]]


every = list(range(N))
for kind in ("dcd", "pdb"):
    whole.save(f"{sys.argv[1]}/t.{kind}")
    assert frames(kind, chunk=10) == (ATOMS, every)

# as one expects
assert frames("dcd", chunk=10, stride=3, skip=5) == (ATOMS, every[5::3])
assert frames("dcd", chunk=10, stride=3, atom_indices=[0, 1]) == (2, every[::3])
assert frames("pdb", chunk=10, stride=3) == (ATOMS, every[::3])

for kind in ("dcd", "pdb"):
    atoms, found = frames(kind, chunk=0, stride=3, skip=5, atom_indices=[0, 1])
    print(f"{kind}, chunk=0, stride=3, atom_indices=[0, 1]: {atoms} atoms, frames {found[:4]}...")
    assert atoms == ATOMS and found == every[5:]
for skip in (1, 5, 20):
    _, found = frames("pdb", chunk=10, skip=skip)
    print(f"pdb, skip={skip}: frames {found[:4]}...")
    assert found == every
PY
"$work/venv/bin/python" "$work/iterload.py" "$work" 2>&1 | grep -v dcdplugin
