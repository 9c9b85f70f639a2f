"""Diffusion maps as a scikit-learn estimator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from shared_kernels import checks, distributed
from shared_kernels.distributed import Ranks

from . import _checks, _graph, _group, _parameters, _quality, _solve, utils
from ._checkpoint import Checkpoint, Unsaved
from ._frames import Points
from ._neighbours import Neighbours
from ._operator import Kernel, Reversible
from ._problem import Problem
from ._progress import CallbackSupportMixin, Progress, begin_fit, end_fit, with_callbacks
from ._ring import RingKernel, SplitPoints


class DiffusionMap(
    CallbackSupportMixin,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    BaseEstimator,
    auto_wrap_output_keys=None,
):  # type: ignore[call-arg]
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
        shard_points: with `group`, each process gives its own rows to fit, in any number of at
            least one, as an array (also memory-mapped) or a function that returns an iterable of
            batches (b, d); no process ever holds the points of all. The map is that of all rows in
            the order of the processes; each keeps its own rows of everything that has a row per
            point, and `fit`, `transform` of new points (its own) and `markov` are called by all.
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
        shard_points: bool = False,
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
        self.shard_points = shard_points
        self.checkpoint = checkpoint

    # ---- scikit-learn's side

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        matrix = self.affinity == "precomputed"
        tags.input_tags.pairwise = tags.input_tags.sparse = tags.input_tags.positive_only = matrix
        return tags

    def __getstate__(self) -> dict[str, Any]:
        # the group's processes end, and the map that they have found is on every rank
        return {**super().__getstate__(), "group": None}

    @property
    def _n_features_out(self) -> int:
        n_components: int = self.eigenvectors_.shape[1]
        return n_components

    def require_fitted(self) -> None:
        check_is_fitted(self, "eigenvectors_")

    def require_whole(self) -> None:
        """Fitted, and with all points in this process."""
        self.require_fitted()
        if self.shard_points:
            checks.fail(
                "dm",
                "hold all points here",
                "the points of one process (shard_points=True)",
                "its eigenvectors_, transform and markov work on these",
                NotImplementedError,
            )

    @contextmanager
    def agreement(self) -> Iterator[distributed.Agreement]:
        """Check here the arguments of something that all processes of `group` compute.

        Where one process refuses them all do, and the map itself must be the same on each.
        """
        ranks = distributed.resolve(self.group)
        with distributed.agreement(ranks) as agreed:
            self.require_whole()
            if ranks is not None:
                agreed.equal["dm"] = distributed.fingerprint(
                    self.weights_, self.eigenvectors_, self.beta_, _parameters.of_the_problem(self)
                )
            yield agreed

    def _validated(self, X: Any, *, reset: bool) -> np.ndarray:
        _checks.plain("X", X)
        if isinstance(X, Tensor):
            tensor = _checks.as_tensor("X", X)
            X = (tensor if tensor.dtype == torch.float64 else tensor.float()).cpu().numpy()
        points: np.ndarray = validate_data(
            self,
            X,
            reset=reset,
            dtype=[np.float64, np.float32],
            accept_sparse="csr" if self.affinity == "precomputed" else False,
            ensure_min_samples=(1 if self.shard_points else 2) if reset else 0,
        )
        return points

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
        alone = self._is_sparse and not self.shard_points
        ranks = None if alone else distributed.resolve(self.group)
        X, rng = self._accept(X, ranks)
        self._choose_bandwidth(rng, ranks)
        kernel, checkpoint = self._fitted_kernel(ranks), self._checkpoint(X, ranks)
        operator, density = self._operator_of(kernel, checkpoint)
        self._solve(operator, density, rng, checkpoint)
        self.n_passes_ += 1
        _quality.warn_of_lonely_points(self, kernel.held)
        if self.landmarks_ is not None:
            self._extend([X], ranks)
        checkpoint.done()
        end_fit(self, X)
        return self

    @property
    def _is_sparse(self) -> bool:
        return self.neighbors is not None or self.affinity == "precomputed"

    def _accept(self, X: Any, ranks: Ranks | None) -> tuple[np.ndarray, np.random.RandomState]:
        """All checks. Sets device_, landmarks_ and X_fit_ (or affinity_, which has no points)."""
        on = X.device if isinstance(X, Tensor) and self.device is None else self.device
        self.device_ = torch.device("cpu" if on is None else on)
        with distributed.agreement(ranks) as agreed:
            if self.shard_points:
                X = _group.read(X)
                if ranks is None:
                    checks.fail("group", "be given with shard_points=True", None)
            X = self._validated(X, reset=True)
            agreed.from_all = len(X) if self.shard_points else 0
            agreed.equal["shard_points"] = bool(self.shard_points)
        self.shard_lengths_ = agreed.from_all if self.shard_points else None
        N = sum(agreed.from_all) if self.shard_points else X.shape[0]
        with distributed.agreement(ranks) as agreed:
            _parameters.check(self, N)
            landmarks = _parameters.checked_landmarks(self, N)
            agreed.from_first["rng"] = check_random_state(self.random_state)
            if ranks is not None:
                parameters = _parameters.of_the_problem(self)
                if self.shard_points:
                    agreed.equal["X.dtype, its columns and the parameters"] = (
                        distributed.fingerprint(str(X.dtype), X.shape[1], parameters)
                    )
                else:
                    agreed.equal["X"] = distributed.fingerprint(X, landmarks, parameters)
                agreed.equal["checkpoint"] = self.checkpoint is None
        rng = agreed.from_first["rng"]
        if isinstance(landmarks, int):
            landmarks = np.sort(rng.permutation(len(X))[:landmarks])
        self.landmarks_ = landmarks
        if self.affinity == "precomputed":
            self.affinity_ = _graph.given_matrix(X)
            self.X_fit_ = np.empty((X.shape[0], 0), dtype=X.dtype)
        else:
            self.X_fit_ = X if landmarks is None else X[landmarks]
        return X, rng

    def _choose_bandwidth(self, rng: np.random.RandomState, ranks: Ranks | None) -> None:
        """beta_ and sigma_ by the rule that `beta` names; the neighbours of a sparse kernel."""
        self.sigma_: np.ndarray | None = None
        self.sigma_fallback_: float | None = None
        self.neighbours_: Neighbours | None = None
        # an earlier fit may have left them
        self.__dict__.pop("dimension_", None)
        if self.affinity != "precomputed":
            self.__dict__.pop("affinity_", None)
        if self.affinity == "precomputed":
            self.beta_ = float("nan")
            return
        points = self._tensor(self.X_fit_)
        sample, rows = points, self._own_rows(ranks)
        if rows is not None and self.beta in ("bgh", "median"):
            # the same rows that one process with all points would choose
            numbers = np.arange(rows.N)
            if rows.N > utils.SAMPLE:
                numbers = rng.permutation(rows.N)[: utils.SAMPLE]
            sample = rows.at(points, numbers)
        if self.neighbors is not None:
            self.neighbours_ = Neighbours(points, int(self.neighbors), self.search, rng)
        if self.beta == "bgh":
            found = utils.bgh_bandwidth(sample, random_state=rng)
            self.beta_, self.dimension_ = found.beta, found.dimension
        elif self.beta == "median":
            self.beta_ = utils.median_bandwidth(sample, random_state=rng)
        elif self.beta == "self-tuning":
            self.beta_ = 1.0
            if self.neighbours_ is None:
                self._measure_scales(points, ranks)
            else:
                self.neighbours_.own_scales()
        else:
            self.beta_ = float(self.beta)
        if self.neighbours_ is not None:
            self.neighbours_.beta = self.beta_
            self.affinity_ = self.neighbours_.matrix()

    def _own_rows(self, ranks: Ranks | None) -> _group.Own | None:
        """The rows that this process was given, where the points are split."""
        lengths = self.shard_lengths_
        if lengths is None:
            return None
        if ranks is None or ranks.size != len(lengths):
            got = "no group" if ranks is None else f"one of {ranks.size}"
            checks.fail("group", f"be the {len(lengths)} processes that hold the points", got)
        return _group.Own(ranks, lengths)

    def _measure_scales(self, points: Tensor, ranks: Ranks | None) -> None:
        if (own_rows := self._own_rows(ranks)) is not None:
            split = SplitPoints(points, own_rows)
            sigma = split.local_scales(points, utils.NEIGHBOUR)
            positive = own_rows.each(sigma.where(sigma > 0, float("inf")).min())
            fallback = float(positive.min())
            if fallback == float("inf"):
                fallback = utils.fallback_scale(split.distinct(), utils.NEIGHBOUR)
        else:
            rows = _group.rows_of(ranks, len(points))
            own = None if ranks is None else points
            sigma = rows.whole(utils.local_scales(rows.mine(points), utils.NEIGHBOUR, own))
            fallback = utils.fallback_scale(points, utils.NEIGHBOUR, sigma)
        self.sigma_ = sigma.where(sigma > 0, fallback).cpu().numpy()
        self.sigma_fallback_ = fallback

    def _fitted_kernel(self, ranks: Ranks | None, precision: str | None = None) -> Any:
        """The kernel of the fitted points, in the precision of the final sweeps unless given."""
        points = self._tensor(self.X_fit_)
        if self._is_sparse:
            return _graph.Graph(self.affinity_, points)
        if precision is None:
            precision = "auto" if self.precision == "half" else self.precision
        points = points.double() if precision == "float64" else points
        if (rows := self._own_rows(ranks)) is not None:
            own = None if self.sigma_ is None else self._tensor(self.sigma_)
            return RingKernel(SplitPoints(points, rows), self.beta_, own, precision, self.tile)
        sigma = None if self.sigma_ is None else (self._tensor(self.sigma_),) * 2
        problem = Problem(points, None, self.beta_, sigma=sigma, precision=precision)
        return Kernel(problem, self.tile, problem.negligible, ranks=ranks)

    def kernel_to(self, X: np.ndarray, ranks: Ranks | None = None) -> Any:
        """The rows of the kernel between new points (n, d) and the fitted ones."""
        self.require_whole()
        x, fitted = self._tensor(X), self._tensor(self.X_fit_)
        if self.neighbours_ is not None:
            return self.neighbours_.links(x, self.affinity_)
        precision = "auto" if self.precision == "half" else self.precision
        sigma = None
        if self.sigma_ is not None:
            own = utils.local_scales(x, utils.NEIGHBOUR, fitted)
            # the fallback is learned by the fit: it depends on no row of x
            own = own.where(own > 0, float(self.sigma_fallback_ or 1.0))
            sigma = (own, self._tensor(self.sigma_))
        problem = Problem(x, fitted, self.beta_, sigma=sigma, precision=precision)
        return Kernel(problem, self.tile, ranks=ranks)

    def _checkpoint(self, X: np.ndarray, ranks: Ranks | None) -> Unsaved:
        if self.checkpoint is None:
            return Unsaved()
        with distributed.agreement(ranks):
            # the numbers that were chosen must be the same where a solve goes on, too
            parameters = {**_parameters.of_the_problem(self), "beta": self.beta_}
            given = (X, self.landmarks_, self.shard_lengths_, self.sigma_, parameters)
            problem = distributed.fingerprint(*given)
            return Checkpoint(self.checkpoint, problem, ranks)

    def _operator_of(self, kernel: Any, checkpoint: Unsaved) -> tuple[Reversible, Tensor]:
        """P = D^-1 Ka and the kernel's row sums: two sweeps, or what a checkpoint has of them."""
        if self.precision == "half":
            with distributed.agreement(kernel.ranks):
                # before any sweep: what cannot run is refused with the reasons
                kernel.in_precision("half").chosen("matvec")
        density, row_sums = checkpoint.sums() or (kernel.density(), None)
        operator = Reversible(kernel, density ** -float(self.alpha), row_sums)
        if row_sums is None:
            checkpoint.save_sums(density, operator.row_sums)
        return operator, density

    def _solve(
        self,
        operator: Reversible,
        density: Tensor,
        rng: np.random.RandomState,
        checkpoint: Unsaved,
    ) -> None:
        """Everything that is learned on the fitted points, from the operator P."""
        self.density_ = density.cpu().numpy()
        self.weights_ = operator.weights.cpu().numpy()
        self.row_sums_ = operator.row_sums.cpu().numpy()
        self.stationary_ = operator.stationary.cpu().numpy()
        held = operator.kernel.held
        # as if all points were the same
        own = torch.stack(
            ((density <= 0.999 * held.N).sum(), (density < 1.01 * operator.kernel.diagonal).sum())
        )
        several, alone = held.total(own).tolist()
        self.sees_one_point_ = several == 0
        _quality.warn_of_the_bandwidth(self, alone > (held.N - 1) // 2)
        wanted = _solve.Wanted(int(self.n_components), self.tol, self.solver, self.precision)
        ranks = operator.kernel.ranks
        with Progress(self, shown=bool(self.verbose) and (ranks is None or ranks.rank == 0)) as p:
            pairs = _solve.eigenpairs(operator, wanted, rng, p, checkpoint)
        self.eigenvalues_ = pairs.values.cpu().numpy()
        self.residuals_ = pairs.residuals.cpu().numpy()
        self.converged_, self.n_converged_ = pairs.converged, pairs.n_converged
        self.n_passes_, self.n_half_passes_ = pairs.n_passes + 1, pairs.n_half_passes
        psi = _signed(pairs.vectors / operator.stationary.sqrt()[:, None], held)
        self.eigenvectors_ = psi.cpu().numpy()
        _quality.warn_of_the_pairs(self, operator.kernel.n_parts)

    def _tensor(self, array: np.ndarray) -> Tensor:
        # torch takes no memory map that is read-only
        array = np.require(array, requirements=["C", "W"])
        return torch.from_numpy(array).to(self.device_)

    def _extend(self, batches: Iterable[np.ndarray], ranks: Ranks | None = None) -> None:
        """From the landmarks to the rows of all batches, in their order, which are read once.

        What is kept per row: density, stationary distribution and eigenvectors.
        """
        bias = self._tensor(self.weights_).log()
        vectors = self._tensor(self.eigenvectors_)
        parts = []
        for X in _group.same_batches(batches, ranks):
            kernel = self.kernel_to(X, ranks)
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
        if self.shard_points:
            return self._transform_by_all(X, t)
        given = X
        if hasattr(self, "frames_"):
            X = self._from_frames(X)
        X = self._validated(X, reset=False)
        if self.affinity == "precomputed":
            kernel: Any = _graph.given_rows(X, len(self.X_fit_))
        else:
            kernel = self.kernel_to(X)
        psi = self._tensor(self._fitted_eigenvectors())
        extended, _ = kernel.softmax(psi, self._tensor(self.weights_).log())
        found = (extended.double().cpu().numpy() * self._power(t - 1)).astype(X.dtype)
        return self._wrapped(found, given)

    def _transform_by_all(self, X: Any, t: float) -> np.ndarray:
        """`transform` of this process' new points, by the fitted points of all processes."""
        ranks = distributed.resolve(self.group)
        with distributed.agreement(ranks) as agreed:
            self._own_rows(ranks)
            points = self._validated(X, reset=False)
            agreed.equal["t and the map"] = distributed.fingerprint(
                t, self.eigenvalues_, self.beta_, self.sigma_ is None
            )
            power = self._power(t - 1)
        x = self._tensor(points)
        kernel = self._fitted_kernel(ranks)
        sigma = None
        if self.sigma_ is not None:
            sigma = kernel.points.local_scales(x, utils.NEIGHBOUR)
            sigma = sigma.where(sigma > 0, float(self.sigma_fallback_ or 1.0))
        psi, bias = self._tensor(self.eigenvectors_), self._tensor(self.weights_).log()
        extended, _ = kernel.softmax(x, sigma, psi, bias)
        return self._wrapped((extended.cpu().numpy() * power).astype(points.dtype), X)

    def _from_frames(self, X: Any) -> Any:
        """(n, atoms, 3) -> the points that slow_manifold makes of frames; points stay points."""
        # objects of other libraries are refused: their unit and their selection are not known
        _checks.plain("X", X)
        if getattr(X, "ndim", 3) == 2:
            return X
        if getattr(X, "ndim", 0) == 3 and 0 in X.shape[:1]:
            return np.zeros((0, self.X_fit_.shape[1]), dtype=self.X_fit_.dtype)
        atoms = len(self.reference_)
        if getattr(X, "ndim", 0) == 3 and tuple(X.shape[1:]) != (atoms, 3):
            got = tuple(X.shape)
            checks.fail("X", f"have shape (n, atoms = {atoms}, 3), as the frames of the fit", got)
        align, weights, lag, n_delays = self.frames_
        points = Points(X, align, weights, self.reference_, lag, n_delays, new=True)
        return torch.cat(list(points)).numpy()

    def _wrapped(self, found: np.ndarray, X: Any) -> np.ndarray:
        """As `set_output` asks: a data frame with the index of X."""
        from sklearn.utils._set_output import _wrap_data_with_container

        wrapped: np.ndarray = _wrap_data_with_container("transform", found, X, self)
        return wrapped

    def fit_transform(self, X: Any, y: Any = None, t: float = 1) -> np.ndarray:
        """Fit, and give the fitted rows' own coordinates: transform() without a pass over K."""
        found: np.ndarray = self.fit(X).transform(t=t)
        # the rows are those of X, and so is their index
        if hasattr(X, "index") and hasattr(found, "set_axis"):
            found = found.set_axis(X.index, axis=0)
        return found

    def operator(self, precision: str = "float64") -> Reversible:
        """The fitted operator on torch float64 columns: `.markov(V)` = P V, `.apply(V)` = M V.

        One pass, so that rows of P sum to 1 in this precision.
        """
        self.require_whole()
        checks.in_set("precision", precision, _checks.PRECISIONS)
        kernel = self._fitted_kernel(distributed.resolve(self.group), precision)
        return Reversible(kernel, self._tensor(self.weights_))

    def reweighted(self, h: Tensor) -> DiffusionMap:
        """A fitted map of P^h_ij = P_ij h_j / (P h)_i on the fitted points; see doob_transform."""
        self.require_whole()
        new = DiffusionMap(**{**self.get_params(), "landmarks": None, "checkpoint": None})
        names = ("X_fit_", "beta_", "sigma_", "sigma_fallback_", "device_", "n_features_in_")
        for name in (*names, "neighbours_", *(("affinity_",) if self._is_sparse else ())):
            setattr(new, name, getattr(self, name))
        if hasattr(self, "feature_names_in_"):
            new.feature_names_in_ = self.feature_names_in_
        new.landmarks_ = new.shard_lengths_ = None
        kernel = new._fitted_kernel(distributed.resolve(self.group))
        weights = new._tensor(self.weights_) * (h / h.max()).to(self.device_)
        # the density is that of the points, which h does not move
        density = new._tensor(self.density_) if self.landmarks_ is None else kernel.density()
        rng = _group.agreed_rng(self.random_state, kernel.ranks)
        new._solve(Reversible(kernel, weights), density, rng, Unsaved())
        return new

    def markov(self, V: Any) -> np.ndarray:
        """P V for (N,) or (N, r) columns on the fitted points, in float64: one pass.

        With shard_points V and the result are the rows of the points of this process.
        """
        ranks = distributed.resolve(self.group)
        alike = distributed.agreement(ranks) if self.shard_points else self.agreement()
        with alike as agreed:
            self.require_fitted()
            rows = self._own_rows(ranks)
            v = _checks.as_tensor("V", V).double()
            columns = v[:, None] if v.dim() == 1 else v
            N = len(self.X_fit_)
            checks.shape("V", columns, (N, None), lambda: f"({N},) or ({N}, r)")
            if rows is None:
                agreed.equal["V"] = distributed.fingerprint(_checks.as_array(v))
            else:
                agreed.equal["V.ndim and its columns"] = distributed.fingerprint(v.shape[1:])
        kernel = self._fitted_kernel(ranks, "float64")
        weights, columns = self._tensor(self.weights_)[:, None], columns.to(self.device_)
        # the sums in the same pass: P 1 = 1 to the last digit
        product = kernel.matvec(torch.cat((weights, columns * weights), 1))
        out = product[:, 1:] / product[:, :1]
        averages: np.ndarray = (out[:, 0] if v.dim() == 1 else out).cpu().numpy()
        return averages

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


def _signed(psi: Tensor, held: _group.Rows) -> Tensor:
    """Signs such that the first of the largest entries of each column is positive."""
    size = psi.abs()
    # 0.999: the same row in every precision, also where two entries mirror each other
    largest = size >= 0.999 * held.each(size.amax(0)).amax(0)
    first = largest.to(torch.int8).argmax(0)[None]
    # [processes, r]: 0 where a process has none of the largest entries
    signs = held.each((psi.gather(0, first).sign() * largest.gather(0, first))[0])
    sign = signs.gather(0, (signs != 0).to(torch.int8).argmax(0)[None])
    return psi * sign.where(sign != 0, 1.0)
