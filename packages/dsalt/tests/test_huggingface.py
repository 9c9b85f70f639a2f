"""Hugging Face's own tools on the language model: files, generate, Trainer, TRL and peft."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
import torch

from dsalt.model import DSALTLMHeadModel
from shared_kernels.testing import assert_close

pytestmark = pytest.mark.extras
transformers = pytest.importorskip("transformers", reason="needs the optional transformers")
huggingface = pytest.importorskip("dsalt.huggingface")

SIZES = {"n_min": 2, "n_max": 6, "k_lmk": 2, "landmark_block": 4, "dropout": 0.0}


def plain(**options):
    torch.manual_seed(0)
    return DSALTLMHeadModel(40, 16, 2, 2, **{**SIZES, **options}).eval()


@pytest.fixture
def hf(tmp_path):
    plain().save_pretrained(tmp_path / "plain")
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()


def ids(B=2, N=17):
    return torch.randint(0, 40, (B, N), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_embeddings": True},
        {
            "d_ff": 24,
            "rope_factor": 4.0,
            "rope_length": 8,
            "alpha": 0.3,
            "n_kv_heads": 1,
            "bias": True,
        },
    ],
)
def test_files_are_shared_both_ways(tmp_path, options):
    ours = plain(**options)
    ours.save_pretrained(tmp_path / "ours")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(model) is huggingface.DSALTForCausalLM
    assert torch.equal(model(ids()).logits, ours(ids()).logits)
    model.save_pretrained(tmp_path / "theirs")
    back = DSALTLMHeadModel.from_pretrained(tmp_path / "theirs")
    assert back.config == ours.config
    assert torch.equal(back(ids()).logits, ours(ids()).logits)


def test_dtype_of_a_file_is_kept(tmp_path, hf):
    hf.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.bfloat16
    assert DSALTLMHeadModel.from_pretrained(tmp_path / "half").lm_head.weight.dtype is again.dtype


def test_a_new_model_is_drawn_as_ours_is():
    config = huggingface.DSALTConfig(vocab_size=40, d_model=64, n_layers=1, n_heads=2)
    model = huggingface.DSALTForCausalLM(config)
    assert 0.015 < model.embedding.weight.std() < 0.025
    attention = model.transformer.blocks[0].attention
    assert 0 < attention.window.proj.weight.std() < 0.03
    assert_close(attention.scorer.alpha, torch.full((2,), 0.6))


def test_loss_moves_the_labels_and_options_are_not_swallowed(hf):
    x = ids()
    assert_close(hf(x, labels=x).loss, plain()(x, labels=x, shift_labels=True).loss)
    assert_close(hf(inputs_embeds=hf.embedding(x)).logits, hf(x).logits)
    assert hf(x, logits_to_keep=3).logits.shape == (2, 3, 40)
    with pytest.raises(TypeError, match="output_attentions"):
        hf(x, output_attentions=True)
    with pytest.raises(ValueError, match="position_ids"):
        hf(x, position_ids=torch.arange(17).flip(0)[None])
    static = transformers.StaticCache(config=hf.config, max_cache_len=40)
    with pytest.raises(ValueError, match="DynamicCache"):
        hf(x, past_key_values=static, use_cache=True)


def test_a_cache_by_either_name(hf):
    """transformers 5.24 calls ``past_key_values`` ``cache``, and hands it over by that name."""
    x, whole = ids(), hf(ids(), use_cache=False).logits
    for name in ("past_key_values", "cache"):
        cache = transformers.DynamicCache(config=hf.config)
        hf(x[:, :9], use_cache=True, **{name: cache})
        assert cache.get_seq_length() == 9
        assert_close(hf(x[:, 9:], use_cache=True, **{name: cache}).logits, whole[:, 9:])
        out = hf.base_model(x[:, 9:], use_cache=True, **{name: hf(x[:, :9], use_cache=True)[1]})
        assert_close(hf.lm_head(out.last_hidden_state), whole[:, 9:])
    with pytest.raises(ValueError, match="`cache` must not come with `past_key_values`"):
        hf(x, cache=cache, past_key_values=cache)


def test_positions_that_begin_anew_are_packed_sequences(hf):
    x = ids(1)
    places = torch.cat((torch.arange(7), torch.arange(10)))[None]
    out = hf(x, position_ids=places).logits
    assert_close(out[:, :7], hf(x[:, :7]).logits)
    assert_close(out[:, 7:], hf(x[:, 7:]).logits)


@pytest.mark.parametrize("padded", [False, True])
def test_generate_is_ours(hf, padded):
    x, mask = ids(), torch.ones(2, 17, dtype=torch.long)
    mask[0, : 5 if padded else 0] = 0
    ours = plain().generate(x, 20, 0.0, attention_mask=mask)
    more = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(hf.generate(x, attention_mask=mask, **more), ours)
    cache = transformers.DynamicCache(config=hf.config)
    assert torch.equal(hf.generate(x, attention_mask=mask, past_key_values=cache, **more), ours)
    assert cache.get_seq_length() == 36


def test_beams_with_a_cache_are_those_without(hf):
    more = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    assert torch.equal(hf.generate(ids(), **more), hf.generate(ids(), use_cache=False, **more))


def rows(n=8):
    return [{"input_ids": x.tolist(), "labels": x.tolist()} for x in ids(n)]


def check_steps(trainer):
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    result = trainer.train()
    assert result.global_step == 2 and 0 < result.training_loss < 10
    moved = [n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])]
    assert moved
    return moved


def settings(kind, folder, **options):
    return kind(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        learning_rate=1e-2,
        use_cpu=True,
        save_strategy="steps",
        save_steps=2,
        **options,
    )


@pytest.mark.parametrize("recompute", [False, True])
def test_trainer_takes_two_steps(hf, tmp_path, recompute):
    arguments = settings(
        transformers.TrainingArguments,
        tmp_path / "run",
        gradient_checkpointing=recompute,
        gradient_accumulation_steps=2,
    )
    moved = check_steps(transformers.Trainer(hf, arguments, train_dataset=rows()))
    assert any("window.proj" in n for n in moved)
    saved = DSALTLMHeadModel.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert torch.equal(saved.lm_head.weight, hf.lm_head.weight)


def test_lora_takes_two_steps(hf, tmp_path):
    peft = pytest.importorskip("peft", reason="needs the optional peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(hf, config)
    arguments = settings(transformers.TrainingArguments, tmp_path / "run")
    moved = check_steps(transformers.Trainer(model, arguments, train_dataset=rows()))
    assert all("lora" in n for n in moved)
    merged = model.merge_and_unload().eval()
    assert_close(merged(ids()).logits, merged(ids()).logits)
    assert merged.generate(ids(), max_new_tokens=3).shape == (2, 20)


LETTERS = "abcdefghijklmnopqrstuvwxyz ."


def letters_tokenizer():
    tokenizers = pytest.importorskip("tokenizers", reason="needs the optional tokenizers")
    vocabulary = {letter: i for i, letter in enumerate([*LETTERS, "<eos>", "<pad>"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="."))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<eos>", pad_token="<pad>", unk_token="."
    )


def test_sft_takes_two_steps(hf, tmp_path):
    trl = pytest.importorskip("trl", reason="needs the optional trl")
    datasets = pytest.importorskip("datasets", reason="needs the optional datasets")
    tokenizer = letters_tokenizer()
    data = datasets.Dataset.from_dict({"text": ["the cat sat on a mat.", "a rat sat."] * 4})
    arguments = settings(trl.SFTConfig, tmp_path / "run", dataset_text_field="text", max_length=16)
    trainer = trl.SFTTrainer(
        model=hf, args=arguments, train_dataset=data, processing_class=tokenizer
    )
    check_steps(trainer)


def log_likelihood(text, before="<eos>"):
    """(sum of the log-probabilities of the text's letters after ``before``, all of them best)."""
    encode = letters_tokenizer().encode
    first, x = encode(before), encode(text)
    logits = plain()(torch.tensor([first + x])).logits.detach()
    log_p = logits[0, len(first) - 1 : -1].log_softmax(-1)
    found = log_p.gather(-1, torch.tensor(x)[:, None])[:, 0]
    return float(found.sum()), bool((found == log_p.amax(-1)).all())


def test_three_kinds_of_lm_eval_tasks(hf):
    """What lm_eval scores is what the model itself says of the same texts."""
    pytest.importorskip("lm_eval", reason="needs the optional lm_eval")
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    texts = ["the cat sat on a mat.", "a rat.", "no cat sat on this mat but a dog."]
    choices = ["a dog.", "a cat.", "the rat."]

    def documents(**_):
        rows = [{"text": text, "choices": choices, "label": 1} for text in texts]
        return {"test": datasets.Dataset.from_list(rows)}

    def task(name, **options):
        given = {"task": name, "custom_dataset": documents, "test_split": "test", **options}
        return ConfigurableTask(config=given)

    lm = HFLM(
        pretrained=hf, tokenizer=letters_tokenizer(), device="cpu", batch_size=2, max_length=64
    )
    until = {"until": ["."], "max_gen_toks": 6, "do_sample": False}
    tasks = [
        task(
            "choice",
            output_type="multiple_choice",
            doc_to_text="{{text}}",
            doc_to_choice="{{choices}}",
            doc_to_target="label",
            target_delimiter=" ",
        ),
        task(
            "continue",
            output_type="generate_until",
            doc_to_text="{{text}}",
            doc_to_target="",
            generation_kwargs=until,
        ),
        task(
            "rolling", output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}"
        ),
    ]
    found = simple_evaluate(lm, tasks=tasks, bootstrap_iters=0, log_samples=True)
    samples = {
        name: {row["doc"]["text"]: row["resps"] for row in rows}
        for name, rows in found["samples"].items()
    }
    for text in texts:
        for choice, (given,) in zip(choices, samples["choice"][text], strict=True):
            exact, is_best = log_likelihood(" " + choice, text)
            assert_close(torch.tensor(float(given[0])), torch.tensor(exact))
            assert str(given[1]) == str(is_best)
        exact, _ = log_likelihood(text)
        (given,) = samples["rolling"][text]
        given = given[0] if isinstance(given, (list, tuple)) else given
        assert_close(torch.tensor(float(given)), torch.tensor(exact))
        ids = torch.tensor([letters_tokenizer().encode(text)])
        ours = letters_tokenizer().decode(plain().generate(ids, 6, 0.0)[0, ids.shape[1] :])
        assert samples["continue"][text][0][0] == ours.split(".")[0]


def test_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testmod(huggingface, extraglobs={"torch": torch})
    assert tried > 3 and not failed
    page = Path(__file__).parents[1] / "README.md"
    (block,) = re.findall(r"^```py\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    exec(compile(block, "README: Hugging Face", "exec"), {})
    assert DSALTLMHeadModel.from_pretrained("my-hf-model").vocab_size == 100
