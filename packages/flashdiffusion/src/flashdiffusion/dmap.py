"""Diffusion maps as a scikit-learn estimator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from shared_kernels import checks, dispatch

from . import _checks, _graph, _group, _rungs, eigensolver, utils
from ._checkpoint import Checkpoint
from ._operator import Kernel, Reversible
from ._progress import CallbackSupportMixin, Progress, begin_fit, end_fit, with_callbacks

BANDWIDTHS = ("bgh", "median", "self-tuning")
# Tile pairs whose entries are all smaller are skipped. Row sums are at least 1, so N such entries
# change M by less than a quarter of float32's rounding; in float64 nothing that it could tell.
SKIP_BELOW_FLOAT32 = 2.0**-26  # / N
SKIP_BELOW_FLOAT64 = 1e-18
_DENSE_UP_TO = 512


class Frames(NamedTuple):
    """How a trajectory's frames became points: what new frames need, besides `reference_`."""

    align: str | None
    weights: Any
    lag: int
    n_delays: int


class DiffusionMap(
    CallbackSupportMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator,
    auto_wrap_output_keys=None,
):  # type: ignore[call-arg]  # fmt: skip
    """Diffusion maps without the N x N matrix.

    K_ij = exp(-beta |x_i - x_j|^2), Ka = K / (r^alpha r^alpha) with r the row sums of K, and
    P = D^-1 Ka. The coordinates of x_i at time t are lambda_k^t psi_k(x_i), P psi = lambda psi,
    sum_i pi_i psi_k(x_i)^2 = 1 and pi the stationary distribution; the trivial pair (1, constant)
    is left out. Euclidean distance between coordinates (all of them) is diffusion distance.

    Args:
        beta: inverse temperature > 0 in 1 / |x|^2, or a rule: "bgh" (utils.bgh_bandwidth),
            "median" (utils.median_bandwidth), "self-tuning" (score |x-y|^2 / (sigma_x sigma_y),
            sigma the distance to the 7th neighbour, beta = 1).
        alpha: in [0, 1]; 0 keeps the sampling density, 1/2 is Fokker-Planck, 1 removes it.
        n_components: coordinates, at most N - 1.
        solver: "krylov" (block Krylov), "dense", or "auto": dense for N <= 512 or
            n_components + 1 > N / 5 (only then an N x N matrix exists), else krylov. For comparison
            "lobpcg" and "lanczos" (one vector: it can miss copies of a multiple eigenvalue).
        tol: largest residual |M v - lambda v| (unit v) that counts as converged.
        landmarks: None, a number m < N of rows to choose at random, or row indices. The map is
            fitted on these rows and extended to all by one N x m sweep.
        neighbors: k makes the kernel sparse: K_ij of the points where one is among the k nearest
            of the other, 0 elsewhere, and memory O(k N). "self-tuning" then takes its scales from
            the same search (the k-th neighbour, if k < 7). None keeps all pairs.
        affinity: "rbf", or "precomputed": X is then a symmetric matrix of kernel values (N, N),
            scipy sparse (an `obsp` of AnnData) or dense, whose diagonal counts as it is; beta is
            left out, and `transform` takes rows of affinities (n, N).
        search: for the neighbours: "exact" (tiles of distances), "tree" (exact too, a k-d tree:
            faster up to about 10 dimensions), "pynndescent" or "faiss" (approximate; extras).
        random_state: of the start block, the bandwidth's sample and the landmarks.
        verbose: 1 shows a progress bar.

    Performance:
        precision: "auto" (float32 sweeps, "mixed" where beta |x|^2 is large; float64 input gets
            final float64 sweeps), "float32", "mixed" or "float64". "half" is "auto" after a rough
            solve with fp16 distances, by the Triton kernel alone: GPUs, given beta or "bgh" or
            "median", beta |x|^2 up to 128 for centred points.
        tile: rows and columns of a tile; None chooses by dtype and device.
        device: torch device of the sweeps; None is the CPU, or the device of a tensor X.
        group: processes of torch.distributed (torchrun) that fit together: "world" or a
            ProcessGroup; None is this process alone. Each calls fit with the same X and parameters
            and gets the same map. See "Several processes" in the README.
        checkpoint: a folder for the state of the solve, written after each sweep and deleted at
            the end. fit goes on from what it finds there, to the same eigenvalues.

    Attributes:
        eigenvalues_: (n_components,), descending.
        eigenvectors_: (N, n_components), psi.
        stationary_, density_: (N,) each, pi and the row sums r of the kernel.
        residuals_: (n_components,), what ``tol`` bounds; converged_: whether it did, and whether no
            residual is above sqrt(tol) |lambda| (such a vector is noise); n_converged_: how many of
            the first pairs are as good.
        n_passes_: sweeps over the kernel; n_half_passes_: those of them in half precision.
        beta_, dimension_: as used, and as estimated with "bgh".
        landmarks_: indices, or None.
        affinity_: scipy CSR of a sparse kernel; neighbours_: its search, or None.
        X_fit_, weights_, row_sums_, sigma_, sigma_fallback_: for extension to new points, besides
            n_features_in_.

    Warnings:
        ConvergenceWarning: tol was not reached, or an eigenvalue is smaller than what its residual
            allows; it says which pairs are good.
        UserWarning: the second eigenvalue is 1 (the graph is disconnected), most row sums are 1
            (the bandwidth is too small), all entries are nearly 1 (it is too large, or all points
            are the same: coordinates are noise), or the first coordinate lives on less than a
            hundredth of the stationary weight (a few points lie apart).

    Example:
        >>> angle = np.linspace(0, 2 * np.pi, 100, endpoint=False)
        >>> circle = np.stack((np.cos(angle), np.sin(angle)), 1)
        >>> dm = DiffusionMap(beta=10.0, n_components=2).fit(circle)
        >>> dm.transform().shape
        (100, 2)

    Source: Coifman and Lafon, "Diffusion maps" (2006).
    """

    def __init__(
        self,
        beta: float | str = "bgh",
        alpha: float = 0.5,
        n_components: int = 8,
        *,
        solver: str = "auto",
        tol: float = 1e-6,
        precision: str = "auto",
        tile: int | None = None,
        landmarks: Any = None,
        neighbors: int | None = None,
        affinity: str = "rbf",
        search: str = "exact",
        random_state: Any = 0,
        verbose: int = 0,
        device: Any = None,
        group: Any = None,
        checkpoint: Any = None,
    ) -> None:
        self.beta = beta
        self.alpha = alpha
        self.n_components = n_components
        self.solver = solver
        self.tol = tol
        self.precision = precision
        self.tile = tile
        self.landmarks = landmarks
        self.neighbors = neighbors
        self.affinity = affinity
        self.search = search
        self.random_state = random_state
        self.verbose = verbose
        self.device = device
        self.group = group
        self.checkpoint = checkpoint

    # ---- scikit-learn's side

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        given = self.affinity == "precomputed"
        tags.input_tags.pairwise = tags.input_tags.sparse = tags.input_tags.positive_only = given
        return tags

    def __getstate__(self) -> dict[str, Any]:
        # processes end; what they have found is on every rank
        return {**super().__getstate__(), "group": None}

    @property
    def _n_features_out(self) -> int:
        return self.eigenvectors_.shape[1]

    def require_fitted(self) -> None:
        check_is_fitted(self, "eigenvectors_")

    @contextmanager
    def agreed(self) -> Iterator[_group.Said]:
        """Where arguments of something that all processes of `group` compute are checked.

        What one refuses all refuse, and the map itself must be the same on each.
        """
        ranks = _group.resolve(self.group)
        with _group.together(ranks) as said:
            self.require_fitted()
            if ranks is not None:
                said.same["dm"] = _group.fingerprint(
                    self.weights_, self.eigenvectors_, self.beta_, self._parameters()
                )
            yield said

    def _validated(self, X: Any, *, reset: bool) -> np.ndarray:
        _checks.plain("X", X)
        if isinstance(X, Tensor):
            tensor = _checks.as_tensor("X", X)
            X = (tensor if tensor.dtype == torch.float64 else tensor.float()).cpu().numpy()
        return validate_data(
            self, X, reset=reset, dtype=[np.float64, np.float32],
            accept_sparse="csr" if self.affinity == "precomputed" else False,
            ensure_min_samples=2 if reset else 0,
        )  # fmt: skip

    # ---- fitting

    @with_callbacks
    def fit(self, X: Any, y: Any = None) -> DiffusionMap:
        """Choose the bandwidth, sum the rows (two passes) and solve for the eigenpairs.

        Args:
            X: (N, d) points, N >= 2, finite, dense; numpy or torch.

        Callbacks of scikit-learn 1.9 and later (`set_callbacks`) are told of the fit and of each
        look at the residuals, as a task "passes"; one that asks to stop gets the map found so far,
        with a ConvergenceWarning.
        """
        begin_fit(self, X)
        self._fit(X)
        end_fit(self, X)
        return self

    def _fit(self, X: Any) -> DiffusionMap:
        on = X.device if isinstance(X, Tensor) and self.device is None else self.device
        self.device_ = torch.device("cpu" if on is None else on)
        if _graph.wanted(self):
            return _graph.fit(self, X)
        ranks = _group.resolve(self.group)
        with _group.together(ranks) as said:
            X = self._validated(X, reset=True)
            self._check_parameters(len(X))
            landmarks = self._checked_landmarks(len(X))
            said.first["rng"] = check_random_state(self.random_state)
            said.same["X"] = self._problem(X, landmarks)
            said.same["checkpoint"] = self.checkpoint is None
        rng = said.first["rng"]
        if isinstance(landmarks, int):
            landmarks = np.sort(rng.permutation(len(X))[:landmarks])
        self.landmarks_ = landmarks
        self.X_fit_ = X if landmarks is None else X[landmarks]
        points = self._tensor(self.X_fit_)
        self._choose_bandwidth(points, rng, ranks)
        exact = self._kernel(points, precision=self._final_precision(points.dtype), ranks=ranks)
        saved = None
        if self.precision == "half" or self.checkpoint is not None:
            with _group.together(ranks):
                if self.precision == "half":
                    # before any sweep: what cannot run is refused with the reasons
                    rung = self._kernel(points, precision="half")
                    dispatch.choose("flashdiffusion::matvec", "auto", rung.reasons())
                if self.checkpoint is not None:
                    saved = Checkpoint(self.checkpoint, self._solved(X), ranks)
        sums = None if saved is None else saved.sums()
        density, row_sums = (exact.density(), None) if sums is None else sums
        weights = density ** -float(self.alpha)
        operator = Reversible(exact, weights, row_sums)
        if saved is not None and sums is None:
            saved.save_sums(density, operator.row_sums)
        self._solve(operator, density, rng, n_passes=1, saved=saved)
        self._warn_of_lonely_points()
        if self.landmarks_ is not None:
            self._extend([X], ranks)
        if saved is not None:
            saved.done()
        return self

    def _parameters(self) -> dict[str, Any]:
        own = ("group", "checkpoint", "device", "verbose", "random_state", "landmarks")
        return {k: v for k, v in self.get_params(deep=False).items() if k not in own}

    def _problem(self, X: np.ndarray, landmarks: int | np.ndarray | None) -> int:
        """What must be the same in every process."""
        return _group.fingerprint(X, landmarks, self._parameters())

    def _solved(self, X: np.ndarray) -> int:
        """What must be the same where a solve goes on: the numbers that were chosen, too."""
        chosen = {**self._parameters(), "beta": self.beta_}
        return _group.fingerprint(X, self.landmarks_, self.sigma_, chosen)

    def _tensor(self, array: np.ndarray) -> Tensor:
        # torch takes no memory map that is read-only
        array = np.require(array, requirements=["C", "W"])
        return torch.from_numpy(array).to(self.device_)

    def _check_parameters(self, N: int) -> None:
        if isinstance(self.beta, str):
            checks.in_set("beta", self.beta, BANDWIDTHS)
        else:
            _checks.positive("beta", self.beta)
        _graph.check(self, N)
        _checks.alpha_range(self.alpha)
        _checks.positive("tol", self.tol)
        if not isinstance(self.n_components, (int, np.integer)) or self.n_components < 1:
            checks.fail("n_components", "be an int of at least 1", repr(self.n_components))
        if self.n_components >= N:
            checks.fail(
                "n_components", f"be at most {N - 1}, points minus one (n_samples = {N})",
                self.n_components,
            )  # fmt: skip
        if self.tile is not None:
            checks.positive_int("tile", self.tile)
        checks.in_set("solver", self.solver, eigensolver.SOLVERS)
        if self.solver in ("lobpcg", "lanczos") and (self.group, self.checkpoint) != (None, None):
            checks.fail(
                "solver", "be 'auto', 'krylov' or 'dense' with `group` or `checkpoint`", self.solver
            )
        checks.in_set("precision", self.precision, (*_checks.PRECISIONS, "half"))
        if self.precision == "half" and self.solver not in ("auto", "krylov"):
            checks.fail("solver", "be 'auto' or 'krylov' with precision='half'", self.solver)

    def _checked_landmarks(self, N: int) -> int | np.ndarray | None:
        """How many to choose, or which, or None."""
        if self.landmarks is None:
            return None
        if isinstance(self.landmarks, (int, np.integer)):
            if not 2 <= self.landmarks <= N:
                checks.fail("landmarks", f"be in [2, {N}]", self.landmarks)
            self._check_components(int(self.landmarks))
            return int(self.landmarks)
        _checks.plain("landmarks", self.landmarks)
        rows = np.asarray(self.landmarks)
        _checks.no_mask("landmarks", rows)
        if rows.ndim != 1 or rows.dtype.kind not in "iu" or len(np.unique(rows)) != len(rows):
            checks.fail("landmarks", "be a number or distinct row indices", repr(self.landmarks))
        if len(rows) < 2 or rows.min() < 0 or rows.max() >= N:
            checks.fail("landmarks", f"be at least two indices in [0, {N})", repr(self.landmarks))
        self._check_components(len(rows))
        return rows

    def _check_components(self, n_landmarks: int) -> None:
        if self.n_components >= n_landmarks:
            checks.fail(
                "n_components", f"be at most {n_landmarks - 1}, points minus one",
                self.n_components,
            )  # fmt: skip

    def _choose_bandwidth(
        self, points: Tensor, rng: np.random.RandomState, ranks: _group.Ranks | None
    ) -> None:
        self.sigma_ = self.sigma_fallback_ = None
        # of an earlier fit
        self.__dict__.pop("dimension_", None)
        if self.beta == "bgh":
            found = utils.bgh_bandwidth(points, random_state=rng)
            self.beta_, self.dimension_ = found.beta, found.dimension
        elif self.beta == "median":
            self.beta_ = utils.median_bandwidth(points, random_state=rng)
        elif self.beta == "self-tuning":
            self.beta_ = 1.0
            rows = _group.rows_of(ranks, len(points))
            own = None if ranks is None else points
            sigma = rows.whole(utils.local_scales(rows.mine(points), utils.NEIGHBOUR, own))
            self.sigma_fallback_ = utils.fallback_scale(points, utils.NEIGHBOUR, sigma)
            sigma = sigma.where(sigma > 0, self.sigma_fallback_)
            self.sigma_ = sigma.cpu().numpy()
        else:
            self.beta_ = float(self.beta)

    def _kernel(
        self, x: Tensor, y: Tensor | None = None, *, precision: str, sigma_x: Any = None,
        ranks: _group.Ranks | None = None,
    ) -> Kernel:  # fmt: skip
        if _graph.wanted(self):
            return _graph.kernel(self, x, y)
        sigma = None
        if self.sigma_ is not None:
            fitted = self._tensor(self.sigma_)
            sigma = (fitted if sigma_x is None else sigma_x, fitted)
        exact = precision == "float64" or (precision == "auto" and x.dtype == torch.float64)
        skip = SKIP_BELOW_FLOAT64 if exact else SKIP_BELOW_FLOAT32 / max(1, len(x))
        return Kernel(
            x, y, beta=self.beta_, sigma=sigma, precision=precision, skip_below=skip, ranks=ranks,
            tile=self.tile,
        )  # fmt: skip

    def _final_precision(self, dtype: torch.dtype) -> str:
        ours = self._full_precision()
        return "float64" if ours == "auto" and dtype == torch.float64 else ours

    def _full_precision(self) -> str:
        """Of what is reported: the half-precision rung only comes before it."""
        return "auto" if self.precision == "half" else self.precision

    def _solve(
        self, operator: Reversible, density: Tensor, rng: np.random.RandomState, n_passes: int,
        saved: Checkpoint | None = None,
    ) -> None:  # fmt: skip
        """Everything that is learned on the fitted points, from the operator P."""
        self.density_ = density.cpu().numpy()
        self.weights_ = operator.weights.cpu().numpy()
        self.row_sums_ = operator.row_sums.cpu().numpy()
        stationary = operator.degree / operator.degree.sum()
        self.stationary_ = stationary.cpu().numpy()
        if float((density / operator.kernel.diagonal).median()) < 1.01:
            _checks.warn(
                f"most row sums of the kernel are 1: the bandwidth is too small (beta = "
                f"{self.beta_:.3g} is too large) and most points see only themselves",
            )
        pairs = self._eigenpairs(operator, stationary, rng, saved)
        self.eigenvalues_ = pairs.values.cpu().numpy()
        self.residuals_ = pairs.residuals.cpu().numpy()
        self.converged_, self.n_converged_ = pairs.converged, pairs.n_converged
        self.n_passes_ = pairs.n_passes + 1 + n_passes
        self.n_half_passes_ = pairs.n_half_passes
        psi = _signed(pairs.vectors / stationary.sqrt()[:, None])
        self.eigenvectors_ = psi.cpu().numpy()
        if not pairs.converged:
            _checks.warn_unconverged(self._what_is_missing())
        # as if all points were the same
        self.sees_one_point_ = bool((density > 0.999 * len(density)).all())
        if self.sees_one_point_:
            _checks.warn(
                f"all entries of the kernel are nearly 1: the bandwidth is too large (beta = "
                f"{self.beta_:.3g} is too small), or all points are the same; the coordinates are "
                f"noise",
            )
        if operator.kernel.disconnected(self.eigenvalues_[0]):
            _checks.warn(
                f"the second eigenvalue is {self.eigenvalues_[0]:.9f}: the graph is disconnected, "
                f"and the first coordinates only tell its parts apart; take a smaller beta, or "
                f"more neighbors where the kernel is sparse",
            )

    def _what_is_missing(self) -> str:
        good, k = self.n_converged_, len(self.eigenvalues_)
        which = f"{good} of the {k} eigenpairs have" if good else "the eigenpairs have not"
        words = (
            f"{which} converged: the largest residual is {self.residuals_.max():.2e} after "
            f"{self.n_passes_} passes, tol is {self.tol:.1e}"
        )
        if not np.isfinite(self.eigenvalues_).all() or self.eigenvalues_.max() > 1.0 + 1e-6:
            return (
                f"{words}, and an eigenvalue is {self.eigenvalues_.max():.7g}, where 1 is the "
                f"largest: pass the points in float64, or leave out the far ones"
            )
        if self.residuals_.max() <= self.tol:
            return (
                f"{words}; from number {good + 1} on |lambda| is below {self.tol**-0.5:.3g} times "
                f"the residual and the vectors are noise: ask for fewer components, pass the "
                f"points in float64, or take a larger beta"
            )
        return words

    def _warn_of_lonely_points(self) -> None:
        # sum pi psi^2 = 1: what carries a coordinate has at most this stationary weight
        carried = 1.0 / float(self.stationary_ @ self.eigenvectors_[:, 0] ** 4)
        if carried < 0.01 and self.eigenvalues_[0] <= 1.0 - 1e-6:
            _checks.warn(
                f"the first coordinate lives on {carried:.2%} of the stationary weight: a few "
                f"points lie apart from the others (the smallest row sum of the kernel is "
                f"{self.density_.min():.3g}, 1 would be a point that sees only itself); take a "
                f"smaller beta, or leave them out",
            )

    def _eigenpairs(
        self, operator: Reversible, stationary: Tensor, rng: np.random.RandomState,
        saved: Checkpoint | None,
    ) -> eigensolver.Eigenpairs:  # fmt: skip
        N, k = len(stationary), int(self.n_components)
        top, exact = stationary.sqrt()[:, None], operator.kernel
        solver = self.solver
        if solver == "auto":
            small = N <= _DENSE_UP_TO or k + 1 > N / 5
            solver = "dense" if small and self.precision != "half" else "krylov"
        ranks = exact.ranks
        rows = _group.rows_of(ranks, N)
        # 32 columns a pass do for many pairs, but not where few more than those exist
        n_columns = max(k + 4, 6) if k < 30 or k + 32 >= N else 32
        sparse = _graph.wanted(self)
        # the filter's basis would be as large as the matrix
        if solver == "dense" or (sparse and solver == "krylov" and k + 1 > N / 5):
            return _rungs.dense(operator, top, k, self.tol, rows)
        if sparse:
            return _graph.eigenpairs(self, operator, top, rng)
        start = _rungs.start_block(exact.x, top, n_columns, rng)
        fast, half = exact, None
        if fast.dtype == torch.float64 and self.precision in ("auto", "half"):
            # what float32 exponents lose here, float64 passes would have to mend
            precision = "mixed" if fast.problem.spread > 16.0 else "float32"
            fast = self._kernel(fast.x, precision=precision, ranks=ranks)
        if self.precision == "half":
            half = self._kernel(exact.x, precision="half", ranks=ranks)
        shown = bool(self.verbose) and (ranks is None or ranks.rank == 0)
        with Progress(self, shown=shown) as progress:
            if solver in ("lobpcg", "lanczos"):
                solve = eigensolver.lobpcg if solver == "lobpcg" else eigensolver.lanczos
                return solve(operator.apply, k, start, locked=top, tol=self.tol)
            return _rungs.climb(
                operator, fast, start, top, k, self.tol, half=half, rows=rows, saved=saved,
                progress=progress,
            )  # fmt: skip

    def _extend(self, batches: Iterable[np.ndarray], ranks: _group.Ranks | None = None) -> None:
        """From the landmarks to the rows of all batches, in their order, which are read once.

        What is kept per row: density, stationary distribution and eigenvectors.
        """
        fitted, bias = self._tensor(self.X_fit_), self._tensor(self.weights_).log()
        vectors = self._tensor(self.eigenvectors_)
        parts = []
        for X in _group.same_batches(batches, ranks):
            x = self._tensor(X)
            kernel = self._kernel(
                x, fitted, precision=self._full_precision(), sigma_x=self._sigma_of(x), ranks=ranks
            )
            psi, log_sum = kernel.softmax(vectors, bias)
            log_r = kernel.log_sum_exp()
            log_degree = log_sum - float(self.alpha) * log_r
            parts.append([t.double().cpu() for t in (psi, log_r, log_degree)])
        psi, log_r, log_degree = (torch.cat(columns) for columns in zip(*parts, strict=True))
        self.density_ = log_r.exp().numpy()
        self.stationary_ = torch.softmax(log_degree, 0).numpy()
        self.eigenvectors_ = psi.numpy() * self._power(-1)
        self.n_passes_ += 2

    # ---- using what was learned

    def transform(self, X: Any = None, t: float = 1) -> np.ndarray:
        """Coordinates lambda_k^t psi_k: of the fitted rows, or of new points (Nystroem).

        Args:
            X: None for the rows given to fit, else (n, d) points.
            t: diffusion time, >= 0. An integer where an eigenvalue is negative.

        Returns:
            (N or n, n_components), in the dtype of the points.
        """
        self.require_fitted()
        if not np.isfinite(t) or t < 0:
            checks.fail("t", "be at least 0", t)
        if X is None:
            values = self.eigenvectors_ * self._power(t)
            return self._wrapped(values.astype(self.X_fit_.dtype), None)
        given = X
        if hasattr(self, "frames_"):
            X = self._from_frames(X)
        X = self._validated(X, reset=False)
        if self.affinity == "precomputed":
            kernel: Any = _graph.given_rows(X, len(self.X_fit_))
        else:
            fitted, x = self._tensor(self.X_fit_), self._tensor(X)
            kernel = self._kernel(
                x, fitted, precision=self._final_precision(x.dtype), sigma_x=self._sigma_of(x)
            )
        psi = self._tensor(self._fitted_eigenvectors())
        extended, _ = kernel.softmax(psi, self._tensor(self.weights_).log())
        found = (extended.double().cpu().numpy() * self._power(t - 1)).astype(X.dtype)
        return self._wrapped(found, given)

    def _from_frames(self, X: Any) -> Any:
        """(n, atoms, 3) -> the points that slow_manifold makes of frames; points stay points."""
        # in which unit, and which atoms, only who has them knows
        _checks.plain("X", X)
        if getattr(X, "ndim", 3) == 2:
            return X
        from .trajectory import _Points

        if getattr(X, "ndim", 0) == 3 and 0 in X.shape[:1]:
            return np.zeros((0, self.X_fit_.shape[1]), dtype=self.X_fit_.dtype)
        atoms = len(self.reference_)
        if getattr(X, "ndim", 0) == 3 and tuple(X.shape[1:]) != (atoms, 3):
            got = tuple(X.shape)
            checks.fail("X", f"have shape (n, atoms = {atoms}, 3), as the frames of the fit", got)
        align, weights, lag, n_delays = self.frames_
        points = _Points(X, align, weights, self.reference_, lag, n_delays, new=True)
        return torch.cat(list(points)).numpy()

    def _wrapped(self, found: np.ndarray, X: Any) -> np.ndarray:
        """As `set_output` asks: a data frame with the index of X."""
        from sklearn.utils._set_output import _wrap_data_with_container

        return _wrap_data_with_container("transform", found, X, self)

    def fit_transform(self, X: Any, y: Any = None, t: float = 1) -> np.ndarray:
        """Fit, and give the fitted rows' own coordinates: transform() without a pass over K."""
        found = self.fit(X).transform(t=t)
        # the rows are those of X, and so is their index
        if hasattr(X, "index") and hasattr(found, "set_axis"):
            found = found.set_axis(X.index, axis=0)
        return found

    def operator(self, precision: str = "float64") -> Reversible:
        """The fitted operator on torch float64 columns: `.markov(V)` = P V, `.apply(V)` = M V.

        One pass, so that rows of P sum to 1 in this precision.
        """
        self.require_fitted()
        checks.in_set("precision", precision, _checks.PRECISIONS)
        points = self._tensor(self.X_fit_)
        points = points.double() if precision == "float64" else points
        kernel = self._kernel(points, precision=precision, ranks=_group.resolve(self.group))
        return Reversible(kernel, self._tensor(self.weights_))

    def reweighted(self, h: Tensor) -> DiffusionMap:
        """A fitted map of P^h_ij = P_ij h_j / (P h)_i on the fitted points; see doob_transform."""
        self.require_fitted()
        new = DiffusionMap(**{**self.get_params(), "landmarks": None, "checkpoint": None})
        names = ("X_fit_", "beta_", "sigma_", "sigma_fallback_", "device_", "n_features_in_")
        for name in (*names, *(("affinity_", "neighbours_") if _graph.wanted(self) else ())):
            setattr(new, name, getattr(self, name))
        if hasattr(self, "feature_names_in_"):
            new.feature_names_in_ = self.feature_names_in_
        new.landmarks_ = None
        points = new._tensor(self.X_fit_)
        exact = new._kernel(
            points, precision=new._final_precision(points.dtype), ranks=_group.resolve(self.group)
        )
        weights = new._tensor(self.weights_) * (h / h.max()).to(self.device_)
        # the density is that of the points, which h does not move
        density = new._tensor(self.density_) if self.landmarks_ is None else exact.density()
        rng = _group.agreed_rng(self.random_state, exact.ranks)
        new._solve(Reversible(exact, weights), density, rng, n_passes=0)
        return new

    def markov(self, V: Any) -> np.ndarray:
        """P V for (N,) or (N, r) columns on the fitted points, in float64: one pass."""
        with self.agreed() as said:
            v = _checks.as_tensor("V", V).double()
            columns = v[:, None] if v.dim() == 1 else v
            N = len(self.X_fit_)
            checks.shape("V", columns, (N, None), lambda: f"({N},) or ({N}, r)")
            said.same["V"] = _group.fingerprint(_checks.as_array(v))
        kernel = self._kernel(
            self._tensor(self.X_fit_).double(), precision="float64",
            ranks=_group.resolve(self.group),
        )  # fmt: skip
        weights, columns = self._tensor(self.weights_)[:, None], columns.to(self.device_)
        # the sums in the same pass: P 1 = 1 to the last digit
        product = kernel.matvec(torch.cat((weights, columns * weights), 1))
        out = product[:, 1:] / product[:, :1]
        return (out[:, 0] if v.dim() == 1 else out).cpu().numpy()

    def _sigma_of(self, x: Tensor) -> Tensor | None:
        if self.sigma_ is None:
            return None
        sigma = utils.local_scales(x, utils.NEIGHBOUR, self._tensor(self.X_fit_))
        # learned by the fit: of no row of x
        return sigma.where(sigma > 0, float(self.sigma_fallback_ or 1.0))

    def _fitted_eigenvectors(self) -> np.ndarray:
        return (
            self.eigenvectors_ if self.landmarks_ is None else self.eigenvectors_[self.landmarks_]
        )

    def _power(self, t: float) -> np.ndarray:
        """lambda^t; an eigenvalue of 0 gives 0 for negative powers: such a coordinate is noise."""
        values = self.eigenvalues_
        if (values < 0).any() and t != int(t):
            checks.fail("t", "be an integer where an eigenvalue is negative", t)
        with np.errstate(divide="ignore"):
            power = np.power(values, float(t))
        return np.where(np.isfinite(power), power, 0.0)


# scikit-learn would wrap `transform` and ask for an X; ours wraps its own result
DiffusionMap._sklearn_auto_wrap_output_keys = {"transform"}


def _signed(psi: Tensor) -> Tensor:
    """Signs such that the first of the largest entries of each column is positive."""
    size = psi.abs()
    # 0.999: the same row in every precision, also where two entries mirror each other
    first = (size >= 0.999 * size.amax(0)).to(torch.int8).argmax(0)
    sign = psi.gather(0, first[None]).sign()
    return psi * sign.where(sign != 0, 1.0)
