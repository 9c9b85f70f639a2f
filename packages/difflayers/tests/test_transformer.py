"""The transformer layers inside torch's stacks."""

import pytest
import torch
from torch import nn

import difflayers as d
from shared_kernels.testing import assert_close

from .cases import randn, spread


@pytest.mark.parametrize("first", [True, False])
def test_encoder_and_decoder_in_torch_stacks(first):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        spread(d.HopfieldEncoderLayer(8, 2, 16, 0.0, batch_first=first)),
        2,
        enable_nested_tensor=False,
    )
    decoder = nn.TransformerDecoder(
        spread(d.HopfieldDecoderLayer(8, 2, 16, 0.0, batch_first=first)), 2
    )
    x, memory = randn(2, 5, 8), randn(2, 7, 8, seed=1)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(5)

    def turn(t):
        return t if first else t.transpose(0, 1)

    def run(x, memory, padding):
        stored = encoder(turn(memory), src_key_padding_mask=padding)
        return turn(
            decoder(
                turn(x),
                stored,
                tgt_mask=causal,
                memory_key_padding_mask=padding,
                tgt_is_causal=True,
            )
        )

    out = run(x, memory, padding)
    assert_close(out[1:], run(x[1:], memory[1:, :4], None))
    later = x.clone()
    later[:, 3:] += 1.0
    assert_close(run(later, memory, padding)[:, :3], out[:, :3])
    layer = encoder.layers[0]
    assert layer.self_attn is layer.hopfield_association
    assert_close(layer(turn(x), is_causal=True), layer(turn(x), src_mask=causal))


def test_layers_from_hopfield_instances():
    own, cross = (
        d.Hopfield(8, num_heads=2),
        d.Hopfield(8, num_heads=4, stored_pattern_size=6, pattern_projection_size=6),
    )
    layer = d.HopfieldEncoderLayer(own, 16, 0.2, "gelu")
    assert layer.linear_residual.out_features == 16 and layer.dropout_output.p == 0.2
    assert layer.activation_residual is nn.functional.gelu
    assert layer.hopfield_association is not own
    decoder = d.HopfieldDecoderLayer(own, cross, 16, 0.2)
    assert decoder(randn(2, 5, 8), randn(2, 7, 6)).shape == (2, 5, 8)
    assert not any("self_attn" in key for key in decoder.state_dict())
    named = d.HopfieldEncoderLayer(hopfield_association=own, dim_feedforward=16)
    assert named.output_size == 8
