"""Generation as daily users call it, loading as they load, labels that would teach to copy."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from dsalt.model import DSALTLMHeadModel
from shared_kernels.testing import assert_close

V = 30


def make(**options):
    torch.manual_seed(0)
    sizes = {"n_min": 2, "n_max": 6, "k_lmk": 2, "landmark_block": 4, "dropout": 0.1}
    return DSALTLMHeadModel(V, 16, 1, 2, **{**sizes, **options}).eval()


def ids(B=2, N=9):
    return torch.randint(0, V, (B, N), generator=torch.Generator().manual_seed(1))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_other_random_numbers_stay_as_they_are():
    model = make()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = model.generate(ids(), 8)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(model.generate(ids(), 8), first)  # it goes on, not begins anew
    torch.manual_seed(4)
    other = model.generate(ids(), 8)
    torch.manual_seed(3)
    assert torch.equal(model.generate(ids(), 8), first) and not torch.equal(other, first)


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.int64],
)
def test_ids_of_every_integer_dtype(dtype):
    model, x = make(), ids()
    exact = model(x, labels=x.flip(1))
    out = model(x.to(dtype), labels=x.flip(1).to(dtype))
    assert torch.equal(out.logits, exact.logits) and torch.equal(out.loss, exact.loss)
    made = model.generate(x.to(dtype), 5, temperature=0)
    assert made.dtype == torch.int64 and torch.equal(made, model.generate(x, 5, temperature=0))


@pytest.mark.parametrize("use_cache", [True, False])
def test_several_ends(use_cache):
    model, x = make(), ids()
    free = model.generate(x, 20, generator=seeded())[:, 9:]
    eos = [int(free[0, 3]), int(free[1, 6])]
    new = model.generate(
        x, 20, eos_token_id=eos, pad_token_id=1, generator=seeded(), use_cache=use_cache
    )[:, 9:]
    for row, alone in zip(new, free, strict=True):
        end = next(t for t, token in enumerate(alone.tolist()) if token in eos)
        assert torch.equal(row[: end + 1], alone[: end + 1]) and bool((row[end + 1 :] == 1).all())
    with pytest.raises(ValueError, match="eos_token_id"):
        model.generate(x, 2, eos_token_id=[3, V])


@pytest.mark.parametrize("name", ["eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("kind", [int, np.int64, np.uint16, torch.tensor])
def test_a_token_id_is_an_integer(name, kind):
    model, x = make(), ids()
    plain = model.generate(x, 5, temperature=0, **{"eos_token_id": 3, name: 2})
    assert torch.equal(
        model.generate(x, 5, temperature=0, **{"eos_token_id": 3, name: kind(2)}), plain
    )
    for wrong in (2.0, True, "2", torch.tensor(2.0), torch.tensor(True), np.float64(2)):
        with pytest.raises(TypeError, match=f"`{name}` must be a token id"):
            model.generate(x, 5, **{name: wrong})
    for wrong in ([2.0], [True], torch.tensor([2.0]), torch.tensor([True]), np.array([2.5])):
        with pytest.raises(TypeError, match="`eos_token_id` must be a token id"):
            model.generate(x, 5, eos_token_id=wrong)


def test_no_temperature_is_one():
    model, x = make(), ids()
    given = model.generate(x, 6, temperature=None, generator=seeded())
    assert torch.equal(given, model.generate(x, 6, temperature=1.0, generator=seeded()))


def test_repetition_penalty_is_the_formula():
    model, x = make(), ids()
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    x[0, :3] = 7  # padding is not held by the row
    new, held = x, [set(row[m == 1].tolist()) for row, m in zip(x, mask, strict=True)]
    ones = mask
    for _ in range(6):
        logits = model(new, attention_mask=ones).logits[:, -1].detach()
        for row, tokens in zip(logits, held, strict=True):
            for t in tokens:
                row[t] = row[t] / 1.7 if row[t] > 0 else row[t] * 1.7
        token = logits.argmax(-1)
        for tokens, t in zip(held, token.tolist(), strict=True):
            tokens.add(t)
        new, ones = torch.cat((new, token[:, None]), 1), nn.functional.pad(ones, (0, 1), value=1)
    ours = model.generate(x, 6, temperature=0, repetition_penalty=1.7, attention_mask=mask)
    assert torch.equal(ours, new)
    with pytest.raises(ValueError, match="repetition_penalty"):
        model.generate(x, 2, repetition_penalty=0)


def test_several_sequences_of_each_prompt():
    model, x = make(), ids()
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    options = {"generator": seeded(), "attention_mask": mask}
    out = model.generate(x, 6, num_return_sequences=3, **options)
    again = model.generate(
        x.repeat_interleave(3, 0),
        6,
        generator=seeded(),
        attention_mask=mask.repeat_interleave(3, 0),
    )
    assert out.shape == (6, 15) and torch.equal(out, again)


class Letters:
    def decode(self, tokens):
        return "".join("abcdefghijklmnopqrstuvwxyz.,! "[t] for t in tokens)


@pytest.mark.parametrize("use_cache", [True, False])
def test_stop_strings(use_cache):
    model, x, letters = make(), ids(), Letters()
    free = model.generate(x, 20, generator=seeded())[:, 9:]
    text = [letters.decode(row.tolist()) for row in free]
    stops = [text[0][4:6], text[1][8:11]]
    new = model.generate(
        x,
        20,
        stop_strings=stops,
        tokenizer=letters,
        pad_token_id=0,
        generator=seeded(),
        use_cache=use_cache,
    )[:, 9:]
    for row, alone in zip(new, text, strict=True):
        end = min(alone.find(s) + len(s) for s in stops if s in alone)
        assert letters.decode(row.tolist())[:end] == alone[:end] and not row[end:].any()
    longest = max(min(t.find(s) + len(s) for s in stops if s in t) for t in text)
    assert new.shape[1] == longest
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(x, 2, stop_strings="a")
    with pytest.raises(ValueError, match="stop_strings"):
        model.generate(x, 2, stop_strings=[""], tokenizer=letters)


class Streamer:
    def __init__(self):
        self.got, self.ended = [], False

    def put(self, value):
        assert not self.ended
        self.got.append(value)

    def end(self):
        self.ended = True


def test_streamers():
    model, x, streamer, tokens = make(), ids(), Streamer(), []
    out = model.generate(x, 7, temperature=0, streamer=streamer)
    assert streamer.ended and torch.equal(streamer.got[0], x)
    assert torch.equal(torch.stack(streamer.got[1:], 1), out[:, 9:])
    model.generate(x, 7, temperature=0, streamer=tokens.append)
    assert torch.equal(torch.stack(tokens, 1), out[:, 9:])
    with pytest.raises(TypeError, match="streamer"):
        model.generate(x, 7, streamer=3)


def sparsemax(scores, dim):
    ordered = scores.sort(dim=dim, descending=True).values
    count = torch.arange(1, scores.shape[dim] + 1)
    mean = (ordered.cumsum(dim) - 1) / count
    size = (ordered > mean).sum(dim, keepdim=True)
    return (scores - mean.gather(dim, size - 1)).clamp(min=0)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 0.0}])
def test_softmax_as_a_normalizer_changes_nothing(options):
    model, x = make(), ids()
    for given in (torch.softmax, lambda s, dim: nn.Softmax(dim)(s)):
        ours = model.generate(x, 9, generator=seeded(), normalizer=given, **options)
        assert torch.equal(ours, model.generate(x, 9, generator=seeded(), **options))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 3.0}])
def test_a_normalizer_of_your_own_draws_from_its_support(options, use_cache):
    model, x, sizes = make(), ids(), []
    model.lm_head.weight.data *= 30  # scores that differ, so that the support is small

    def normalizer(scores, dim):
        assert scores.shape == (2, V) and dim == -1 and scores.dtype == torch.float32
        weights = sparsemax(scores, dim)
        sizes.append(weights > 0)
        return weights

    options = {**options, "use_cache": use_cache}
    out = model.generate(x, 12, normalizer=normalizer, generator=seeded(), **options)
    support = torch.stack(sizes, 1)  # (B, new tokens, V)
    assert bool(support.gather(-1, out[:, 9:, None]).all()) and float(support.sum(-1).max()) < V
    again = model.generate(x, 12, normalizer=sparsemax, generator=seeded(), **options)
    assert torch.equal(out, again)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_draws_are_made_in_fp32(monkeypatch, dtype):
    """torch.multinomial in fp16 draws tokens of weight 0."""
    draw, drawn_in = torch.multinomial, set()

    def multinomial(weights, *args, **options):
        drawn_in.add(weights.dtype)
        return draw(weights, *args, **options)

    monkeypatch.setattr(torch, "multinomial", multinomial)

    def one_token(scores, dim):
        return torch.nn.functional.one_hot(scores.argmax(dim), scores.shape[dim]).to(dtype)

    make().generate(ids(), 3, normalizer=one_token)
    assert drawn_in == {torch.float32}


@pytest.mark.parametrize(
    ("normalizer", "error", "message"),
    [
        ("softmax", TypeError, "`normalizer` must be a callable"),
        (lambda s, dim: s, ValueError, "hold weights >= 0 that sum to 1"),
        (lambda s, dim: s.sigmoid(), ValueError, "sum to 1 in each row"),
        (lambda s, dim: s.softmax(dim) * torch.nan, ValueError, "smallest weight of nan"),
        (lambda s, dim: s.softmax(dim)[0], ValueError, "have shape the scores' \\(B, V\\)"),
        (lambda s, dim: s.argmax(dim), TypeError, "floating-point"),
    ],
)
def test_a_normalizer_that_gives_no_probabilities(normalizer, error, message):
    with pytest.raises(error, match=message):
        make().generate(ids(), 3, normalizer=normalizer)


def test_labels_that_are_the_inputs_are_warned_of_once():
    model, x = make(), ids()
    with pytest.warns(UserWarning, match="shift_labels=True") as caught:
        model(x, labels=x)
    assert caught[0].filename == __file__
    masked, prompt = x.clone(), x.clone()
    masked[:, -2:] = prompt[:, :4] = -100
    for labels in (masked, prompt):
        with pytest.warns(UserWarning, match="copy"):
            make()(x, labels=labels)
    constant = torch.full_like(x, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x, labels=x)  # said once
        make()(x, labels=x, shift_labels=True)
        make()(x[:, :-1], labels=x[:, 1:])
        make()(constant, labels=constant)  # the next token is the same


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_of_a_file(tmp_path, stored):
    make(tie_embeddings=True).to(stored).save_pretrained(tmp_path)
    load = DSALTLMHeadModel.from_pretrained

    def dtypes(**options):
        return {p.dtype for p in load(tmp_path, **options).parameters()}

    assert dtypes() == dtypes(dtype="auto") == dtypes(torch_dtype=None) == {stored}
    for wanted in (torch.float32, "float32"):
        assert dtypes(dtype=wanted) == dtypes(torch_dtype=wanted) == {torch.float32}
    tied = load(tmp_path, dtype=torch.bfloat16)
    assert tied.lm_head.weight is tied.embedding.weight
    for place in ("cpu", "auto", torch.device("cpu"), {"": "cpu"}):
        assert load(tmp_path, device_map=place).embedding.weight.dtype == stored
    assert load(tmp_path, dropout=0.0).dropout.p == 0.0
    with pytest.raises(TypeError, match="dtype"):
        load(tmp_path, dtype="integer")
    with pytest.raises(ValueError, match="device_map"):
        load(tmp_path, device_map={"transformer": "cpu", "lm_head": "cuda"})
    with pytest.raises(TypeError, match="low_memory"):
        load(tmp_path, low_memory=True)


def test_arguments_of_the_published_model():
    model = make(d_ff=24, alpha=0.3, max_seq_len=12, tie_weights=True)
    assert model.transformer.blocks[0].mlp.up.out_features == 24
    assert_close(model.transformer.blocks[0].attention.scorer.alpha, torch.full((2,), 0.3))
    assert model.lm_head.weight is model.embedding.weight
    with pytest.raises(ValueError, match="max_seq_len"):
        model(ids(N=13))
    with pytest.raises(ValueError, match="max_seq_len"):
        model.generate(ids(), 5)
    assert model.generate(ids(), 4).shape == (2, 13)
    with pytest.raises(ValueError, match="use_fa2"):
        make(use_fa2=True)


def test_yarn_stretches_slow_pairs_alone():
    from dsalt._rotary import rotate as _rotate

    x = torch.randn(1, 1, 400, 64).double()
    near = torch.arange(400)
    plain, long = _rotate(x, near, 1e4), _rotate(x, near, 1e4, 4.0, 400)
    size = 0.1 * torch.log(torch.tensor(4.0)).double() + 1
    assert_close(long[..., 0] / size, plain[..., 0])  # turns 64 times in 400 tokens
    slow = _rotate(x, near / 4, 1e4)
    assert_close(long[..., 31] / size, slow[..., 31])  # turns less than once
    model = make(rope_factor=4.0, rope_length=16)
    assert model(ids(N=60)).logits.isfinite().all()
    with pytest.raises(ValueError, match="rope_factor"):
        make(rope_factor=0.5)
    with pytest.raises(TypeError, match="rope_length"):
        make(rope_factor=2.0)
