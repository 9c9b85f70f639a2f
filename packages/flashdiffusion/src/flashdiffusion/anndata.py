"""Diffusion maps of AnnData objects, written where scanpy looks for them.

`sc.tl.dpt`, `sc.pl.diffmap` and whatever else reads `obsm["X_diffmap"]` and
`uns["diffmap_evals"]` go on from `diffmap`. The extra is `flashdiffusion[anndata]`; no function
here imports it, because an AnnData object brings its own methods.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

from shared_kernels import checks

from . import _checks, _filter, _graph, doob
from .dmap import DiffusionMap

KERNELS = ("exact", "scanpy")
_KEY = "flashdiffusion"


def _is_anndata(name: str, adata: Any) -> None:
    if not all(hasattr(adata, part) for part in ("obs", "obsm", "obsp", "uns", "n_obs")):
        checks.fail(name, "be an AnnData object", type(adata).__name__, error=TypeError)
    if getattr(adata, "is_view", False):
        checks.fail(name, "be an object of its own", "a view", f"pass {name}.copy()")


def _representation(name: str, adata: Any, use_rep: str) -> np.ndarray:
    if use_rep == "X":
        X = adata.X
    elif use_rep in adata.obsm:
        X = adata.obsm[use_rep]
    else:
        checks.fail(
            "use_rep",
            f"be 'X' or one of {sorted(adata.obsm.keys())} in {name}.obsm",
            use_rep,
            "sc.pp.pca writes X_pca",
        )
    # a sparse matrix may have stayed in its file
    X = X.to_memory() if hasattr(X, "to_memory") else X
    X = X.toarray() if sparse.issparse(X) else X
    _checks.plain(use_rep, X)
    if X is None:
        checks.fail("use_rep", "be a key of obsm where there is no X", use_rep)
    X = np.asarray(X)
    if X.dtype.kind not in "fiubO":
        checks.fail(use_rep, "be real numbers", f"dtype {X.dtype}", error=TypeError)
    # float32 would round large counts
    exact = np.float32 if np.can_cast(X.dtype, np.float32) else np.float64
    return X.astype(exact, copy=False)


def _eigenvalues(adata: Any) -> np.ndarray:
    """Of the map that `diffmap` has written and no other function has overwritten."""
    if _KEY not in adata.uns:
        checks.fail("adata", "have uns['flashdiffusion']", "none", "call diffmap(adata) first")
    values = np.asarray(adata.uns[_KEY]["eigenvalues"], dtype=np.float64)
    beside = np.asarray(adata.uns["diffmap_evals"])[1:]
    if beside.shape != values.shape or not np.allclose(beside, values, rtol=0.0, atol=1e-5):
        checks.fail(
            "adata",
            "hold the map that diffmap has written",
            "one that another function has written since (sc.tl.diffmap?)",
            "call flashdiffusion.anndata.diffmap(adata) again",
        )
    return values


def _connectivities(adata: Any, neighbors_key: str | None) -> Any:
    key = "neighbors" if neighbors_key is None else neighbors_key
    if key not in adata.uns:
        checks.fail(
            "adata", f"have uns[{key!r}]", "no neighbour graph", "call sc.pp.neighbors(adata)"
        )
    return adata.obsp[adata.uns[key].get("connectivities_key", "connectivities")]


def diffmap(
    adata: Any,
    n_comps: int = 15,
    use_rep: str = "X_pca",
    *,
    kernel: str = "exact",
    neighbors_key: str | None = None,
    beta: float | str = "self-tuning",
    alpha: float = 1.0,
    random_state: Any = 0,
    **diffusion_map: Any,
) -> DiffusionMap:
    """The diffusion map of the cells, in scanpy's layout and as a fitted estimator.

    P = D^-1 K / (r^alpha r^alpha) as in DiffusionMap. Column k of obsm["X_diffmap"] is the unit
    eigenvector Z_k of the symmetric form, so psi_k = Z_k / Z_0; column 0 is the trivial one.

    Args:
        adata: AnnData, no view; written to.
        n_comps: columns, the trivial one included as in scanpy.
        use_rep: key of obsm with the coordinates, or "X"; not read by kernel="scanpy".
        kernel: "exact" computes ours from the coordinates (all pairs, or neighbors=k in
            `diffusion_map`); "scanpy" takes the connectivities that sc.pp.neighbors has written,
            and gives the numbers of sc.tl.diffmap.
        neighbors_key: of uns, for kernel="scanpy"; None is "neighbors".
        beta, alpha, random_state, diffusion_map: parameters of DiffusionMap. beta is not used by
            kernel="scanpy", and alpha is 1 in sc.tl.diffmap.

    Returns:
        The fitted DiffusionMap with n_comps - 1 pairs; its float64 vectors have no trivial one.
        Written: obsm["X_diffmap"] (n, n_comps) and uns["diffmap_evals"] (n_comps,), float32
        like scanpy's, and uns["flashdiffusion"] for `dpt`.

    Raises:
        ValueError: no such representation, no neighbour graph, n_comps < 2 or above the cells.

    Example:
        >>> from anndata import AnnData  # doctest: +SKIP
        >>> dm = diffmap(AnnData(X), n_comps=5, use_rep="X")  # doctest: +SKIP

    Source: Haghverdi, Buettner and Theis, Bioinformatics 31 (2015) 2989.
    """
    _is_anndata("adata", adata)
    checks.in_set("kernel", kernel, KERNELS)
    checks.positive_int("n_comps", n_comps)
    if n_comps < 2 or n_comps > adata.n_obs:
        checks.fail("n_comps", f"be in [2, {adata.n_obs}], the trivial one included", n_comps)
    options = {
        "alpha": alpha,
        "n_components": n_comps - 1,
        "random_state": random_state,
        **diffusion_map,
    }
    if kernel == "scanpy":
        dm = DiffusionMap(affinity="precomputed", **options)
        dm.fit(_connectivities(adata, neighbors_key))
        _largest_in_size(dm)
    else:
        dm = DiffusionMap(beta=beta, **options).fit(_representation("adata", adata, use_rep))
    _write(adata, dm, kernel, use_rep if kernel == "exact" else "", _columns(dm))
    return dm


def _columns(
    dm: DiffusionMap, psi: np.ndarray | None = None, stationary: np.ndarray | None = None
) -> np.ndarray:
    """Z of the fitted points, or of others: (n, n_comps) float32."""
    root = np.sqrt(dm.stationary_ if stationary is None else stationary)[:, None]
    psi = dm.eigenvectors_ if psi is None else psi
    return np.concatenate((root, psi * root), 1).astype(np.float32)


def _write(adata: Any, dm: DiffusionMap, kernel: str, use_rep: str, Z: np.ndarray) -> None:
    adata.obsm["X_diffmap"] = Z
    adata.uns["diffmap_evals"] = np.concatenate(([1.0], dm.eigenvalues_)).astype(np.float32)
    eigenvalues = dm.eigenvalues_.copy()
    adata.uns[_KEY] = {"kernel": kernel, "use_rep": use_rep, "eigenvalues": eigenvalues}


def _largest_in_size(dm: DiffusionMap) -> None:
    """scanpy asks for the eigenvalues that are largest in size; ours are the largest.

    The lower end of the spectrum is looked at, and where it is larger than the last of ours the
    pairs of that end take their place.
    """
    operator: Any = dm.operator()
    N, k = len(dm.X_fit_), len(dm.eigenvalues_)
    most = min(k, N - 2)
    if most < 1:
        return
    rng = np.random.default_rng(0)
    matrix = _filter.symmetric_form(operator.kernel.matrix, operator.rscale.cpu().numpy())
    v0 = rng.standard_normal(N)
    last = float(np.abs(dm.eigenvalues_).min())
    n = 1
    while True:
        if N <= 512:
            values, vectors = np.linalg.eigh(matrix.toarray())
            values, vectors = values[:most], vectors[:, :most]
        else:
            values, vectors = sparse.linalg.eigsh(matrix, n, which="SA", v0=v0, tol=1e-9)
        if N <= 512 or values.max() > -last or n == most:
            break
        n = min(2 * n, most)
    known = dm.eigenvalues_.min()
    extra = (values < -last) & (values < known - 1e-9)
    if not extra.any():
        return
    psi = vectors[:, extra] / np.sqrt(dm.stationary_)[:, None]
    every = np.concatenate((dm.eigenvalues_, values[extra]))
    order = np.sort(np.argsort(-np.abs(every), kind="stable")[:k])
    # algebraic order, as scanpy gives them
    order = order[np.argsort(-every[order], kind="stable")]
    dm.eigenvectors_ = np.concatenate((dm.eigenvectors_, psi), 1)[:, order]
    residuals = np.linalg.norm(
        matrix @ vectors[:, extra] - vectors[:, extra] * values[extra], axis=0
    )
    dm.residuals_ = np.concatenate((dm.residuals_, residuals))[order]
    dm.eigenvalues_ = every[order]


def transform(adata: Any, new: Any, dm: DiffusionMap, *, affinity: Any = None) -> np.ndarray:
    """New cells in the map of the old ones (Nystroem), written in the same layout.

    psi_k(x) = sum_j P(x, x_j) psi_k(x_j) / lambda_k; column 0 is sqrt(d(x) / sum d). A cell of
    `adata` gets its own row again.

    Args:
        adata: the AnnData that `diffmap` was called with.
        new: AnnData of new cells in the same representation (the same principal components:
            `sc.tl.ingest`, or (X - mean) @ adata.varm["PCs"]); written to, as by `diffmap`.
        dm: what `diffmap` returned.
        affinity: (n, N) kernel values between new and old cells, sparse or dense: for
            kernel="scanpy", whose graph says nothing about new cells.

    Returns:
        (n, n_comps - 1) psi at the new cells, float64.
    """
    _is_anndata("adata", adata)
    _is_anndata("new", new)
    dm.require_fitted()
    if not np.array_equal(_eigenvalues(adata), dm.eigenvalues_):
        checks.fail("dm", "be what diffmap returned for `adata`", "another map")
    wrote = adata.uns[_KEY]
    if dm.affinity == "precomputed":
        if affinity is None:
            checks.fail(
                "affinity",
                "be given where the map was fitted on a graph",
                None,
                "or call diffmap with kernel='exact'",
            )
        links: Any = _graph.given_rows(affinity, len(dm.X_fit_))
        if links.shape[0] != new.n_obs:
            checks.fail("affinity", f"have {new.n_obs} rows, one per new cell", links.shape[0])
    else:
        if affinity is not None:
            checks.fail("affinity", "be None with kernel='exact'", type(affinity).__name__)
        X = dm._validated(_representation("new", new, wrote["use_rep"]), reset=False)
        links = dm.kernel_to(X)
    vectors, bias = dm._tensor(dm._fitted_eigenvectors()), dm._tensor(dm.weights_).log()
    extended, log_sum = links.softmax(vectors, bias)
    psi: np.ndarray = extended.double().cpu().numpy() * dm._power(-1)
    log_degree = log_sum.double() - float(dm.alpha) * links.log_sum_exp().double()
    total = (dm.weights_ * dm.row_sums_).sum()
    Z = _columns(dm, psi, np.exp(log_degree.cpu().numpy()) / total)
    _write(new, dm, wrote["kernel"], wrote["use_rep"], Z)
    return psi


def dpt(adata: Any, root: Any, *, key_added: str = "dpt_pseudotime") -> np.ndarray:
    """Diffusion pseudotime: the distance from the root over all scales, from 0 to 1.

    D(x, y)^2 = sum_k (lambda_k / (1 - lambda_k))^2 (psi_k(x) - psi_k(y))^2, the distance between
    rows of sum_{t >= 1} (P^t - 1 pi^T) in the norm of 1 / pi. Every pair counts with this weight;
    scanpy gives pairs with lambda >= 0.9994 the weight 1 and adds the trivial one.

    Args:
        adata: after `diffmap`.
        root: the cell, a number or a name of obs_names.
        key_added: column of obs.

    Returns:
        (n,) float64, also written to obs; inf where the root cannot be reached (another part of
        the graph), which is where an eigenvalue is 1.
    """
    _is_anndata("adata", adata)
    values = _eigenvalues(adata)
    if isinstance(root, str):
        found = np.flatnonzero(adata.obs_names == root)
        if len(found) != 1:
            checks.fail("root", "be the name of one cell", f"{root!r}, which {len(found)} have")
        root = int(found[0])
    if isinstance(root, bool) or not isinstance(root, (int, np.integer)):
        checks.fail("root", "be a number or a name of a cell", repr(root), error=TypeError)
    if not 0 <= root < adata.n_obs:
        checks.fail("root", f"be in [0, {adata.n_obs})", root)
    Z = np.asarray(adata.obsm["X_diffmap"], dtype=np.float64)
    psi = Z[:, 1:] / Z[:, :1]
    differences = np.square(psi - psi[root])
    # parts of a graph that hang together in nothing: psi of an eigenvalue 1 is constant on each
    apart = values > 1.0 - 1e-8
    other = (differences[:, apart] > 1e-8 * np.square(psi[:, apart]).max(0, initial=1.0)).any(1)
    weights = values[~apart] / (1.0 - values[~apart])
    time: np.ndarray = np.sqrt(differences[:, ~apart] @ np.square(weights))
    time[other] = np.inf
    largest = time[np.isfinite(time)].max()
    time = time / (largest if largest > 0.0 else 1.0)
    adata.obs[key_added] = time
    adata.uns["iroot"] = int(root)
    return time


def committor(adata: Any, dm: DiffusionMap, groupby: str, A: str, B: str, **options: Any) -> Any:
    """The chance to reach cluster B before cluster A from each cell, also in obs["committor"].

    Args:
        adata: the AnnData that `diffmap` was called with.
        dm: what it returned.
        groupby: column of obs with the clusters.
        A, B: two of its values.
        options: of flashdiffusion.committor.

    Returns:
        (n,) float64: see flashdiffusion.committor.
    """
    _is_anndata("adata", adata)
    if groupby not in adata.obs:
        checks.fail("groupby", f"be one of {list(adata.obs.columns)}", groupby)
    labels = np.asarray(adata.obs[groupby])
    for name, value in (("A", A), ("B", B)):
        if not (labels == value).any():
            checks.fail(name, f"be one of {sorted(map(str, set(labels)))}", value)
    if len(dm.X_fit_) != adata.n_obs:
        checks.fail("dm", f"be fitted on these {adata.n_obs} cells", len(dm.X_fit_))
    Z = adata.obsm.get("X_diffmap")
    if Z is None or not np.array_equal(np.asarray(Z), _columns(dm)):
        checks.fail(
            "dm",
            "be what diffmap has written in `adata`",
            "another map, or its cells in another order",
            "call diffmap(adata) again, or flashdiffusion.committor(dm, A, B)",
        )
    q = doob.committor(dm, labels == A, labels == B, **options)
    adata.obs["committor"] = q
    return q
