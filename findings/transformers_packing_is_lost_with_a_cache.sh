#!/usr/bin/env bash
# package: transformers 5.24.0 (torch 2.13.0)
# date: 2026-11-30
# expected: several documents in one row, told apart by position_ids that begin again at 0, are kept apart by a model with "sdpa" or "eager" attention in every call, since it builds the block-diagonal mask from the positions; use_cache says only whether keys and values are kept for later calls, and a mask of ones says that nothing is padding
# seen: the mask is built only with use_cache=False and without an attention_mask. With the default (use_cache=True, also in train()) each document attends to those before it, silently, and the loss is another one; a mask of ones does the same. DataCollatorWithFlattening makes such batches, and leaves use_cache to the caller
# ours: adasplash refuses positions that begin again where the mask does not (packages/adasplash/tests/test_huggingface.py, test_packed_sequences_that_would_see_each_other_are_refused)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0

cat >"$work/packing.py" <<'PY'
import torch
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    vocab_size=50,
    hidden_size=32,
)
documents = [torch.randint(50, (n,)) for n in (12, 8)]
batch = DataCollatorWithFlattening()([{"input_ids": x.tolist()} for x in documents])
assert batch["position_ids"].tolist() == [[*range(12), *range(8)]] and "attention_mask" not in batch
ones = torch.ones_like(batch["input_ids"])

for implementation in ("eager", "sdpa"):
    model = LlamaForCausalLM._from_config(config, attn_implementation=implementation).train()
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.3)
    alone = torch.cat([model(x[None]).logits for x in documents], 1)
    calls = {
        "use_cache=False": {"use_cache": False},
        "the default": {},
        "a mask of ones": {"use_cache": False, "attention_mask": ones},
    }
    losses = {}
    for name, options in calls.items():
        out = model(**batch, **options)
        losses[name] = out.loss.item()
        off = (out.logits - alone).abs()
        print(f"{implementation}, {name}: loss {out.loss:.3f}, logits off by {off.max():.1g}")
        assert off[:, :12].max() < 1e-4
        assert (off[:, 12:].max() > 1) == (name != "use_cache=False")
    assert abs(losses["the default"] - losses["use_cache=False"]) > 0.05
PY
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore "$work/packing.py"
