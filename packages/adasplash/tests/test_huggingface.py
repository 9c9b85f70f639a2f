"""transformers' models on entmax attention: at alpha = 1 they are what they were."""

from __future__ import annotations

import pytest
import torch

import adasplash
from adasplash import AlphaParameter
from adasplash._transformers_mask import MaskFunction, calls_the_interface, interface
from adasplash.huggingface import _forward_with, _masked
from adasplash.sdpa import weighted
from shared_kernels.testing import assert_close
from shared_kernels.testing.memory import measure_memory

KINDS = ("llama", "gpt2", "mistral", "bert")


def test_bad_names_and_alphas_are_refused_and_nothing_is_imported():
    with pytest.raises(ValueError, match="`alpha` must be in"):
        adasplash.register_transformers(alpha=2.5)
    with pytest.raises(TypeError, match="entmax_alpha"):
        adasplash.register_transformers(alpha=torch.tensor(1.5))


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers", reason="needs the optional transformers")
    adasplash.register_transformers("entmax1", alpha=1.0)
    adasplash.register_transformers("entmax15")
    return module


def build(transformers, kind: str, attention: str):
    sizes = {"vocab_size": 31, "attn_implementation": attention, "pad_token_id": 0}
    wide = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    classes = {
        "llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**sizes, **wide, **ends, num_key_value_heads=2)
        ),
        "mistral": lambda: transformers.MistralForCausalLM(
            transformers.MistralConfig(
                **sizes, **wide, **ends, num_key_value_heads=2, sliding_window=5
            )
        ),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                **sizes,
                **ends,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=64,
                attn_pdrop=0.0,
                embd_pdrop=0.0,
                resid_pdrop=0.0,
            )
        ),
        "bert": lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(
                **sizes, **wide, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
            )
        ),
    }
    torch.manual_seed(0)
    model = classes[kind]()
    assert model.config._attn_implementation == attention
    for parameter in model.parameters():  # large enough for attention to be far from uniform
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def batch(N: int = 12):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 31, (3, N), generator=generator)


def paddings(N: int = 12):
    left = torch.arange(N) >= torch.tensor([[4], [0], [2]])
    return {"none": None, "left": left.long(), "right": left.flip(1).long()}


