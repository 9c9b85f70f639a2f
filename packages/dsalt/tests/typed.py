"""A program with every type said, for a type checker in strict mode; it also runs."""

from __future__ import annotations

import torch
from torch import Tensor

import dsalt
from dsalt import DSALTLMHeadModel, DSALTTransformer, LMOutput, TransformerOutput


def main() -> tuple[float, int]:
    model = DSALTLMHeadModel(30, 16, 1, 2, n_min=2, n_max=6, k_lmk=2)
    ids: Tensor = torch.randint(0, 30, (2, 9))
    out: LMOutput = model(ids)
    logits: Tensor = model(ids, return_dict=False)
    loss, _ = model(ids, labels=ids.flip(1), return_logits=False, return_dict=False)
    total: float = float(loss.detach()) + float(out.logits.sum() - logits.sum())

    body = DSALTTransformer(16, 2, 1, n_min=2, n_max=6, k_lmk=2)
    x: Tensor = torch.randn(1, 9, 16)
    hidden: Tensor = body(x)
    more: TransformerOutput = body(x, use_cache=True)
    windows: TransformerOutput = body(x, return_windows=True)
    assert more.past_key_values is not None and windows.windows is not None

    layer = dsalt.DSALTAttention(16, 2, 2, 6, 2)
    out_only, no_windows = layer(x)
    attended, _, cache = layer(x, use_cache=True)
    assert no_windows is None and torch.equal(attended, out_only) and len(cache) > 0

    new: Tensor = model.generate(ids, 3, temperature=0.0)
    scores: Tensor = dsalt.hybrid_energy(x, torch.randn(2, 16, 8), torch.full((2,), 0.5))
    lists: Tensor = dsalt.select_landmarks(scores, 2, landmark_block=4)
    q: Tensor = torch.randn(1, 2, 9, 8)
    mixed: Tensor = dsalt.dsalt_attention(
        q, q, q, torch.full((1, 2, 9), 3.0), lists, landmark_block=4
    )
    trainer: type[dsalt.DSALTTrainer] = dsalt.DSALTTrainer
    assert trainer.__name__ == "DSALTTrainer"
    return total, hidden.numel() + new.numel() + mixed.numel()


if __name__ == "__main__":
    main()
