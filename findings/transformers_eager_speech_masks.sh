#!/usr/bin/env bash
# package: transformers 5.23.0 (torch 2.13.0)
# date: 2026-11-29
# expected: attn_implementation="eager" and "sdpa" give the same numbers to rounding
# seen: in two speech encoders they do not, without an error, because the code between the mask and the
#   attention function expects a boolean mask (True: the frame is seen) and "eager" makes an additive one
#   (0: seen), or the other way round. The streaming encoder of Nemotron hides the frames that may be seen
#   and gives NaN; the chunked one of SeamlessM4T v2 adds its boolean mask to the scores, so that a
#   padded frame is seen nearly as well as any other
# ours: adasplash's function gets the boolean mask, as "sdpa" does, and agrees with it; the page on
#   families of transformers says so (docs/adasplash/transformers.md)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.23.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import SeamlessM4Tv2Config
from transformers.models.nemotron_asr_streaming.configuration_nemotron_asr_streaming import (
    NemotronAsrStreamingEncoderConfig,
)
from transformers.models.nemotron_asr_streaming.modeling_nemotron_asr_streaming import (
    NemotronAsrStreamingEncoder,
)
from transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2 import SeamlessM4Tv2SpeechEncoder


def nemotron(implementation):
    config = NemotronAsrStreamingEncoderConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        subsampling_conv_channels=8, num_mel_bins=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = NemotronAsrStreamingEncoder._from_config(config, attn_implementation=implementation)
    torch.manual_seed(1)
    return model.eval()(torch.randn(1, 64, 16)).last_hidden_state


def seamless(implementation):
    config = SeamlessM4Tv2Config(
        hidden_size=32, speech_encoder_layers=1, speech_encoder_attention_heads=4,
        speech_encoder_intermediate_size=48, feature_projection_input_dim=16, add_adapter=False,
        max_source_positions=64, conv_depthwise_kernel_size=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = SeamlessM4Tv2SpeechEncoder._from_config(config, attn_implementation=implementation)
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.3)
    torch.manual_seed(1)
    seen = torch.ones(1, 32, dtype=torch.long)
    seen[:, 8:] = 0
    out = model.eval()(torch.randn(1, 32, 16), attention_mask=seen).last_hidden_state
    return out[:, :4]


with torch.no_grad():
    eager, sdpa = nemotron("eager"), nemotron("sdpa")
    print(f"Nemotron: NaN in {int(eager.isnan().sum())} and {int(sdpa.isnan().sum())} of {eager.numel()}")
    assert eager.isnan().all() and not sdpa.isnan().any()
    eager, sdpa = seamless("eager"), seamless("sdpa")
    off = ((eager - sdpa).abs().max() / sdpa.abs().max()).item()
    print(f"SeamlessM4T v2: off by {off:.1%} of the largest number")
    assert off > 0.01
PYTHON
