#!/usr/bin/env bash
# package: transformers 5.24.0 (torch 2.13.0)
# date: 2026-11-29
# expected: a function given to AttentionInterface.register is used by every model that is asked for it by
#   its name, whatever the name
# seen: any name with "flash" in it is taken for a flash attention of the hub: the registration passes, and
#   the model is refused with a message about a kernel that could not be found
# ours: register_transformers refuses such a name (packages/adasplash/tests/test_huggingface.py,
#   test_what_it_cannot_do_is_said)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def outcome(name):
    AttentionInterface.register(name, sdpa_attention_forward)
    AttentionMaskInterface.register(name, sdpa_mask)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = LlamaConfig(vocab_size=50, hidden_size=32, **sizes)
    try:
        model = LlamaForCausalLM._from_config(config, attn_implementation=name)
    except ValueError as problem:
        return str(problem)
    return str(tuple(model(torch.arange(9)[None]).logits.shape))


found = {name: outcome(name) for name in ("my_sharp", "my_flash")}
for name, text in found.items():
    print(f"{name}: {text[:110]}")
assert found["my_sharp"] == "(1, 9, 50)"
assert "flash attention implementation at `my_flash`" in found["my_flash"]
PYTHON
