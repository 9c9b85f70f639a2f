"""MDAnalysis' and mdtraj's own objects, read from the trajectories that MDAnalysisTests ships."""

import os

import numpy as np
import pytest

from flashdiffusion import slow_manifold
from flashdiffusion.sources import Source

from .cases import FLOAT32, ROWS, TOL

XTC = 1e-2  # Angstrom: the format keeps three digits of a nanometre

extras = pytest.mark.extras


@pytest.fixture
def adk():
    mda = pytest.importorskip("MDAnalysis", reason="needs the optional MDAnalysis")
    files = pytest.importorskip("MDAnalysisTests.datafiles", reason="needs MDAnalysisTests")
    return mda.Universe(files.PSF, files.DCD)


@pytest.fixture
def adk_mdtraj():
    md = pytest.importorskip("mdtraj", reason="needs the optional mdtraj")
    files = pytest.importorskip("MDAnalysisTests.datafiles", reason="needs MDAnalysisTests")
    return md.load_dcd(files.DCD, top=files.PSF)


def frames_of(source):
    return np.concatenate(list(source))


@extras
@pytest.mark.parametrize("unit", ["nm", "angstrom"])
@pytest.mark.parametrize("part", [{}, {"start": 3, "stop": 91, "step": 4}, {"step": 7}])
def test_one_map_of_both_libraries(adk, adk_mdtraj, unit, part):
    ca = adk.select_atoms("name CA")
    factor = 1.0 if unit == "angstrom" else 0.1
    frames = np.stack([ca.positions.copy() for _ in adk.trajectory]) * factor
    frames = frames[part.get("start") : part.get("stop") : part.get("step")]
    options = {"n_components": 2, "beta": 1.0 / (2.0 * factor) ** 2}
    exact = slow_manifold(frames, **options)
    for trajectory in (adk, adk_mdtraj):
        ours = slow_manifold(trajectory, selection="name CA", unit=unit, **part, **options)
        np.testing.assert_allclose(ours.eigenvalues_, exact.eigenvalues_, atol=FLOAT32)
        np.testing.assert_allclose(ours.reference_, exact.reference_, atol=ROWS)
    group = slow_manifold(ca, unit=unit, **part, **options)
    np.testing.assert_allclose(group.eigenvalues_, exact.eigenvalues_, atol=TOL)


@extras
def test_files_are_read_by_batches(adk, tmp_path):
    md = pytest.importorskip("mdtraj", reason="needs the optional mdtraj")
    files = pytest.importorskip("MDAnalysisTests.datafiles", reason="needs MDAnalysisTests")
    whole = md.load_dcd(files.DCD, top=files.PSF)
    names = [str(tmp_path / "a.xtc"), str(tmp_path / "b.xtc")]
    whole[:40].save_xtc(names[0])
    whole[40:].save_xtc(names[1])
    source = Source(names, top=files.PSF, selection="name CA", chunk=17, unwrap=False)
    assert source.n_frames == 98 and source.n_atoms == 214
    exact = whole.xyz[:, whole.topology.select("name CA")]
    np.testing.assert_allclose(frames_of(source), exact, atol=XTC)
    for start, stop, step in ((0, None, 3), (38, 45, 2), (50, 90, 7), (1, 2, 1)):
        part = Source(
            names, top=files.PSF, start=start, stop=stop, step=step, chunk=17, unwrap=False
        )
        np.testing.assert_allclose(frames_of(part), whole.xyz[start:stop:step], atol=XTC)
    dm = slow_manifold(source, n_components=2, beta="median", landmarks=60)
    assert dm.transform().shape == (98, 2)


@extras
@pytest.mark.parametrize("landmarks", [None, 60])
@pytest.mark.parametrize("given", ["list", "iterload", "function"])
def test_chunks_of_mdtraj_are_batches(adk_mdtraj, tmp_path, given, landmarks):
    md = pytest.importorskip("mdtraj", reason="needs the optional mdtraj")
    ca = adk_mdtraj.atom_slice(adk_mdtraj.topology.select("name CA"))
    ca[0].save_pdb(str(tmp_path / "ca.pdb"))
    ca.save_dcd(str(tmp_path / "ca.dcd"))

    def chunks():
        return md.iterload(str(tmp_path / "ca.dcd"), top=str(tmp_path / "ca.pdb"), chunk=30)

    trajectory = {"list": list(chunks()), "iterload": chunks(), "function": chunks}[given]
    options = {"n_components": 2, "beta": 25.0, "landmarks": landmarks}
    ours = slow_manifold(trajectory, **options)
    exact = slow_manifold(ca.xyz, **options)
    np.testing.assert_allclose(ours.eigenvalues_, exact.eigenvalues_, atol=FLOAT32)
    with pytest.raises(TypeError, match="`X` must be an array, got Trajectory; pass .xyz"):
        ours.transform(ca)


