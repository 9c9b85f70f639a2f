#!/usr/bin/env bash
# package: transformers 5.24.0 (torch 2.13.0)
# date: 2026-11-30
# expected: prefill_chunk_size, which splits the prompt to save memory, changes nothing but the memory; what does not support it is refused, as a generation without a cache is
# seen: with an encoder and a decoder (BART, T5) the prompt of the decoder is split, but the mask that is cut to the length of the chunk is that of the encoder: attention_mask[:, :1] for one start token. One column is broadcast to all keys: where the first token of the input is padding all of the input is hidden, where it is not its padding is seen. A padded row gets other tokens than with an unsplit prompt, silently; rows without padding are right
# ours: nothing
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0

cat >"$work/chunked.py" <<'PY'
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging

logging.set_verbosity_error()
ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
bart = BartConfig(
    vocab_size=40,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    forced_eos_token_id=None,
    **ends,
)
t5 = T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, **ends)
ids = torch.randint(3, 40, (3, 12), generator=torch.Generator().manual_seed(1))
mask = (torch.arange(12) >= torch.tensor([[5], [0], [2]])).long()  # the second row has no padding
for model_class, config in ((BartForConditionalGeneration, bart), (T5ForConditionalGeneration, t5)):
    torch.manual_seed(0)
    model = model_class(config).eval()
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.3)
    for side, seen in (("left", mask), ("right", mask.flip(1))):
        call = {"attention_mask": seen, "max_new_tokens": 8, "min_new_tokens": 8}
        call |= {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        whole, split = (
            model.generate(ids * seen, **call, prefill_chunk_size=size).logits[0]
            for size in (None, 5)
        )
        off = (whole - split).abs().amax(-1)
        rows = ", ".join(f"{x:.2g}" for x in off)
        print(f"{config.model_type}, padded on the {side}: logits of the three rows off by {rows}")
        assert off[1] < 1e-4 and off[0] > 1e-2 and off[2] > 1e-2
PY
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore "$work/chunked.py"
