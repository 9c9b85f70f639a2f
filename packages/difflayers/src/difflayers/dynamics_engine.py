"""Settings, graph cache, and the loop that alternates diffusion and association."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shared_kernels import checks

from . import _checks
from ._kept import TensorCache, make
from .api import energy
from .attention_operator import AttentionOperator
from .diffusion import DiffusionOperator, RestartDiffusion
from .graph.builder import GraphBuilder
from .graph.laplacian_builder import LaplacianBuilder

_FLAGS = (
    "use_normalized_laplacian",
    "use_sparse",
    "diffuse_key",
    "diffuse_query",
    "diffuse_value",
    "use_logit_diffusion",
    "adaptive_eta",
    "cache_graph",
)


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """All settings of a diffusion-augmented memory; frozen, to and from JSON.

    Attributes:
        eta: diffusion step. At most 1 with the normalised Laplacian, 1/d_max with the plain one;
            any size for "spectral" and "heat".
        beta: inverse temperature (DynamicsEngine; in a layer 1.0 leaves ``scaling`` to the layer).
        steps: diffusion steps of a layer, or diffuse-and-associate rounds of DynamicsEngine.
        diffusion_mode: "factored", "simple", "iterative", "spectral", "ppr" or "heat".
        attention_mode: "dense", or "graph": only the k nearest stored patterns are associated.
        k_neighbors: neighbours per pattern. Layers take fewer where an item has fewer.
        use_normalized_laplacian: D^(-1/2) (D - W) D^(-1/2) instead of D - W.
        use_sparse: O(k N) memory: tiled neighbour search, CSR products.
        diffuse_key, diffuse_query, diffuse_value: what is smoothed.
        use_logit_diffusion: weights w -> max(0, (I - logit_eta L) w), renormalised.
        logit_eta: None is eta.
        adaptive_eta: eta * sigmoid(adaptive_temperature (entropy - adaptive_threshold)) per item,
            the entropy (nats) being that of the undiffused association, averaged.
        cache_graph: keep the graph while the patterns do not change.
        energy_stop_tol: DynamicsEngine stops when the energy moves by less; 0 never does.
        restart: share of the original pattern that mode "ppr" brings back each step.
    """

    eta: float = 0.1
    beta: float = 1.0
    steps: int = 3
    diffusion_mode: str = "factored"
    attention_mode: str = "dense"
    k_neighbors: int = 5
    use_normalized_laplacian: bool = True
    use_sparse: bool = False
    diffuse_key: bool = True
    diffuse_query: bool = False
    use_logit_diffusion: bool = False
    logit_eta: float | None = None
    adaptive_eta: bool = False
    adaptive_temperature: float = 5.0
    adaptive_threshold: float = 1.0
    cache_graph: bool = True
    energy_stop_tol: float = 0.0
    diffuse_value: bool = False
    restart: float = 0.1

    def __post_init__(self) -> None:
        def keep(name: str, value: Any) -> None:
            # as Python's own types, which JSON knows
            object.__setattr__(self, name, value)

        for name in ("eta", "beta", "energy_stop_tol", "adaptive_temperature"):
            keep(name, _checks.number(name, getattr(self, name)))
        keep("restart", _checks.number("restart", self.restart, 0.0, 1.0))
        threshold = _checks.number("adaptive_threshold", self.adaptive_threshold, low=-math.inf)
        keep("adaptive_threshold", threshold)
        for name in _FLAGS:
            keep(name, checks.flag(name, getattr(self, name)))
        for name in ("steps", "k_neighbors"):
            keep(name, _checks.positive(name, getattr(self, name)))
        checks.in_set("diffusion_mode", self.diffusion_mode, _checks.DIFFUSION_MODES)
        checks.in_set("attention_mode", self.attention_mode, _checks.ATTENTION_MODES)
        if self.logit_eta is not None:
            keep("logit_eta", _checks.number("logit_eta", self.logit_eta))
        if self.use_normalized_laplacian:
            used = {} if self.diffusion_mode in ("spectral", "heat") else {"eta": self.eta}
            if self.use_logit_diffusion:
                used["logit_eta"] = self.effective_logit_eta
            for name, value in used.items():
                if value > 1.0:
                    checks.fail(
                        name,
                        "be at most 1 for the normalised Laplacian (spectrum [0, 2])",
                        value,
                        "modes 'spectral' and 'heat' take any eta",
                    )

    @property
    def effective_logit_eta(self) -> float:
        """``logit_eta``, or eta where it is None."""
        return self.eta if self.logit_eta is None else self.logit_eta

    def to_dict(self) -> dict[str, Any]:
        """Field names and values, all JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DiffusionConfig:
        """The inverse of :meth:`to_dict`; an unknown field is an error."""
        if not isinstance(values, dict):
            checks.fail("values", "be a mapping of fields", type(values).__name__, error=TypeError)
        known = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                checks.fail("values", "name fields of DiffusionConfig", repr(name))
        return cls(**values)

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> DiffusionConfig:
        """The inverse of :meth:`to_json`."""
        return cls.from_dict(json.loads(text))