@extras
def test_a_list_of_one_timestep(adk, tmp_path):
    mda = pytest.importorskip("MDAnalysis", reason="needs the optional MDAnalysis")
    ca = adk.select_atoms("name CA")
    ca.write(str(tmp_path / "ca.pdb"))
    ca.write(str(tmp_path / "ca.xtc"), frames="all")
    reader = mda.Universe(str(tmp_path / "ca.pdb"), str(tmp_path / "ca.xtc")).trajectory
    for frames in (list(reader), [ts.positions[:9] for ts in reader]):
        with pytest.raises(ValueError, match="hold frames that do not share memory"):
            slow_manifold(frames, n_components=2)


@extras
@pytest.mark.parametrize("kind", ["dcd", "xtc"])
def test_a_file_that_was_cut(adk, tmp_path, kind):
    mda = pytest.importorskip("MDAnalysis", reason="needs the optional MDAnalysis")
    name = str(tmp_path / f"cut.{kind}")
    with mda.Writer(name, adk.atoms.n_atoms) as writer:
        for _ in adk.trajectory[:40]:
            writer.write(adk.atoms)
    universe = mda.Universe(adk.filename, name)
    os.truncate(name, os.path.getsize(name) // 2)
    with pytest.raises((ValueError, OSError), match="`trajectory`"):
        slow_manifold(universe, n_components=2, unwrap=False)


@extras
@pytest.mark.parametrize("library", ["mdanalysis", "mdtraj"])
@pytest.mark.parametrize("bonds", [True, False])
def test_molecules_cut_by_the_box(library, bonds):
    rng = np.random.default_rng(0)
    steps = rng.standard_normal((12, 3))
    chain = np.cumsum(0.1 * steps / np.linalg.norm(steps, axis=1, keepdims=True), 0)
    centre = np.linspace(0.4, 1.6, 30)[:, None, None] * [1.0, 0.0, 0.0] + 1.0
    whole = (chain[None] + centre + 0.01 * rng.standard_normal((30, 12, 3))).astype(np.float32)
    wrapped = whole % np.float32(2.0)
    if library == "mdtraj":
        md = pytest.importorskip("mdtraj", reason="needs the optional mdtraj")
        top = md.Topology()
        residue = top.add_residue("X", top.add_chain())
        atoms = [top.add_atom("C", md.element.carbon, residue) for _ in range(12)]
        for a, b in zip(atoms, atoms[1:], strict=False):
            if bonds:
                top.add_bond(a, b)
        box = {"unitcell_lengths": np.full((30, 3), 2.0), "unitcell_angles": np.full((30, 3), 90.0)}
        cut, fine = (md.Trajectory(xyz, top, **box) for xyz in (wrapped, whole))
    else:
        mda = pytest.importorskip("MDAnalysis", reason="needs the optional MDAnalysis")
        made = []
        for xyz in (wrapped, whole):
            universe = mda.Universe.empty(12, trajectory=True)
            if bonds:
                universe.add_TopologyAttr("masses", np.ones(12))
                universe.add_TopologyAttr("bonds", [(i, i + 1) for i in range(11)])
            universe.load_new(xyz * 10.0, dimensions=np.array([20.0, 20, 20, 90, 90, 90]))
            made.append(universe)
        cut, fine = made
    options = {"n_components": 2, "beta": 5.0}
    with pytest.raises(ValueError, match="periodic box has cut"):
        slow_manifold(cut, **options)
    exact = slow_manifold(whole, **options)
    np.testing.assert_allclose(
        slow_manifold(fine, **options).eigenvalues_, exact.eigenvalues_, atol=ROWS
    )
    slow_manifold(cut, unwrap=False, **options)
    if bonds:
        ours = slow_manifold(cut, unwrap=True, **options)
        np.testing.assert_allclose(ours.eigenvalues_, exact.eigenvalues_, atol=ROWS)
        # no bond joins two of these atoms
        ours = slow_manifold(cut, selection="index 0 3 6 9", unwrap=True, **options)
        exact = slow_manifold(whole[:, ::3], **options)
        np.testing.assert_allclose(ours.eigenvalues_, exact.eigenvalues_, atol=ROWS)
    else:
        with pytest.raises(ValueError, match="`unwrap` must be None or False without bonds"):
            slow_manifold(cut, unwrap=True, **options)


@extras
@pytest.mark.parametrize("library", ["mdanalysis", "mdtraj"])
@pytest.mark.parametrize("bonds", [True, False])
@pytest.mark.parametrize("chunk", [7, 256])
def test_a_molecule_on_another_side_of_the_box(library, bonds, chunk):
    """Of a pair of chains one comes back on the other side: for frames 7 to 11 and 20 to 29."""
    n, box = 30, np.float32(2.0)
    rng = np.random.default_rng(0)
    xyz = 0.9 + 0.02 * rng.standard_normal((n, 8, 3)).astype(np.float32)
    xyz[:, 4:] += np.float32(0.3)
    moved = xyz.copy()
    moved[7:12, 4:, 1] -= box
    moved[20:, 4:, 1] += box
    if library == "mdtraj":
        md = pytest.importorskip("mdtraj", reason="needs the optional mdtraj")
        top = md.Topology()
        atoms = []
        for _ in range(2):
            residue = top.add_residue("X", top.add_chain())
            atoms += [top.add_atom("C", md.element.carbon, residue) for _ in range(4)]
        for i in (0, 1, 2, 4, 5, 6) if bonds else ():
            top.add_bond(atoms[i], atoms[i + 1])
        lengths = {"unitcell_lengths": np.full((n, 3), box)}
        fine, jumps = (
            md.Trajectory(x, top, **lengths, unitcell_angles=np.full((n, 3), 90.0))
            for x in (xyz, moved)
        )
    else:
        mda = pytest.importorskip("MDAnalysis", reason="needs the optional MDAnalysis")
        made = []
        for x in (xyz, moved):
            universe = mda.Universe.empty(
                8,
                n_residues=2,
                n_segments=2,
                atom_resindex=np.repeat([0, 1], 4),
                residue_segindex=[0, 1],
                trajectory=True,
            )
            if bonds:
                pairs = [(i, i + 1) for i in (0, 1, 2, 4, 5, 6)]
                universe.add_TopologyAttr("masses", np.ones(8))
                universe.add_TopologyAttr("bonds", pairs)
            universe.load_new(x * 10, dimensions=np.array([20.0, 20, 20, 90, 90, 90]))
            made.append(universe)
        fine, jumps = made
    one = "index 4 to 7" if library == "mdtraj" else "index 4:7"
    for unwrap in (None, True) if bonds else (None,):
        options = {"unwrap": unwrap, "chunk": chunk}
        frames = np.concatenate(list(Source(fine, **options)))
        assert len(list(Source(jumps, **options, start=12, stop=20))) > 0
        assert len(np.concatenate(list(Source(jumps, **options, selection=one)))) == n
        if unwrap and library == "mdanalysis":  # which puts each molecule into the box
            np.testing.assert_allclose(
                np.concatenate(list(Source(jumps, **options))), frames, atol=ROWS
            )
            jumps.atoms.universe.load_new((xyz + 0.8) * 10, dimensions=jumps.dimensions)
            with pytest.raises(ValueError, match="another side of the periodic box"):
                list(Source(jumps, **options))  # the second one's centre lies at its edge
            continue
        for start, frame in ((0, 7), (7, 12), (13, 20)):
            with pytest.raises(ValueError, match=f"another side .* in frame {frame}\\b"):
                list(Source(jumps, **options, start=start))
    assert sum(map(len, Source(jumps, unwrap=False, chunk=chunk))) == n


@extras
def test_a_group_that_changes_is_refused(adk):
    group = adk.select_atoms("prop z < 0", updating=True)
    with pytest.raises(ValueError, match="the same atoms in each frame, got UpdatingAtomGroup"):
        Source(group)
    assert Source(group.atoms).n_atoms == len(group)


@extras
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "name XX"}, "`selection` must match at least one atom"),
        ({"unit": "m"}, "`unit` must be"),
        ({"start": -3}, "`start` must be"),
        ({"step": 0}, "`step` must be"),
        ({"start": 98}, "`start` must leave at least one of 98"),
        ({"unwrap": "yes"}, "`unwrap` must be"),
    ],
)
def test_what_is_refused(adk, options, message):
    with pytest.raises(ValueError, match=message):
        slow_manifold(adk, **options)


@pytest.mark.parametrize(
    "options",
    [{"selection": "all"}, {"start": 1}, {"step": 2}, {"unwrap": True}, {"unit": "angstrom"}],
)
def test_options_of_sources_are_not_for_arrays(options):
    with pytest.raises(ValueError, match="be left out for arrays and iterables"):
        slow_manifold(np.random.default_rng(0).standard_normal((40, 3, 3)), **options)


def test_other_objects():
    with pytest.raises(TypeError, match="be a Universe, an AtomGroup, an mdtraj Trajectory"):
        Source(np.zeros((5, 2, 3)))
