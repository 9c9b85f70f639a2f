"""Settings, graph cache, and the loop that alternates diffusion and association."""

from __future__ import annotations

import dataclasses
import json
import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from shared_kernels import checks

from . import _checks
from .attention_operator import AttentionOperator
from .diffusion import DiffusionOperator, FactoredDiffusion, RestartDiffusion
from .functional import energy
from .graph.builder import GraphBuilder
from .graph.laplacian import degrees
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
        _checks.number("eta", self.eta)
        _checks.number("beta", self.beta)
        _checks.number("energy_stop_tol", self.energy_stop_tol)
        _checks.number("restart", self.restart, 0.0, 1.0)
        _checks.number("adaptive_temperature", self.adaptive_temperature)
        _checks.number("adaptive_threshold", self.adaptive_threshold, low=-math.inf)
        for name in _FLAGS:
            _checks.flag(name, getattr(self, name))
        checks.positive_int("steps", self.steps)
        checks.positive_int("k_neighbors", self.k_neighbors)
        checks.in_set("diffusion_mode", self.diffusion_mode, _checks.DIFFUSION_MODES)
        checks.in_set("attention_mode", self.attention_mode, _checks.ATTENTION_MODES)
        if self.logit_eta is not None:
            _checks.number("logit_eta", self.logit_eta)
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


class _Steps:
    """How often any optimizer has stepped: fused ones change parameters without a new version."""

    count = 0
    hooked = False

    @classmethod
    def watch(cls) -> None:
        if not cls.hooked:
            cls.hooked = True
            register_optimizer_step_post_hook(cls._stepped)

    @classmethod
    def _stepped(cls, *_: Any) -> None:
        cls.count += 1


class TensorCache:
    """One value per state of a tensor: same memory hits, any in-place change misses.

    Told by identity (a weak reference to the tensor that owns the memory), layout and torch's
    version counter; for tensors that optimizers change, by the number of optimizer steps, too.
    Copies and pickles start empty.
    """

    def __init__(self) -> None:
        _Steps.watch()
        self._owners: tuple[Any, ...] = ()
        self._state: tuple[Any, ...] = ()
        self._value: Any = None

    def clear(self) -> None:
        self._owners, self._state, self._value = (), (), None

    def get(self, tensors: tuple[Tensor | None, ...], extra: Any, build: Callable[[], Any]) -> Any:
        if torch.compiler.is_compiling() or not all(_is_plain(t) for t in tensors):
            return build()
        owners = tuple(None if t is None else (t if t._base is None else t._base) for t in tensors)
        state = (extra, *(_state(t, o) for t, o in zip(tensors, owners, strict=True)))
        same = len(owners) == len(self._owners) and all(
            (ref is None and owner is None) or (ref is not None and ref() is owner)
            for ref, owner in zip(self._owners, owners, strict=True)
        )
        if same and state == self._state:
            return self._value
        self._value = build()
        self._owners = tuple(None if o is None else weakref.ref(o) for o in owners)
        self._state = state
        return self._value

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorCache:
        return TensorCache()

    def __reduce__(self) -> tuple[type[TensorCache], tuple[()]]:
        return TensorCache, ()


def _is_plain(t: Tensor | None) -> bool:
    if t is None:
        return True
    return not t.is_inference() and not torch._C._functorch.is_functorch_wrapped_tensor(t)


