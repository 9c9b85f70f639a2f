"""A character language model made of all five packages' parts.

    characters ─► embedding
               ─► block 1, block 2      dsalt: learned windows + landmarks
               ─► memory                difflayers: learned patterns, smoothed over their graph
               ─► block 3               adasplash: α-entmax attention, α learned per head
               ─► block 4               dsalt
               ─► gate                  diffmax: each character weighs the blocks' states
               ─► logits of the next character

Every part is causal: a logit depends on its own and earlier characters only. The memory looks up
learned patterns, never other characters. (flashdiffusion maps the trained states afterwards.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adasplash import EntmaxAttention
from difflayers import DiffusedHopfield
from diffmax import DiffmaxBisectModule, HillMap
from dsalt.modules import DSALTBlock

PARTS = ("dsalt", "difflayers", "adasplash", "diffmax")
STATES = ("block 1", "block 2", "memory", "block 3", "block 4")


class Memory(nn.Module):
    """Learned patterns that characters look up: a Hopfield memory smoothed over its kNN graph."""

    def __init__(self, d_model: int, n_heads: int, n_patterns: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model)
        self.patterns = nn.Parameter(torch.randn(1, n_patterns, d_model))
        self.values = nn.Parameter(torch.randn(1, n_patterns, d_model))
        self.lookup = DiffusedHopfield(
            input_size=d_model, num_heads=n_heads, eta=0.1, k_neighbors=4, separation="entmax15"
        )

    def _query(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # All characters of the batch query one memory: one graph, not one per sequence.
        return self.patterns, self.norm(x).reshape(1, -1, x.shape[-1]), self.values

    def forward(self, x: Tensor) -> Tensor:
        return self.lookup(self._query(x)).view_as(x)

    @torch.no_grad()
    def weights(self, x: Tensor) -> Tensor:
        """(1, N, d) -> (H, N, patterns): which patterns each character looks up."""
        return self.lookup.get_association_matrix(self._query(x))[0]


class Gate(nn.Module):
    """Weights over the blocks' states for each character, some exactly 0: diffmax, learned α."""

    def __init__(self, d_model: int, n_states: int) -> None:
        super().__init__()
        self.score = nn.Linear(d_model, n_states)
        self.normalize = DiffmaxBisectModule(alpha=0.7, alpha_map=HillMap())

    def weights(self, x: Tensor) -> Tensor:
        """(B, N, d) -> (B, N, states)."""
        return self.normalize(self.score(x))

    def forward(self, states: list[Tensor]) -> Tensor:
        weights = self.weights(F.rms_norm(states[-1], states[-1].shape[-1:]))
        return torch.einsum("bns,bnsd->bnd", weights, torch.stack(states, 2))


class CharModel(nn.Module):
    """Logits of the next character, (B, N) int64 -> (B, N, vocabulary).

    Args:
        vocabulary: number of characters.
        without: parts to leave out (names of PARTS), to see what each contributes.
    """

    def __init__(
        self,
        vocabulary: int,
        d_model: int = 128,
        n_heads: int = 4,
        n_max: int = 64,
        k_lmk: int = 8,
        n_patterns: int = 64,
        without: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.without = without
        self.embedding = nn.Embedding(vocabulary, d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(
            DSALTBlock(d_model, n_heads, n_min=8, n_max=n_max, k_lmk=k_lmk, landmark_block=16)
            for _ in range(4)
        )
        self.blocks[2].attention = EntmaxAttention(d_model, n_heads, causal=True, alpha=1.5)
        self.memory = Memory(d_model, n_heads, n_patterns)
        self.gate = Gate(d_model, len(STATES))
        self.norm = nn.RMSNorm(d_model)

    def states(self, ids: Tensor) -> list[Tensor]:
        """The state after each of STATES, (B, N, d_model)."""
        x = self.embedding(ids)
        found = []
        for name in STATES:
            if name == "memory":
                x = x if "difflayers" in self.without else x + self.memory(x)
            else:
                number = int(name.split()[1])
                part = "adasplash" if number == 3 else "dsalt"
                x = x if part in self.without else self.blocks[number - 1](x)[0]
            found.append(x)
        return found

    def features(self, ids: Tensor) -> Tensor:
        """What the logits are read from, (B, N, d_model): the last state and the gated mixture."""
        states = self.states(ids)
        x = states[-1] if "diffmax" in self.without else states[-1] + self.gate(states)
        return self.norm(x)

    def forward(self, ids: Tensor) -> Tensor:
        return self.features(ids) @ self.embedding.weight.T

    @torch.no_grad()
    def attention(self, ids: Tensor) -> dict[str, tuple[Tensor, Tensor | None]]:
        """(H, N, N) weights, and windows (H, N) where there are some, of each block on one text."""
        seen: dict[str, tuple[Tensor, Tensor | None]] = {}
        x = self.embedding(ids[None])
        for name in STATES:
            if name == "memory":
                x = x + self.memory(x)
                continue
            block = self.blocks[int(name.split()[1]) - 1]
            inside = block.attention_norm(x)
            if isinstance(block.attention, EntmaxAttention):
                seen[name] = (block.attention.weights(inside)[0], None)
            else:
                weights, window = block.attention.weights(inside)
                seen[name] = (weights[0], window[0])
            x = block(x)[0]
        return seen

    def sparsity_parameters(self) -> list[nn.Parameter]:
        """What decides how many weights are 0: the α of each head, and of the gate."""
        return [
            p for n, p in self.named_parameters() if n.endswith(("attention.alpha.raw", "log_beta"))
        ]

    @torch.no_grad()
    def alphas(self) -> tuple[list[float], float]:
        """The learned α of each head of block 3, and of the gate."""
        heads = self.blocks[2].attention.current_alpha()
        return heads.tolist(), float(self.gate.normalize.alpha)

    @torch.no_grad()
    def generate(self, ids: Tensor, n: int, context: int, temperature: float = 0.7) -> Tensor:
        """Continue ids (N,) by n characters."""
        for _ in range(n):
            logits = self(ids[None, -context:])[0, -1]
            choice = torch.multinomial((logits / temperature).softmax(-1), 1)
            ids = torch.cat((ids, choice))
        return ids
