"""The language model: three styles of output, labels, causality, generation, saving."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from dsalt.model import DSALTLMHeadModel, LMOutput
from shared_kernels.testing.tolerances import tolerance

FLOAT32 = tolerance(torch.float32)
GRADIENT = tolerance(torch.float32, "gradient")

VOCAB = 50


def make(seed: int = 0, **options) -> DSALTLMHeadModel:
    torch.manual_seed(seed)
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 2, "n_min": 3, "n_max": 12, "k_lmk": 4}
    sizes |= {"dropout": 0.0, "landmark_block": 8, "window_ramp": 4.0}
    model = DSALTLMHeadModel(VOCAB, **{**sizes, **options})
    with torch.no_grad():  # larger than at the start, so that each part shows in the logits
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def test_positional_arguments_are_documented_order():
    model = DSALTLMHeadModel(VOCAB, 32, 1, 2, 3, 12, 4, 1e-5, 0.25, True)
    assert model.config["norm_eps"] == 1e-5
    assert model.config["dropout"] == 0.25
    assert model.transformer.blocks[0].attention.q_proj.bias is not None


# --- output --------------------------------------------------------------------------------------


def test_output_without_labels_behaves_as_logits():
    out = make()(ids(2, 20))
    assert isinstance(out, LMOutput)
    assert out.shape == (2, 20, VOCAB)
    assert out.loss is None
    assert torch.equal(out[:, -1], out.logits[:, -1])
    assert torch.equal(torch.argmax(out, dim=-1), out.logits.argmax(-1))
    assert torch.equal(F.softmax(out, -1), out.logits.softmax(-1))
    assert torch.equal(torch.cat([out, out.logits]), torch.cat([out.logits, out.logits]))
    assert torch.equal(out + 1, out.logits + 1)
    assert torch.equal(2 * out, 2 * out.logits)
    assert bool((out == out.logits).all())
    assert out.argmax(-1).shape == (2, 20)
    assert len(out) == 2
    first, second = out
    assert torch.equal(second, out.logits[1])
    assert out.size(-1) == VOCAB


def test_output_with_labels_unpacks():
    model, x = make(), ids(2, 20)
    out = model(x, labels=x)
    loss, logits = out
    assert loss is out.loss and logits is out.logits
    assert out[0] is out.loss and len(out) == 2
    with pytest.raises(AttributeError, match="use .loss or .logits"):
        _ = out.shape
    assert [tuple(w.shape) for w in out.window_sizes] == [(2, 2, 20)] * 2
    assert out.window_reg.ndim == 0 and out.window_reg.requires_grad
    plain = model(x, labels=x, return_dict=False)
    assert isinstance(plain, tuple) and torch.equal(plain[0], loss)
    assert isinstance(model(x, return_dict=False), torch.Tensor)


def test_output_is_a_tree_of_tensors():
    out = make()(ids(1, 9), labels=ids(1, 9))
    leaves, spec = torch.utils._pytree.tree_flatten(out)
    assert sum(isinstance(leaf, torch.Tensor) for leaf in leaves) == 5
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert again.loss is out.loss


# --- loss ----------------------------------------------------------------------------------------


def test_labels_are_aligned_and_ignored_ones_do_not_count():
    model, x, y = make(), ids(2, 20), ids(2, 20, seed=2)
    y[0, :7] = -100
    out = model(x, labels=y)
    valid = y != -100
    nll = -out.logits.log_softmax(-1)[valid].gather(-1, y[valid][:, None])
    torch.testing.assert_close(out.loss, nll.mean())
    assert model(x, labels=torch.full_like(x, -100)).loss == 0.0


def test_shift_labels_scores_the_next_token():
    model, x = make(), ids(2, 20)
    moved = F.pad(x[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(
        model(x, labels=x, shift_labels=True).loss, model(x, labels=moved).loss
    )
    mask = torch.ones_like(x)
    mask[0, 15:] = 0
    masked = model(x, labels=x, shift_labels=True, attention_mask=mask).loss
    turned = model(x, labels=x, shift_labels=True, attention_mask=mask.flip(1)).loss
    front = model(x[:1, 5:], labels=x[:1, 5:], shift_labels=True).loss * 14
    front = front + model(x[1:], labels=x[1:], shift_labels=True).loss * 19
    torch.testing.assert_close(turned, front / 33)
    kept = model(x[:1, :15], labels=x[:1, :15], shift_labels=True).loss * 14
    kept = kept + model(x[1:], labels=x[1:], shift_labels=True).loss * 19
    torch.testing.assert_close(masked, kept / 33)


def test_packed_sequences_are_separate():
    model, x = make(), ids(1, 30)
    cu = torch.tensor([0, 11, 30], dtype=torch.int32)
    packed = model(x, labels=x, shift_labels=True, cu_seqlens=cu)
    a = model(x[:, :11], labels=x[:, :11], shift_labels=True)
    b = model(x[:, 11:], labels=x[:, 11:], shift_labels=True)
    torch.testing.assert_close(
        packed.logits, torch.cat([a.logits, b.logits], 1), atol=FLOAT32 / 2, rtol=FLOAT32 / 2
    )
    torch.testing.assert_close(packed.loss, (a.loss * 10 + b.loss * 18) / 28)


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": True}, {"n_kv_heads": 1, "n_sink": 1}])
def test_the_loss_alone_trains_every_parameter(options):
    model, x = make(**options), ids(2, 40)
    model(x, labels=ids(2, 40, seed=2)).loss.backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


def test_tied_head_is_one_parameter():
    tied, free = make(tie_embeddings=True), make()
    assert tied.lm_head.weight is tied.embedding.weight
    assert free.num_parameters() - tied.num_parameters() == VOCAB * 32
    assert free.num_parameters(embeddings=False) == free.num_parameters() - VOCAB * 32
    free.embedding.weight.requires_grad_(False)
    assert free.num_parameters(trainable_only=True) == free.num_parameters(embeddings=False)


# --- causality -----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_a_token_changes_no_earlier_logit(training):
    model, x = make().train(training), ids(1, 40)
    before = model(x).logits
    for t in (1, 9, 24, 39):
        changed = x.clone()
        changed[0, t] = (x[0, t] + 7) % VOCAB
        after = model(changed).logits
        assert (after - before)[:, :t].abs().max() <= FLOAT32 / 2
        assert (after - before)[:, t:].abs().max() > 1e-3
    torch.testing.assert_close(model(x[:, :17]).logits, before[:, :17], atol=FLOAT32 / 2, rtol=0)


# --- generation ----------------------------------------------------------------------------------


def test_cached_logits_equal_the_full_forward():
    model, x = make(n_sink=1, n_kv_heads=1).eval(), ids(2, 40)
    full = model(x).logits
    out = model(x[:, :13], use_cache=True)
    parts, cache = [out.logits], out.past_key_values
    for t in range(13, 40):
        out = model(x[:, t : t + 1], past_key_values=cache, use_cache=True)
        parts.append(out.logits)
        cache = out.past_key_values
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=FLOAT32, rtol=FLOAT32)
    assert model(x).past_key_values is None


def test_greedy_with_and_without_cache():
    model, x = make(), ids(2, 13)
    cached = model.generate(x, 25, temperature=0.0)
    assert torch.equal(cached, model.generate(x, 25, temperature=0.0, use_cache=False))
    assert cached.shape == (2, 38) and torch.equal(cached[:, :13], x)
    logits = model.eval()(cached).logits
    assert torch.equal(cached[:, 13:], logits[:, 12:-1].argmax(-1))
    assert model.generate(x, 0).shape == x.shape


def test_global_landmarks_are_the_prompts_with_a_cache_and_all_tokens_without():
    model, x = make(landmark_mode="global"), ids(2, 13)
    cached = model.generate(x, 25, temperature=0.0)
    hidden = model.eval().transformer(model.embedding(cached), landmark_prefix=13)
    assert torch.equal(cached[:, 13:], model.lm_head(hidden)[:, 12:-1].argmax(-1))
    anew = x
    for _ in range(25):
        anew = torch.cat((anew, model(anew)[:, -1:].argmax(-1)), 1)
    assert torch.equal(model.generate(x, 25, temperature=0.0, use_cache=False), anew)
    assert not torch.equal(anew, cached)


def test_generate_keeps_the_mode_and_needs_no_gradient():
    model = make(dropout=0.5)
    model.train()
    out = model.generate(ids(1, 5), 4, temperature=0.0)
    assert model.training and not out.requires_grad
    assert torch.equal(out, model.generate(ids(1, 5), 4, temperature=0.0))


@pytest.mark.parametrize("left", [True, False])
def test_padded_rows_continue_as_they_do_alone(left):
    model = make()
    prompts = [ids(1, n, seed=n) for n in (5, 11, 8, 11)]
    width = 11
    batch, mask = torch.full((4, width), 0), torch.zeros(4, width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        n = prompt.shape[1]
        at = slice(width - n, width) if left else slice(0, n)
        batch[row, at], mask[row, at] = prompt[0], True
    out = model.generate(batch, 12, temperature=0.0, attention_mask=mask)
    assert torch.equal(out[:, :width], batch)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt, 12, temperature=0.0)
        assert torch.equal(out[row, width:], alone[0, prompt.shape[1] :])


def test_eos_ends_a_row_and_pads_behind_it():
    model, x = make(), ids(3, 6)
    free = model.generate(x, 15, temperature=0.0)[:, 6:]
    eos = int(free[0, 3])
    out = model.generate(x, 15, temperature=0.0, eos_token_id=eos, pad_token_id=0)[:, 6:]
    for row in range(3):
        hits = (free[row] == eos).nonzero()
        n = int(hits[0]) + 1 if len(hits) else 15
        assert torch.equal(out[row, :n], free[row, : min(n, out.shape[1])])
        assert not out[row, n:].any()


def test_sampling_options():
    model, x = make(), ids(1, 6).expand(400, 6)
    draw = lambda **o: model.generate(x, 1, generator=torch.Generator().manual_seed(0), **o)[:, -1]  # noqa: E731
    p = model.eval()(x[:1]).logits[0, -1].softmax(-1).detach()
    best = p.topk(3).indices.tolist()
    assert set(draw(top_k=3).tolist()) == set(best)
    assert set(draw(top_k=1).tolist()) == {best[0]}
    assert set(draw(temperature=1e-6).tolist()) == {best[0]}
    assert set(draw(top_p=float(p[best[0]]) * 0.9).tolist()) == {best[0]}
    two = float(p[best[0]] + p[best[1]]) * 0.99
    assert set(draw(top_p=two).tolist()) == set(best[:2])
    share = (draw(temperature=1.0) == best[0]).double().mean()
    assert abs(float(share) - float(p[best[0]])) < 4 * (float(p[best[0]]) / 400) ** 0.5
    assert torch.equal(draw(temperature=0.7), draw(temperature=0.7))


def test_limits_of_the_sampling_options():
    model, x = make(), ids(1, 6).expand(60, 6)
    draw = lambda **o: model.generate(x, 2, generator=torch.Generator().manual_seed(0), **o)  # noqa: E731
    free, greedy = draw(), draw(temperature=0.0)
    assert len(free[:, 6].unique()) > 10
    for options in ({"top_k": VOCAB}, {"top_k": 10 * VOCAB}, {"top_p": 1.0}):
        assert torch.equal(draw(**options), free)
    tiny = ({"top_p": 1e-9}, {"temperature": 1e-9}, {"temperature": 1e-300}, {"top_k": 1})
    for options in (*tiny, {"top_k": 3, "top_p": 1e-9}, {"temperature": 5.0, "top_k": 1}):
        assert torch.equal(draw(**options), greedy), options
    # very hot: every token is as likely as any other
    assert len(draw(temperature=1e30)[:, 6].unique()) > len(free[:, 6].unique())


def test_top_k_and_top_p_of_tied_logits():
    from dsalt._generation import Plan, _sample

    def draw(logits, temperature, top_k, top_p):
        ends = {"penalty": 1.0, "longest": 1, "shortest": 0, "eos": [], "pad": 0, "stops": []}
        how = Plan(
            temperature,
            top_k,
            top_p,
            **ends,
            tokenizer=None,
            generator=None,
            normalizer=torch.softmax,
        )
        return _sample(logits, how)

    flat = torch.zeros(300, 10)
    assert len(draw(flat, 1.0, 4, None).unique()) == 4
    assert len(draw(flat, 1.0, None, 0.35).unique()) == 4
    assert len(draw(flat, 1.0, 4, 0.5).unique()) == 2  # the share among the four
    steep = torch.tensor([[0.0, -1e4, -torch.inf]]).expand(50, 3)
    for temperature in (1e-30, 1.0, 1e3):
        assert not draw(steep, temperature, 2, 0.9).any()


def test_shortest_and_longest_continuation():
    model, x = make(), ids(3, 6)
    free = model.generate(x, 15, temperature=0.0)[:, 6:]
    eos = int(free[0, 2])
    early = model.generate(x, 15, temperature=0.0, eos_token_id=eos, pad_token_id=0)[:, 6:]
    first = (early == eos).float().argmax(1)
    assert int(first[0]) == int((free[0] == eos).float().argmax())
    late = model.generate(
        x, 15, temperature=0.0, eos_token_id=eos, pad_token_id=0, min_new_tokens=9
    )[:, 6:]
    assert 9 <= late.shape[1] <= 15
    assert not (late[:, :9] == eos).any()
    assert torch.equal(late[0, : first[0]], free[0, : first[0]])
    exact = model.generate(x, 7, temperature=0.0, eos_token_id=eos, min_new_tokens=7)
    assert exact.shape == (3, 13) and not (exact[:, 6:] == eos).any()
    # every row at its end: no token more than needed
    alone = model.generate(x[:1], 15, temperature=0.0, eos_token_id=eos)
    assert alone.shape[1] == 6 + int(first[0]) + 1 and int(alone[0, -1]) == eos


@pytest.mark.parametrize("use_cache", [True, False])
def test_padded_rows_end_on_their_own(use_cache):
    """Prompts of three lengths, eos in some rows only: each row is what it is alone."""
    model = make()
    prompts = [ids(1, n, seed=n) for n in (4, 9, 1, 9)]
    batch, mask = torch.full((4, 9), 0), torch.zeros(4, 9, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        batch[row, 9 - prompt.shape[1] :], mask[row, 9 - prompt.shape[1] :] = prompt[0], 1
    options = {"temperature": 0.0, "use_cache": use_cache, "pad_token_id": 7}
    eos = int(model.generate(prompts[1], 8, **options)[0, 9 + 2])
    out = model.generate(batch, 12, attention_mask=mask, eos_token_id=eos, **options)[:, 9:]
    longest = 0
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt, 12, eos_token_id=eos, **options)[0, prompt.shape[1] :]
        longest = max(longest, len(alone))
        assert torch.equal(out[row, : len(alone)], alone)
        assert bool((out[row, len(alone) :] == 7).all())
    assert out.shape[1] == longest


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load(tmp_path, tied):
    model = make(tie_embeddings=tied, n_kv_heads=1, window_reg="length").eval()
    model.save_pretrained(tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    again = DSALTLMHeadModel.from_pretrained(tmp_path / "m")
    assert again.config == model.config and not again.training
    assert torch.equal(again(ids(2, 20)).logits, model(ids(2, 20)).logits)
    assert (again.lm_head.weight is again.embedding.weight) == tied
    assert json.loads((tmp_path / "m/config.json").read_text())["landmark_block"] == 8
    assert DSALTLMHeadModel.from_pretrained(tmp_path / "m", dropout=0.3).config["dropout"] == 0.3


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        DSALTLMHeadModel.from_pretrained(tmp_path)
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is \(50, 32\), the model has \(51, 32\)"):
        DSALTLMHeadModel.from_pretrained(tmp_path, vocab_size=51)
    with pytest.raises(ValueError, match="does not fit this model: missing"):
        DSALTLMHeadModel.from_pretrained(tmp_path, n_layers=3)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        DSALTLMHeadModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        DSALTLMHeadModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(ids(2, 5).float()), "`input_ids` must be an integer tensor"),
        (lambda m: m(ids(5)), r"`input_ids` must have shape \(B, N\)"),
        (lambda m: m(ids(1, 5) + VOCAB), r"`input_ids` must lie in \[0, 50\)"),
        (lambda m: m(ids(1, 5), labels=ids(1, 4)), "`labels` must have the shape"),
        (lambda m: m(ids(1, 5), labels=ids(1, 5) - 99), "`labels` must be -100 or lie in"),
        (lambda m: m.generate(ids(1, 5), 3, temperature=-1.0), "`temperature` must be at least 0"),
        (lambda m: m.generate(ids(1, 5), 3, top_p=0.0), "`top_p` must be in"),
        (lambda m: m.generate(ids(1, 5), 3, top_k=0), "`top_k` must be at least 1"),
        (lambda m: m.generate(ids(1, 5), -1), "`max_new_tokens` must be at least 0"),
        (lambda m: m.generate(ids(1, 5), 3, min_new_tokens=4), "`min_new_tokens` must be in"),
        (lambda m: m.generate(ids(1, 5), 3, eos_token_id=VOCAB), "`eos_token_id` must lie in"),
        (lambda m: m.generate(ids(1, 0), 3), "`input_ids` must hold at least one token"),
        (lambda m: m.generate(ids(1, 5), 3, temperature=float("nan")), "`temperature` must be"),
        (lambda m: m.generate(ids(1, 5), 3, top_p=1.5), "`top_p` must be in"),
        (lambda m: m.generate(ids(2, 5), attention_mask=ids(2, 5) * 0), "`attention_mask` must"),
        (lambda m: m.generate(ids(2, 5), attention_mask=ids(2, 4)), "`attention_mask` must"),
        (lambda m: make(window_reg="none"), "`window_reg` must be one of"),
    ],
)
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(make())


def test_empty_sequences_have_empty_logits():
    assert make()(ids(2, 0)).shape == (2, 0, VOCAB)


@pytest.mark.system
def test_the_model_is_one_graph():
    model, x = make(n_layers=1), ids(2, 20)
    traced = torch.compile(model, fullgraph=True, backend="eager")
    loss, logits = traced(x, labels=x, return_dict=False)
    assert torch.equal(logits, model(x).logits)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.system
@pytest.mark.slow
def test_compiled_model_equals_eager():
    model, x = make(), ids(2, 20)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss, logits = compiled(x, labels=x, return_dict=False)
    torch.testing.assert_close(logits, model(x).logits, atol=FLOAT32 / 2, rtol=FLOAT32 / 2)
    torch.testing.assert_close(loss, model(x, labels=x).loss)
    loss.backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x, labels=x).loss.backward()
    for a, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, atol=FLOAT32 / 2, rtol=GRADIENT / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_a_half_type_is_near_its_float32_twin(dtype):
    model, x = make().eval(), ids(2, 30)
    exact = model(x).logits.detach()
    half = make().to(dtype).eval()
    out = half(x, labels=x)
    assert out.logits.dtype == dtype and out.loss.dtype == torch.float32
    assert float((out.logits.detach().float() - exact).std()) < 0.1 * float(exact.std())
    assert half.generate(x[:, :7], 5, temperature=0.0).shape == (2, 12)
