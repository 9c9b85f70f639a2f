"""AnnData in scanpy's layout, against scanpy itself on a data set that it ships."""

import numpy as np
import pytest
from scipy import sparse
from scipy.stats import spearmanr

import flashdiffusion.anndata as fa
from flashdiffusion import DiffusionMap

from .cases import ROWS, TOL

pytestmark = pytest.mark.extras


@pytest.fixture
def pbmc():
    sc = pytest.importorskip("scanpy", reason="needs the optional scanpy")
    return sc.datasets.pbmc68k_reduced()


@pytest.fixture
def line():
    """300 cells along a line, in order, with their graph."""
    sc = pytest.importorskip("scanpy", reason="needs the optional scanpy")
    anndata = pytest.importorskip("anndata", reason="needs the optional anndata")
    rng = np.random.default_rng(0)
    t = np.sort(rng.random(300))
    adata = anndata.AnnData(np.outer(t, rng.standard_normal(20)).astype(np.float32))
    adata.X += 0.01 * rng.standard_normal((300, 20)).astype(np.float32)
    adata.obsm["X_pca"] = adata.X.copy()
    sc.pp.neighbors(adata, n_neighbors=10, use_rep="X_pca")
    return adata


def gauss(adata, beta):
    X = np.asarray(adata.obsm["X_pca"], dtype=np.float64)
    K = np.exp(-beta * ((X[:, None] - X[None]) ** 2).sum(-1))
    adata.obsp["gauss"] = sparse.csr_matrix(K)
    adata.uns["gauss"] = {
        "connectivities_key": "gauss",
        "distances_key": "gauss",
        "params": {"n_neighbors": 300, "method": "gauss"},
    }
    return adata


@pytest.mark.parametrize("n_comps", [3, 15, 60])
def test_scanpys_numbers_from_scanpys_graph(pbmc, n_comps):
    import scanpy as sc

    theirs = pbmc.copy()
    sc.tl.diffmap(theirs, n_comps=n_comps)
    fa.diffmap(pbmc, n_comps=n_comps, kernel="scanpy", tol=1e-8)
    a, b = pbmc.obsm["X_diffmap"], theirs.obsm["X_diffmap"]
    assert a.dtype == b.dtype and a.shape == b.shape
    ours, evals = pbmc.uns["diffmap_evals"], theirs.uns["diffmap_evals"]
    assert ours.dtype == evals.dtype and ours.shape == evals.shape
    assert np.abs(ours - evals).max() <= TOL
    if n_comps <= 15:
        signs = np.sign((a * b).sum(0))
        np.testing.assert_allclose(a * signs, b, atol=ROWS)


def test_scanpy_goes_on_from_ours(pbmc, tmp_path):
    import scanpy as sc

    theirs = pbmc.copy()
    sc.tl.diffmap(theirs)
    fa.diffmap(pbmc, kernel="scanpy")
    for adata in (pbmc, theirs):
        adata.uns["iroot"] = 5
        sc.tl.dpt(adata)
    np.testing.assert_allclose(pbmc.obs["dpt_pseudotime"], theirs.obs["dpt_pseudotime"], atol=ROWS)
    sc.pl.diffmap(pbmc, color="bulk_labels", show=False)
    pbmc.write_h5ad(tmp_path / "map.h5ad")
    again = sc.read_h5ad(tmp_path / "map.h5ad")
    np.testing.assert_array_equal(fa.dpt(again, 5), fa.dpt(pbmc, 5))


def test_a_gaussian_put_into_the_graph(pbmc):
    """The conversion: psi = Z_k / Z_0, Z_0 = sqrt(pi), Z_k = psi sqrt(pi)."""
    import scanpy as sc

    beta = 0.005
    adata = gauss(pbmc[:300].copy(), beta)
    sc.tl.diffmap(adata, n_comps=6, neighbors_key="gauss")
    Z, evals = adata.obsm["X_diffmap"].copy(), adata.uns["diffmap_evals"].copy()
    dm = fa.diffmap(adata, n_comps=6, beta=beta, solver="dense")
    np.testing.assert_allclose(evals[1:], dm.eigenvalues_, atol=TOL)
    np.testing.assert_allclose(np.abs(Z[:, 0]), np.sqrt(dm.stationary_), atol=TOL)
    psi = Z[:, 1:] / Z[:, :1]
    signs = np.sign((psi * dm.eigenvectors_).sum(0))
    np.testing.assert_allclose(psi * signs, dm.eigenvectors_, atol=ROWS)
    np.testing.assert_allclose(np.abs(adata.obsm["X_diffmap"]), np.abs(Z), atol=ROWS)