@pytest.mark.extras
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_alpha_1_has_the_model_s_own_logits_and_gradients(transformers, kind, padding):
    """alpha = 1.5 does not."""
    ids, mask = batch(), paddings()[padding]
    seen = torch.ones_like(ids) if mask is None else mask
    runs = {}
    for name in ("eager", "sdpa", "entmax1", "entmax15"):
        model = build(transformers, kind, name)
        if name == "eager":  # its softmax and its mask are made for fp32
            model = model.float()
        logits = model(ids, attention_mask=mask).logits[seen.bool()]
        loss = logits.square().mean()
        runs[name] = logits, torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
    assert_close(runs["entmax1"][0], runs["sdpa"][0])
    assert_close(runs["entmax1"][0].float(), runs["eager"][0])
    for a, b in zip(runs["entmax1"][1], runs["sdpa"][1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, "gradient")
    assert (runs["entmax15"][0] - runs["sdpa"][0]).abs().max() > 1e-2


@pytest.mark.extras
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_with_a_cache_is_the_full_forward(transformers, kind, cache):
    model, ids = build(transformers, kind, "entmax15"), batch()
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for mask in (torch.ones_like(ids), paddings()["left"]):
        call = {"attention_mask": mask, **options}
        with torch.no_grad():
            slow = model.generate(ids, use_cache=False, **call)
            assert torch.equal(model.generate(ids, cache_implementation=cache, **call), slow)
    past = model(ids[:, :7], use_cache=True).past_key_values
    step = model(ids[:, 7:], past_key_values=past, use_cache=True).logits  # five at once
    assert_close(step, model(ids).logits[:, 7:])


@pytest.mark.extras
def test_packed_sequences_do_not_see_each_other(transformers):
    model, ids = build(transformers, "llama", "entmax15"), batch()[:1]
    positions = torch.tensor([[*range(5), *range(7)]])
    whole = model(ids, position_ids=positions, use_cache=False).logits
    apart = [model(part, use_cache=False).logits for part in (ids[:, :5], ids[:, 5:])]
    assert_close(whole, torch.cat(apart, 1))


@pytest.mark.extras
@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("mask", [None, "ones", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_sequences_that_would_see_each_other_are_refused(
    transformers, kind, mask, use_cache
):
    model, ids = build(transformers, kind, "entmax15"), batch()[:1]
    positions = torch.tensor([[*range(5), *range(7)]])
    given = None if mask is None else torch.ones_like(ids)
    if mask == "right":
        given[:, -2:] = 0
    options = {"position_ids": positions, "attention_mask": given, "use_cache": use_cache}
    if given is None and not use_cache:
        assert model(ids, **options).logits.isfinite().all()
        return
    with pytest.raises(ValueError, match="packed sequences apart.*use_cache=False"):
        model(ids, **options)


@pytest.mark.extras
@pytest.mark.parametrize("padding", [slice(0, 3), slice(9, 12)])
@pytest.mark.parametrize("position", [0, 1])
def test_positions_of_padding_are_no_sequences_of_their_own(transformers, padding, position):
    model, ids = build(transformers, "llama", "entmax15"), batch()[:1]
    mask = torch.ones_like(ids)
    mask[:, padding] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, position)
    found = model(ids, position_ids=positions, attention_mask=mask).logits
    assert_close(found[mask.bool()], model(ids[mask.bool()][None]).logits[0])


@pytest.mark.extras
def test_masks_are_functions(transformers, monkeypatch):
    """The attention function is given no mask of N x N bytes, and none is made of it."""
    from transformers import AttentionInterface

    seen = []
    inner = AttentionInterface()["entmax15"]

    def spy(module, query, key, value, attention_mask, **options):
        seen.append(type(attention_mask).__name__)
        return inner(module, query, key, value, attention_mask, **options)

    AttentionInterface.register("entmax15", spy)
    monkeypatch.setattr(MaskFunction, "rows", None)
    try:
        for kind in KINDS:
            model = build(transformers, kind, "entmax15")
            for mask in (None, paddings()["left"]):
                model(batch(), attention_mask=mask)
    finally:
        AttentionInterface.register("entmax15", inner)
    assert set(seen) == {"NoneType", "MaskFunction"}


@pytest.mark.extras
def test_it_trains_with_an_alpha_per_head_and_dropout(transformers):
    model = build(transformers, "llama", "entmax15").float().train()
    for layer in model.model.layers:
        layer.self_attn.entmax_alpha = AlphaParameter(4)
        layer.self_attn.attention_dropout = 0.1
    assert sum("entmax_alpha" in name for name in model.state_dict()) == 2
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    ids, losses = batch(), []
    for _ in range(40):
        loss = model(ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    for layer in model.model.layers:
        assert bool((layer.self_attn.entmax_alpha() != 1.5).all())


@pytest.mark.extras
def test_what_it_cannot_do_is_said(transformers):
    model = build(transformers, "llama", "entmax15")
    with pytest.raises(NotImplementedError, match="`sinks` must be one number for each of the 4"):
        model(batch(), sinks=torch.ones(3, 4, 12, 1))
    with pytest.raises(NotImplementedError, match="`output_attentions` must be None"):
        model(batch(), output_attentions=True)
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    function = transformers.AttentionInterface().get_interface("entmax15", None)
    q, paged = torch.zeros(1, 4, 3, 8), PagedAttentionCache.__new__(PagedAttentionCache)
    with pytest.raises(NotImplementedError, match="continuous batching.*'sdpa'"):
        function(model, q, q, q, None, cache=paged)
    for name in ("", "sdpa", "paged|x", "flash_attention_2", "entmax_flash", "a/b"):
        with pytest.raises(ValueError, match="`name` must be"):
            adasplash.register_transformers(name)


@pytest.mark.extras
@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("kind", ["deepseek", "minimax", "t5"])
def test_models_that_select_keys_or_add_a_bias(transformers, kind, alpha):
    """At alpha = 1 they are what they are with their own attention."""
    wide = {
        "vocab_size": 31,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }

    def build(attention):
        torch.manual_seed(0)
        if kind == "deepseek":
            config = transformers.DeepseekV32Config(
                **wide,
                num_key_value_heads=4,
                q_lora_rank=16,
                kv_lora_rank=16,
                v_head_dim=8,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                n_routed_experts=4,
                n_group=1,
                topk_group=1,
                num_experts_per_tok=2,
                moe_intermediate_size=16,
                index_topk=2,
                index_head_dim=16,
                index_n_heads=2,
                attn_implementation=attention,
            )
            model = transformers.DeepseekV32ForCausalLM(config)
        elif kind == "minimax":
            config = transformers.MiniMaxM3VLTextConfig(
                **wide,
                num_key_value_heads=2,
                head_dim=8,
                num_local_experts=4,
                num_experts_per_tok=2,
                index_topk_blocks=1,
                index_block_size=2,
                index_head_dim=8,
                index_n_heads=2,
                index_local_blocks=0,
                attn_implementation=attention,
            )
            model = transformers.AutoModel.from_config(config)
        else:
            config = transformers.T5Config(
                vocab_size=31,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                attn_implementation=attention,
            )
            model = transformers.T5ForConditionalGeneration(config)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.3)
        return model.eval()

    more = {"decoder_input_ids": batch(7)} if kind == "t5" else {}
    found, exact = (
        build(name)(batch(), **more)[0].detach()
        for name in ("entmax1" if alpha == 1.0 else "entmax15", "sdpa")
    )
    if alpha == 1.0:
        assert_close(found, exact)
    else:
        assert (found - exact).abs().max() > 1e-3


@pytest.mark.extras
def test_an_unknown_option_is_refused_by_name(transformers):
    model = build(transformers, "llama", "entmax15")
    with pytest.raises(NotImplementedError, match="`future_option` must be None"):
        model(batch(), future_option=torch.ones(3))
    exact = model(batch()).logits
    harmless = {"num_items_in_batch": 3, "output_hidden_states": True, "future_option": None}
    assert torch.equal(model(batch(), **harmless).logits, exact)


@pytest.mark.extras
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_the_masks_of_flash_attention_windows_are_options(transformers, kind, padding):
    """As the hub's kernels get them: padding alone or None, and the window beside it."""
    ids, mask = batch(), paddings()[padding]
    masks = transformers.masking_utils.flash_attention_mask
    transformers.AttentionMaskInterface.register("from_a_hub", masks)
    transformers.AttentionInterface.register("from_a_hub", _forward_with(1.0))
    seen = (torch.ones_like(ids) if mask is None else mask).bool()
    expected = build(transformers, kind, "entmax1")(ids, attention_mask=mask).logits[seen]
    found = build(transformers, kind, "from_a_hub")(ids, attention_mask=mask).logits[seen]
    assert_close(found, expected)


@pytest.mark.extras
def test_offsets_of_packed_sequences_are_honoured(transformers):
    model, ids = build(transformers, "llama", "entmax15"), batch()[:1]
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    positions = torch.tensor([[*range(5), *range(7)]])
    options = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 7, "max_length_k": 7}
    found = model(ids, position_ids=positions, use_cache=False, **options).logits
    assert_close(found, model(ids, position_ids=positions, use_cache=False).logits)


@pytest.mark.extras
def test_a_model_is_checked_in_one_call(transformers):
    for kind in KINDS:
        found = adasplash.check_transformers(build(transformers, kind, "entmax15"))
        assert len(found.called) == 2 and found.future_leaks == (kind == "bert"), kind
        assert "2 modules call the function" in str(found)
    config = transformers.BloomConfig(
        vocab_size=31, hidden_size=32, n_layer=1, n_head=4, attn_implementation="entmax15"
    )
    bloom = transformers.BloomForCausalLM(config)
    with pytest.raises(NotImplementedError, match="for this family of models, got .* 'bloom'"):
        adasplash.check_transformers(bloom)
    assert bloom.training
    with pytest.raises(ValueError, match="`model` must have a registered attn_implementation"):
        adasplash.check_transformers(build(transformers, "llama", "sdpa"))


@pytest.mark.extras
def test_a_learned_alpha_is_saved_and_loaded(transformers, tmp_path):
    model = build(transformers, "llama", "entmax15").float()
    with pytest.raises(ValueError, match="`model` must have a module with an `entmax_alpha`"):
        adasplash.save_entmax_alpha(model, tmp_path)
    first, second = (layer.self_attn for layer in model.model.layers)
    first.entmax_alpha = AlphaParameter(4, low=1.1, high=1.9)
    torch.nn.init.normal_(first.entmax_alpha.raw)
    second.entmax_alpha = 1.75
    model.save_pretrained(tmp_path)
    adasplash.save_entmax_alpha(model, tmp_path)
    other = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="entmax15"
    ).eval()
    exact = model(batch()).logits
    assert (other(batch()).logits - exact).abs().max() > 1e-3  # it drops them
    adasplash.load_entmax_alpha(other, tmp_path)
    assert torch.equal(other(batch()).logits, exact)
    loaded = other.model.layers[0].self_attn.entmax_alpha
    assert loaded.raw.requires_grad and torch.equal(loaded(), first.entmax_alpha())
    assert other.model.layers[1].self_attn.entmax_alpha == 1.75
    with pytest.raises(FileNotFoundError, match="save_entmax_alpha"):
        adasplash.load_entmax_alpha(other, tmp_path / "elsewhere")


