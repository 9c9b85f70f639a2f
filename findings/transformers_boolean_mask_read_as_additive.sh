#!/usr/bin/env bash
# package: transformers 5.24.0 (torch 2.13.0)
# date: 2026-11-29
# expected: a function registered with AttentionInterface may ask for the boolean mask of "sdpa" (True: the
#   key is seen) or for the additive one of "eager" (0: seen); two that compute the same give the same model
# seen: two families read the mask outside of the attention function as if it were additive, so that a
#   boolean one means the opposite there. The router of NLLB-MoE takes every real token for padding and
#   drops it; DeepSeek V4 appends the additive mask of its compressed keys, cast to boolean, so that the
#   keys that a query may see are those that it may not. No error, other numbers
# ours: register_transformers gives these two families the additive mask
#   (packages/adasplash/tests/test_transformers_matrix.py)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import DeepseekV4Config, DeepseekV4Model, NllbMoeConfig, NllbMoeModel
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.models.deepseek_v4 import modeling_deepseek_v4
from transformers.models.nllb_moe import modeling_nllb_moe


def attention(module, query, key, value, attention_mask, **options):
    """The family's own attention, for a mask of either kind."""
    assert attention_mask is not None
    if attention_mask.dtype == torch.bool:
        least = torch.finfo(query.dtype).min
        attention_mask = torch.zeros(attention_mask.shape).masked_fill(~attention_mask, least)
    family = modeling_deepseek_v4 if hasattr(module, "sinks") else modeling_nllb_moe
    return family.eager_attention_forward(module, query, key, value, attention_mask, **options)


def stored(make):
    """A mask interface that never leaves the mask out."""
    return lambda **given: make(
        **{**given, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    )


for name, make in (("boolean", sdpa_mask), ("additive", eager_mask)):
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, stored(make))


def nllb_moe(implementation):
    config = NllbMoeConfig(
        vocab_size=50, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_experts=4,
        expert_capacity=64, encoder_sparse_step=1, decoder_sparse_step=1, moe_token_dropout=0.0,
        max_position_embeddings=64, dropout=0, attention_dropout=0, activation_dropout=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = NllbMoeModel._from_config(config, attn_implementation=implementation).eval()
    ids, seen = torch.randint(5, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    ids[1, 6:], seen[1, 6:] = 1, 0
    return model.encoder(ids, attention_mask=seen).last_hidden_state[seen.bool()]


def deepseek_v4(implementation):
    config = DeepseekV4Config(
        vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, head_dim=16,
        moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, q_lora_rank=16,
        o_lora_rank=16, o_groups=1, index_n_heads=2, index_head_dim=16, index_topk=4,
        sliding_window=8, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DeepseekV4Model._from_config(config, attn_implementation=implementation).eval()
    return model(torch.randint(5, 50, (1, 40))).last_hidden_state


with torch.no_grad():
    for family in (nllb_moe, deepseek_v4):
        exact = family("eager")
        for name in ("additive", "boolean"):
            off = (family(name) - exact).abs().max().item() / exact.abs().max().item()
            print(f"{family.__name__}, {name} mask: off by {off:.1%} of the largest number")
            assert off == 0 if name == "additive" else off > 0.01
PYTHON