class CachedGraph(NamedTuple):
    """Adjacency, degrees, neighbours, Laplacian and diffusion operator of a set of patterns."""

    W: Tensor
    deg: Tensor
    adj_indices: Tensor
    L: Tensor
    op: DiffusionOperator


class GraphCache:
    """Build the graph of a set of patterns once and keep it while they do not change.

    ``get(X)`` with X (N, d) returns (W (N, N), deg (N,), adj_indices (N, k), L (N, N), op), the
    same object again for the same memory; any in-place change of X, or another config, builds anew.
    W and L are detached, float32 (float64 for float64 patterns), and ``sparse_coo`` with
    ``use_sparse``. ``op`` is the operator of ``config.diffusion_mode`` on L, the factored one on
    the normalised adjacency when L is normalised.

    Raises:
        ValueError: k_neighbors >= N, or eta * d_max > 1 with the plain Laplacian.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self._cache = TensorCache()

    def get(self, patterns: Tensor) -> CachedGraph:
        """The graph of ``patterns`` (N, d)."""
        checks.floating("patterns", patterns)
        if not self.config.cache_graph:
            return make(patterns.device.type, lambda: self._build(patterns))
        return self._cache.get((patterns,), self.config, lambda: self._build(patterns))

    def invalidate(self) -> None:
        """Forget the graph."""
        self._cache.clear()

    def _build(self, X: Tensor) -> CachedGraph:
        cfg = self.config
        built = GraphBuilder(k=cfg.k_neighbors, use_sparse=cfg.use_sparse).build(X)
        L = LaplacianBuilder(cfg.use_normalized_laplacian).build(built.W)
        if not cfg.use_normalized_laplacian and cfg.diffusion_mode not in ("spectral", "heat"):
            if _checks.reads_values(built.deg):
                _checks.stable_step(cfg.eta, float(built.deg.max()))
        op: DiffusionOperator
        if cfg.diffusion_mode == "ppr":
            op = RestartDiffusion(cfg.eta, cfg.steps, cfg.restart)
        else:
            op = DiffusionOperator.create(cfg.diffusion_mode, cfg.eta, cfg.steps)
        op.precompute(L)
        return CachedGraph(built.W, built.deg, built.adj_indices, L, op)


class EnergyTracker:
    """The Hopfield energy after each step, -lse(beta, K xi) + |xi|^2 / 2, mean over queries.

    Args:
        enabled: compute and record; a disabled tracker costs nothing.
        tol: `step` returns True when the energy moved by less than this; 0 never does.
        beta: inverse temperature, unless the caller of `step` gives one.

    ``energies`` is the list of floats. Plain updates (K fixed, V = K) never increase it; diffusing
    the keys between updates does raise it.
    """

    def __init__(self, enabled: bool = True, tol: float = 0.0, beta: float = 1.0) -> None:
        self.enabled = checks.flag("enabled", enabled)
        self.tol, self.beta = _checks.number("tol", tol), _checks.number("beta", beta)
        self.energies: list[float] = []

    def reset(self) -> None:
        """Forget the energies."""
        self.energies.clear()

    @torch.no_grad()
    def step(self, Q: Tensor, K: Tensor, beta: float | None = None) -> bool:
        """Record the energy of states Q (L, d) among patterns K (N, d); True: it has settled."""
        if not self.enabled:
            return False
        beta = self.beta if beta is None else beta
        wide = torch.promote_types(Q.dtype, torch.float32)
        self.energies.append(float(energy(K.to(wide), Q.to(wide), beta).mean()))
        if self.tol <= 0.0 or len(self.energies) < 2:
            return False
        return math.isfinite(self.energies[-1]) and (
            abs(self.energies[-1] - self.energies[-2]) < self.tol
        )


class DynamicsEngine:
    """Alternate diffusion and association.

    Each step: K <- op(K) if diffuse_key; Q <- op(Q) if diffuse_query; Q <- attention(Q, K, V).
    Unlike DiffusedHopfield, what was retrieved is the next step's query.

    Args:
        diffusion_op: operator on N patterns. attention_op: dense or graph association; `run` and
            `run_dynamics` need it.
        config: steps, what is diffused, beta, energy_stop_tol; an int in its place is ``steps``.
        energy_tracker: records the energy in `run_dynamics` and `run_diffusion`.
        query_diffusion_op: operator on the L queries; None is ``diffusion_op``.
        steps: rounds; None is those of config, and without one the operator's.

    Example:
        >>> X = torch.eye(4)
        >>> cfg = DiffusionConfig(steps=2, k_neighbors=2)
        >>> graph = GraphCache(cfg).get(X)
        >>> engine = DynamicsEngine(graph.op, AttentionOperator(cfg.beta), cfg)
        >>> Q, K = engine.run(X, X, X)
    """

    def __init__(
        self,
        diffusion_op: DiffusionOperator,
        attention_op: AttentionOperator | None = None,
        config: DiffusionConfig | int | None = None,
        energy_tracker: EnergyTracker | None = None,
        query_diffusion_op: DiffusionOperator | None = None,
        *,
        steps: int | None = None,
    ) -> None:
        if config is not None and not isinstance(config, DiffusionConfig):
            if steps is not None:
                got = type(config).__name__
                checks.fail("config", "be a DiffusionConfig beside steps", got, error=TypeError)
            config, steps = None, config
        if steps is not None:
            steps = _checks.positive("steps", steps)
        elif config is not None:
            steps = config.steps
        else:
            steps = diffusion_op.steps
        self.diffusion_op, self.attention_op = diffusion_op, attention_op
        self.query_diffusion_op, self.energy_tracker = query_diffusion_op, energy_tracker
        self.config = DiffusionConfig() if config is None else config
        self.steps: int = steps

    def run(
        self,
        Q: Tensor,
        K: Tensor,
        V: Tensor,
        tracker: EnergyTracker | None = None,
        adj_indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(Q, K) after the last step, with the settings of ``config``.

        Args:
            Q: (L, d), or (L, B, d) as diffusion operators take it. K: (N, d). V: (N, d).
                diffuse_query needs L = N, or a ``query_diffusion_op``.
            tracker: records the energy after each step, with that step's K and ``config.beta``;
                energy_stop_tol (or its own tol) ends the loop early.
            adj_indices: (L, k), for an association along the graph.
        """
        cfg = self.config
        if (tracker is None or not tracker.enabled) and cfg.energy_stop_tol > 0.0:
            tracker = EnergyTracker(True)
        beta = cfg.beta if cfg.beta > 0 else None
        flags = cfg.diffuse_key, cfg.diffuse_query
        return self._loop(Q, K, V, adj_indices, flags, tracker, beta, cfg.energy_stop_tol)

    def run_dynamics(
        self,
        Q: Tensor,
        K: Tensor,
        V: Tensor,
        adj_indices: Tensor | None = None,
        L: Tensor | None = None,
        W: Tensor | None = None,
        deg: Tensor | None = None,
        diffuse_query: bool = True,
        diffuse_key: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """(Q, K) after ``steps`` rounds, as difflayers 0.1.1 calls it.

        ``energy_tracker`` starts anew, records each round with its own beta and ends the rounds by
        its own tol. L, W and deg are accepted and not used: the energy recorded here is that of
        `energy`, which needs no graph.
        """
        tracker = self.energy_tracker
        if tracker is not None:
            tracker.reset()
        return self._loop(Q, K, V, adj_indices, (diffuse_key, diffuse_query), tracker, None, 0.0)

    def run_diffusion(
        self, X: Tensor, L: Tensor | None = None, Q_ref: Tensor | None = None
    ) -> Tensor:
        """op(X); with an ``energy_tracker`` and states Q_ref, ``steps`` times, recording each.

        L is accepted and not used.
        """
        tracker = self.energy_tracker
        if tracker is None or Q_ref is None:
            return self.diffusion_op(X)
        for _ in range(self.steps):
            X = self.diffusion_op(X)
            if tracker.step(Q_ref, X):
                break
        return X

    @torch.no_grad()
    def compute_adaptive_eta(
        self, logits: Tensor, base_eta: float, temperature: float = 5.0, threshold: float = 1.0
    ) -> float:
        """base_eta sigmoid(temperature (entropy - threshold)), the mean entropy of softmax rows.

        Args:
            logits: scores (..., S).
        """
        checks.floating("logits", logits)
        w = torch.softmax(logits.to(torch.float32), -1)
        entropy = float(-torch.special.xlogy(w, w).sum(-1).mean())
        return base_eta / (1.0 + math.exp(min(700.0, temperature * (threshold - entropy))))

    def _loop(
        self,
        Q: Tensor,
        K: Tensor,
        V: Tensor,
        adj_indices: Tensor | None,
        diffuse: tuple[bool, bool],
        tracker: EnergyTracker | None,
        beta: float | None,
        tol: float,
    ) -> tuple[Tensor, Tensor]:
        attend = self.attention_op
        if attend is None:
            checks.fail(
                "attention_op", "be given to the constructor to associate", None, error=RuntimeError
            )
        of_queries = self.query_diffusion_op or self.diffusion_op
        before: float | None = None
        for _ in range(self.steps):
            if diffuse[0]:
                K = self.diffusion_op(K)
            if diffuse[1]:
                Q = of_queries(Q)
            # operators have patterns in front, associations the batch
            states, keys, values = (x.transpose(0, 1) if x.dim() == 3 else x for x in (Q, K, V))
            found = attend(states, keys, values, adj_indices)
            Q = found.transpose(0, 1) if found.dim() == 3 else found
            if tracker is None or not tracker.enabled:
                continue
            settled = tracker.step(found, keys, beta)
            now = tracker.energies[-1]
            if settled or (before is not None and abs(now - before) < tol):
                break
            before = now
        return Q, K