@pytest.mark.parametrize("options", [{}, {"neighbors": 15}, {"kernel": "scanpy"}])
def test_pseudotime_follows_a_line(line, options):
    import scanpy as sc

    fa.diffmap(line, n_comps=10, tol=1e-9, **options)
    time = fa.dpt(line, 0)
    assert time[0] == 0.0 and time.max() == 1.0
    assert spearmanr(time, np.arange(300)).statistic >= 0.99
    np.testing.assert_array_equal(fa.dpt(line, line.obs_names[0]), time)
    if options.get("kernel") == "scanpy":
        line.uns["iroot"] = 0
        sc.tl.dpt(line)  # its own weights: it runs, its order is its own
        assert np.isfinite(line.obs["dpt_pseudotime"]).all()


def test_pseudotime_is_the_distance_over_all_scales(line):
    """Against the sum of powers of a dense P."""
    dm = fa.diffmap(line, n_comps=300, solver="dense", beta="median")
    K = np.exp(-dm.beta_ * ((line.obsm["X_pca"][:, None] - line.obsm["X_pca"][None]) ** 2).sum(-1))
    P = K * dm.weights_[None]
    P /= P.sum(1, keepdims=True)
    pi = dm.stationary_
    M = np.linalg.inv(np.eye(300) - P + pi[None]) - np.eye(300)
    exact = np.sqrt((np.square(M - M[7]) / pi).sum(1))
    np.testing.assert_allclose(fa.dpt(line, 7), exact / exact.max(), atol=10 * ROWS)


def test_cells_of_another_part_are_not_reached(line):
    import anndata
    import scanpy as sc

    both = anndata.concat([line, line], index_unique="-")
    both.obsm["X_pca"][300:] += 100.0
    sc.pp.neighbors(both, n_neighbors=10, use_rep="X_pca")
    with pytest.warns(UserWarning, match="disconnected"):
        fa.diffmap(both, n_comps=8, kernel="scanpy", tol=1e-9)
    time = fa.dpt(both, 3)
    assert np.isinf(time[300:]).all() and np.isfinite(time[:300]).all()


@pytest.mark.parametrize("options", [{}, {"neighbors": 20}])
def test_new_cells(pbmc, options):
    old, new = pbmc[:500].copy(), pbmc[500:].copy()
    dm = fa.diffmap(old, n_comps=6, **options)
    psi = fa.transform(old, new, dm)
    assert psi.shape == (200, 5) and new.obsm["X_diffmap"].dtype == np.float32
    again = old.copy()
    fa.transform(old, again, dm)
    np.testing.assert_allclose(again.obsm["X_diffmap"], old.obsm["X_diffmap"], atol=ROWS)


def test_new_cells_of_a_graph_need_affinities(pbmc):
    dm = fa.diffmap(pbmc, n_comps=6, kernel="scanpy")
    with pytest.raises(ValueError, match="`affinity` must be given"):
        fa.transform(pbmc, pbmc.copy(), dm)
    again = pbmc.copy()
    fa.transform(pbmc, again, dm, affinity=pbmc.obsp["connectivities"])
    np.testing.assert_allclose(again.obsm["X_diffmap"], pbmc.obsm["X_diffmap"], atol=ROWS)


@pytest.mark.parametrize("kernel", ["exact", "scanpy"])
def test_committor_between_two_clusters(pbmc, kernel):
    dm = fa.diffmap(pbmc, n_comps=8, kernel=kernel)
    A, B = "CD14+ Monocyte", "CD19+ B"
    q = fa.committor(pbmc, dm, "bulk_labels", A, B)
    labels = np.asarray(pbmc.obs["bulk_labels"])
    assert (q[labels == A] == 0).all() and (q[labels == B] == 1).all()
    inside = (labels != A) & (labels != B)
    np.testing.assert_allclose(dm.markov(q)[inside], q[inside], atol=TOL)
    # dendritic cells are myeloid like monocytes, T cells lymphoid like B cells
    assert q[labels == "Dendritic"].mean() < q[labels == "CD4+/CD45RO+ Memory"].mean()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_rep": "X_scvi"}, "`use_rep` must be 'X' or one of"),
        ({"kernel": "umap"}, "`kernel` must be"),
        ({"n_comps": 1}, r"`n_comps` must be in \[2, 700\]"),
        ({"kernel": "scanpy", "neighbors_key": "other"}, "sc.pp.neighbors"),
    ],
)
def test_what_is_refused(pbmc, change, message):
    with pytest.raises(ValueError, match=message):
        fa.diffmap(pbmc, **change)