def masks(N, B=2):
    """Name -> arguments of a mask interface, and whether the op has the mask as options."""
    from transformers import masking_utils as m

    left = torch.tensor([N // 7, 0])[:B]
    padded = torch.arange(N) >= left[:, None]
    right = torch.arange(N) < torch.tensor([N // 2, N])[:B, None]
    positions = torch.arange(N) % (N // 3)
    positions = torch.stack([positions, torch.arange(N)])[:B]
    ids = m.find_packed_sequence_indices(positions)
    square = {"batch_size": B, "q_length": N, "kv_length": N}
    few = N // 4
    chunk = m.chunked_causal_mask_function(N // 4, left)

    def packed(function):
        remapped = m.remap_positions_for_packed_sequence(function, positions)
        return m.and_masks(m.packed_sequence_mask_function(ids), remapped)

    def packed_since_5_24(function):
        remapped = m.remap_positions_for_packed_sequence(function, positions)
        return m.and_masks(remapped, m.packed_sequence_mask_function(ids))

    window = m.sliding_window_causal_mask_function(N // 5)
    around = m.sliding_window_bidirectional_mask_function(N // 5)
    causal, both = m.causal_mask_function, m.bidirectional_mask_function
    prefix = m.or_masks(causal, lambda b, h, q, k: k < 3)
    blocks = m.or_masks(causal, m.blockwise_overlay((torch.arange(N) // 9 - 1).expand(B, N)))
    later = {"q_length": few, "q_offset": N - few}
    static = {"q_length": few, "q_offset": N // 2}
    of_window = {"kv_length": N // 2, "kv_offset": N - N // 2, **later}
    return {
        "causal, padded": ({**square, "mask_function": causal, "attention_mask": padded}, True),
        "both ways, padded": ({**square, "mask_function": both, "attention_mask": right}, True),
        "window": ({**square, "mask_function": window}, True),
        "window, padded": ({**square, "mask_function": window, "attention_mask": padded}, True),
        "window both ways": ({**square, "mask_function": around, "attention_mask": right}, True),
        "chunks": ({**square, "mask_function": chunk}, True),
        "chunks, padded": ({**square, "mask_function": chunk, "attention_mask": padded}, True),
        "packed": ({**square, "mask_function": packed(causal)}, True),
        "packed window": ({**square, "mask_function": packed(window)}, True),
        "packed chunks": ({**square, "mask_function": packed(chunk)}, True),
        "packed since 5.24": ({**square, "mask_function": packed_since_5_24(window)}, True),
        "positions alone": (
            {**square, "mask_function": m.remap_positions_for_packed_sequence(causal, positions)},
            False,
        ),
        "cached": ({**square, **later, "mask_function": causal, "attention_mask": padded}, True),
        "cached window": ({**square, **later, "mask_function": window}, True),
        "static cache": ({**square, **static, "mask_function": window}, True),
        "static cache, padded": (
            {**square, **static, "mask_function": causal, "attention_mask": padded[:, : -N // 4]},
            True,
        ),
        "sliding cache": ({**square, **of_window, "mask_function": window}, True),
        "sliding cache, padded": (
            {**square, **of_window, "mask_function": window, "attention_mask": padded},
            True,
        ),
        "cached chunks": ({**square, **later, "mask_function": chunk}, False),
        "prefix": ({**square, "mask_function": prefix, "attention_mask": padded}, False),
        "blocks": ({**square, "mask_function": blocks}, False),
        "a mask of one's own": (
            {**square, "mask_function": lambda b, h, q, k: (q <= k) | (k < 5), "use_vmap": True},
            False,
        ),
    }


MASKS = (
    "causal, padded",
    "both ways, padded",
    "window",
    "window, padded",
    "window both ways",
    "chunks",
    "chunks, padded",
    "packed",
    "packed window",
    "packed chunks",
    "packed since 5.24",
    "positions alone",
    "cached",
    "cached window",
    "static cache",
    "static cache, padded",
    "sliding cache",
    "sliding cache, padded",
    "cached chunks",
    "prefix",
    "blocks",
    "a mask of one's own",
)


def attend(arguments, mask, leaves, dropout=0.0, bias=None, **options):
    return _masked(*leaves, 1.5, True, dropout, mask, None, bias, options)


@pytest.mark.extras
@pytest.mark.parametrize("more", ["", "bias", "sinks and a soft cap"])
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_function_is_its_mask(transformers, name, more, monkeypatch):
    """Values and gradients, on the op's options and in tiles of queries."""
    every = masks(40)
    assert set(every) == set(MASKS)
    arguments, has_options = every[name]
    mask = interface(**arguments, allow_is_causal_skip=False)
    assert isinstance(mask, MaskFunction)
    structure = mask.structure()
    assert (structure is not None) == has_options
    stored = mask & True  # any operator makes it
    assert mask[:, :, :, : mask.shape[-1]] is mask and mask[..., :] is mask
    assert torch.equal(mask[0, :, 1:], stored[0, :, 1:])
    assert type(stored) is torch.Tensor and stored.shape == mask.shape
    assert bool(stored.any()) and not bool(stored.all())
    N_q, N_k = arguments["q_length"], arguments["kv_length"]
    leaves = [
        torch.randn(2, heads, n, 8, dtype=torch.float64).requires_grad_()
        for heads, n in ((4, N_q), (2, N_k), (2, N_k))
    ]
    options = {}
    if more == "bias":
        options["bias"] = torch.randn(1, 4, N_q, N_k, dtype=torch.float64).requires_grad_()
    elif more:
        s_aux = torch.randn(4, dtype=torch.float64).requires_grad_()
        options = {"s_aux": s_aux, "softcap": 2.0}
    exact = weighted(*leaves, 1.5, False, 0.0, mask=stored, **options)
    inputs = [*leaves, *(x for x in options.values() if isinstance(x, torch.Tensor))]
    weight = torch.randn_like(exact)
    expected = torch.autograd.grad((exact * weight).sum(), inputs)
    for pairs in (1 << 22, 300):
        monkeypatch.setattr("adasplash.huggingface._TILE_PAIRS", pairs)
        found = attend(arguments, mask, leaves, **options)
        assert_close(found, exact)
        for a, b in zip(torch.autograd.grad((found * weight).sum(), inputs), expected, strict=True):
            assert_close(a, b, "gradient")


@pytest.mark.extras
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", MASKS)
def test_masks_take_linear_memory(transformers, name, dropout):
    """4096 tokens: a stored mask is 16 MB, the scores 64 MB."""
    arguments, _ = masks(4096, B=1)[name]
    mask = interface(**arguments, allow_is_causal_skip=False)
    sizes = arguments["q_length"], arguments["kv_length"], arguments["kv_length"]
    leaves = [torch.randn(1, 1, n, 8, requires_grad=True) for n in sizes]
    used = measure_memory(lambda: attend(arguments, mask, leaves, dropout).sum().backward())
    assert used.peak < 48e6, used


@pytest.mark.extras
def test_a_window_wider_than_the_keys_is_no_mask_where_none_is_needed(transformers):
    """Queries that are fewer than the keys come without a mask then, as with 'eager'."""
    from transformers import masking_utils as m

    def made(size, N=12, function=None, **options):
        function = function or m.sliding_window_bidirectional_mask_function(size)
        return interface(1, N, N, mask_function=function, local_size=size, **options)

    skip = {"allow_is_bidirectional_skip": True}
    assert made(13, **skip) is None
    assert made(13) is not None and made(12, **skip) is not None
    assert made(13, attention_mask=torch.ones(1, 12).bool(), **skip) is not None
    causal = m.sliding_window_causal_mask_function(13)
    assert made(13, function=causal, **skip) is not None
    other = m.and_masks(m.bidirectional_mask_function, lambda b, h, q, k: k < 3)
    assert made(13, function=other, **skip) is not None


@pytest.mark.extras
def test_padding_that_reaches_the_tokens_is_refused(transformers):
    """Eager BLT gives a left-padded sequence other logits than the sequence alone, too."""
    from transformers.models.blt.configuration_blt import BltConfig

    config, mask = BltConfig(), torch.ones(2, 6, dtype=torch.bool)
    arguments = {"batch_size": 2, "q_length": 6, "kv_length": 6, "config": config}
    mask[0, 4:] = False
    assert interface(**arguments, attention_mask=mask) is not None
    with pytest.raises(NotImplementedError, match="padding behind the tokens .* got .* 'blt'"):
        interface(**arguments, attention_mask=mask.flip(1))


@pytest.mark.extras
def test_families_with_attention_of_their_own_are_refused(transformers):
    own = ("bloom", "mpt", "mpnet", "falcon", "xglm")
    assert not any(calls_the_interface(x) for x in own)
    assert all(calls_the_interface(x) for x in ("llama", "t5", "gpt_oss", "gemma2", "bert"))
    for kind in ("Mpt", "MPNet"):
        sizes = {
            "vocab_size": 31,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "d_model": 32,
            "n_layers": 1,
            "n_heads": 4,
            "num_attention_heads": 4,
        }
        config = getattr(transformers, f"{kind}Config")(**sizes, attn_implementation="entmax15")
        model = getattr(transformers, f"{kind}Model")(config)
        with pytest.raises(NotImplementedError, match=f"got .* '{kind.lower()}'"):
            model(batch())


@pytest.mark.extras
@pytest.mark.parametrize("per_head", [False, True])
def test_a_softmax_model_is_annealed(transformers, per_head, tmp_path):
    model = build(transformers, "llama", "entmax15").float().train()
    exact = build(transformers, "llama", "sdpa").float()
    alpha = torch.tensor([1.2, 1.4, 1.6, 2.0]) if per_head else 1.5
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    ids, rows = batch(), []
    with adasplash.entmax_anneal(model, 10, alpha, measure_every=5, log=rows.append) as anneal:
        assert_close(model(ids).logits, exact(ids).logits)  # alpha = 1 is what it was
        for _ in range(16):
            loss = model(ids, labels=ids).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            anneal.step(loss)
    assert rows == anneal.history and [x.step for x in rows] == [0, 5, 10, 15]
    mean = 1.55 if per_head else 1.5
    assert [round(x.alpha, 5) for x in rows] == [1.0, round((1 + mean) / 2, 5), mean, mean]
    assert rows[0].density == 1.0 and 0.05 < rows[2].density < rows[1].density < 1.0
    assert rows[-1].loss < rows[0].loss
    assert sorted(anneal.modules) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    before = len(anneal.history)
    model(ids)
    assert len(anneal.history) == before and not adasplash.huggingface.measuring
    model.save_pretrained(tmp_path)
    adasplash.save_entmax_alpha(model, tmp_path)
    found = model.model.layers[0].self_attn.entmax_alpha
    assert_close(torch.as_tensor(found).float(), torch.as_tensor(alpha).float())


@pytest.mark.extras
def test_an_annealing_that_cannot_be_is_refused(transformers):
    model = build(transformers, "llama", "entmax15")
    with pytest.raises(ValueError, match=r"`alpha` must be in \(1, 2\]"):
        adasplash.entmax_anneal(model, 10, 1.0)
    with pytest.raises(ValueError, match="`modules` must be names of the model's modules, got x"):
        adasplash.entmax_anneal(model, 10, modules=["x"])
    model.model.layers[0].self_attn.entmax_alpha = AlphaParameter(4)
    with pytest.raises(ValueError, match="must be no parameter"):
        adasplash.entmax_anneal(model, 10)
    with pytest.raises(ValueError, match="`model` must have a registered attn_implementation"):
        adasplash.entmax_anneal(build(transformers, "llama", "sdpa"), 10)