def _state(t: Tensor | None, owner: Tensor | None) -> tuple[Any, ...]:
    if t is None or owner is None:
        return ()
    steps = _Steps.count if owner.requires_grad else 0
    layout = (t.data_ptr(), t.shape, t.stride(), t.dtype, t.device)
    return (owner._version, steps, *layout)


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
    same object again for the same memory; any in-place change of X builds anew. W and L are
    detached, and ``sparse_coo`` with ``use_sparse``. ``op`` is the operator of
    ``config.diffusion_mode`` on L, the factored one on the normalised adjacency when L is
    normalised.

    Raises:
        ValueError: k_neighbors >= N, or eta * d_max > 1 with the plain Laplacian.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self._cache = TensorCache()

    def get(self, patterns: Tensor) -> CachedGraph:
        """The graph of ``patterns`` (N, d)."""
        if not self.config.cache_graph:
            return self._build(patterns)
        return self._cache.get((patterns,), None, lambda: self._build(patterns))

    def invalidate(self) -> None:
        """Forget the graph."""
        self._cache.clear()

    def _build(self, X: Tensor) -> CachedGraph:
        cfg = self.config
        built = GraphBuilder(k=cfg.k_neighbors, use_sparse=cfg.use_sparse).build(X)
        L = LaplacianBuilder(cfg.use_normalized_laplacian).build(built.W)
        if not cfg.use_normalized_laplacian and cfg.diffusion_mode not in ("spectral", "heat"):
            if checks.reads_values(built.deg):
                _checks.stable_step(cfg.eta, float(built.deg.max()))
        op: DiffusionOperator
        if cfg.diffusion_mode == "factored":
            W, deg = built.W, built.deg
            if cfg.use_normalized_laplacian:
                deg = (deg > 0).to(deg.dtype)
                W = _minus_off_diagonal(L)
            op = FactoredDiffusion(W, deg, cfg.eta, cfg.steps)
        elif cfg.diffusion_mode == "ppr":
            op = RestartDiffusion(cfg.eta, cfg.steps, cfg.restart).precompute(L)
        else:
            op = DiffusionOperator.create(cfg.diffusion_mode, cfg.eta, cfg.steps).precompute(L)
        return CachedGraph(built.W, degrees(built.W), built.adj_indices, L, op)


def _minus_off_diagonal(L: Tensor) -> Tensor:
    """-L without its diagonal: the normalised adjacency."""
    if not L.is_sparse:
        return (-L).fill_diagonal_(0.0)
    L = L.coalesce()
    i, j = L.indices()
    off = i != j
    values = -L.values()[off]
    index = L.indices()[:, off]
    return torch.sparse_coo_tensor(index, values, L.shape, check_invariants=False).coalesce()


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
        _checks.number("tol", tol)
        self.enabled, self.tol, self.beta = enabled, tol, beta
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
    """Alternate diffusion and association, ``config.steps`` times.

    Each step: K <- op(K) if diffuse_key; Q <- op(Q) if diffuse_query; Q <- attention(Q, K, V).
    Unlike DiffusedHopfield, what was retrieved is the next step's query.

    Args:
        diffusion_op: operator on N patterns. attention_op: dense or graph association.
        config: steps, what is diffused, beta, energy_stop_tol.

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
        attention_op: AttentionOperator,
        config: DiffusionConfig | None = None,
    ) -> None:
        self.diffusion_op, self.attention_op = diffusion_op, attention_op
        self.config = DiffusionConfig() if config is None else config

    def run(
        self,
        Q: Tensor,
        K: Tensor,
        V: Tensor,
        tracker: EnergyTracker | None = None,
        adj_indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(Q, K) after the last step.

        Args:
            Q: (L, d). K: (N, d). V: (N, d). diffuse_query needs L = N.
            tracker: records the energy after each step, with that step's K and ``config.beta``;
                energy_stop_tol (or its own tol) ends the loop early.
            adj_indices: (L, k), for an association along the graph.
        """
        cfg = self.config
        tracking = tracker is not None and tracker.enabled
        if not tracking and cfg.energy_stop_tol > 0.0:
            tracker, tracking = EnergyTracker(True), True
        before: float | None = None
        for _ in range(cfg.steps):
            if cfg.diffuse_key:
                K = self.diffusion_op(K)
            if cfg.diffuse_query:
                Q = self.diffusion_op(Q)
            Q = self.attention_op(Q, K, V, adj_indices)
            if tracking and tracker is not None:
                settled = tracker.step(Q, K, cfg.beta if cfg.beta > 0 else None)
                now = tracker.energies[-1]
                if before is not None and abs(now - before) < cfg.energy_stop_tol:
                    settled = True
                before = now
                if settled:
                    break
        return Q, K