@pytest.mark.parametrize("form", ["csr_matrix", "csc_array", "frame", "counts", "file", "nothing"])
def test_however_the_coordinates_are_stored(form, tmp_path):
    """The map is that of the array, or they are refused by name: in obsm, in X and in a file."""
    anndata = pytest.importorskip("anndata", reason="needs the optional anndata")
    X = np.random.default_rng(0).integers(0, 9, (60, 4)).astype(np.float64)
    adata = anndata.AnnData(None, obs={"n": range(60)}, obsm={"points": X})
    if form == "file":
        anndata.AnnData(sparse.csr_matrix(X)).write_h5ad(tmp_path / "cells.h5ad")
        adata = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    elif form == "frame":
        pandas = pytest.importorskip("pandas", reason="needs the optional pandas")
        adata.obsm["points"] = pandas.DataFrame(X, index=adata.obs_names, columns=list("abcd"))
    elif form == "counts":
        # float32 knows every second integer there
        adata.obsm["points"] = X.astype(np.int64) + 2**24
    elif form != "nothing":
        adata.obsm["points"] = getattr(sparse, form)(X)
    use_rep, options = "points" if form != "file" else "X", {"n_comps": 5, "beta": 0.1}
    if form == "nothing":
        adata.obsm["points"] = X + 1j
        with pytest.raises(TypeError, match="`points` must be real numbers, got dtype complex128"):
            fa.diffmap(adata, use_rep="points", **options)
        with pytest.raises(ValueError, match="be a key of obsm where there is no X"):
            fa.diffmap(adata, use_rep="X", **options)
        return
    exact = DiffusionMap(beta=0.1, alpha=1.0, n_components=4).fit(X)
    dm = fa.diffmap(adata, use_rep=use_rep, **options)
    np.testing.assert_allclose(dm.eigenvalues_, exact.eigenvalues_, atol=TOL)


def test_a_map_of_something_else_is_refused(pbmc):
    import scanpy as sc

    pbmc.obs["end"] = ["a", *["m"] * 698, "b"]
    dm, order = fa.diffmap(pbmc, n_comps=6, alpha=0.5), np.random.default_rng(0).permutation(700)
    q = fa.committor(pbmc, dm, "end", "a", "b")
    with pytest.raises(ValueError, match="`dm` must be what diffmap has written in `adata`"):
        fa.committor(pbmc[order].copy(), dm, "end", "a", "b")
    again = pbmc.copy()
    np.testing.assert_array_equal(fa.committor(again, dm, "end", "a", "b"), q)
    other = fa.diffmap(again, n_comps=6, alpha=0.0)
    with pytest.raises(ValueError, match="`dm` must be what diffmap returned"):
        fa.transform(again, pbmc.copy(), dm)
    # new cells have the map of the old ones, not one that they had before
    fa.transform(pbmc, again, dm)
    np.testing.assert_allclose(fa.dpt(again, 3), fa.dpt(pbmc, 3), atol=10 * ROWS)
    assert np.abs(other.eigenvalues_ - dm.eigenvalues_).max() > TOL
    sc.tl.diffmap(pbmc, n_comps=6)
    with pytest.raises(ValueError, match="another function has written"):
        fa.dpt(pbmc, 3)


def test_not_an_anndata(pbmc):
    with pytest.raises(TypeError, match="be an AnnData object, got ndarray"):
        fa.diffmap(np.zeros((5, 2)))
    with pytest.raises(ValueError, match=r"pass adata.copy\(\)"):
        fa.diffmap(pbmc[:50])
    with pytest.raises(ValueError, match=r"call diffmap\(adata\) first"):
        fa.dpt(pbmc, 0)
    fa.diffmap(pbmc, n_comps=3)
    for root in (700, -1, "nobody"):
        with pytest.raises(ValueError, match="`root` must be"):
            fa.dpt(pbmc, root)
