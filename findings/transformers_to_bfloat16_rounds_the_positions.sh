#!/usr/bin/env bash
# package: transformers 5.24.0 (accelerate 1.15.0, torch 2.13.0)
# date: 2026-11-30
# expected: from_pretrained(path, dtype=torch.bfloat16) and from_pretrained(path).to(torch.bfloat16) are one model: their parameters are equal bit by bit, and so is every buffer in their state dicts
# seen: the frequencies of the rotary positions are a buffer that no state dict holds; the first model keeps them in float32, in the second they are rounded to bfloat16, and the error of an angle grows with the position. The logits of the first are as far from those of float32 at token 1400 as at token 0; those of the second are five times as far there, silently. TrainingArguments(bf16_full_eval=True) casts in the second way: the Trainer's predictions of a model are not those of the same checkpoint loaded as bfloat16
# ours: nothing; dsalt holds no frequencies and makes its angles in fp32 at least (packages/dsalt/src/dsalt/_rotary.py)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0 accelerate==1.15.0

cat >"$work/positions.py" <<'PY'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.manual_seed(0)
config = LlamaConfig(
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    vocab_size=50,
    hidden_size=64,
    max_position_embeddings=2048,
    use_cache=False,
)
exact = LlamaForCausalLM(config).eval()
for weight in exact.parameters():
    if weight.dim() == 2:
        torch.nn.init.normal_(weight, std=0.2)
exact.save_pretrained(sys.argv[1])

loaded = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
cast = LlamaForCausalLM.from_pretrained(sys.argv[1]).to(torch.bfloat16).eval()
states = loaded.state_dict(), cast.state_dict()
assert states[0].keys() == states[1].keys()
assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

ids = torch.randint(50, (1, 1500))
with torch.no_grad():
    logits = [model(ids).logits.float() for model in (exact, loaded, cast)]
errors = {}
for first in (0, 700, 1400):
    part = slice(first, first + 100)
    errors[first] = [float((x - logits[0])[:, part].abs().mean()) for x in logits[1:]]
    print(f"from token {first}: error {errors[first][0]:.3f} loaded, {errors[first][1]:.3f} cast")
assert errors[1400][0] < 1.5 * errors[0][0]
assert errors[1400][1] > 3 * errors[0][1]

options = {"bf16_full_eval": True, "use_cpu": True, "report_to": [], "disable_tqdm": True}
model = LlamaForCausalLM.from_pretrained(sys.argv[1])
trainer = Trainer(model, TrainingArguments(sys.argv[1], **options))
found = torch.from_numpy(trainer.predict([{"input_ids": ids[0]}]).predictions).float()
print(f"bf16_full_eval: {(found - logits[2]).abs().max():.2g} from the one that was cast")
assert (found - logits[2]).abs().max() < 0.1 * (found - logits[1]).abs().max()
PY
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore "$work/positions.py" "$work/model"
