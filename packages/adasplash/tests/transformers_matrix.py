"""Every folder of transformers' models that calls the attention interface, tiny, beside "eager"."""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from adasplash import register_transformers
from adasplash.huggingface import _watching

from .transformers_families import DEFAULT, EMPTY, FAMILIES, VOCABULARY, Family, N

NAME = "entmax_of_the_matrix"
COLUMNS = ("plain", "left", "right", "cached")
# What a cell may say of a model that ran.
SOUND = {"yes", "-", "refused"}
PARTS = (slice(0, 8), slice(8, None))
LARGEST = 12_000_000
# Sizes of a tiny model, by the names that configurations give them.
WIDTH, HEADS, LAYERS = 32, 4, 2
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "hidden_dim", "n_embed",
         "encoder_hidden_size", "decoder_hidden_size", "projection_dim", "embedding_size",
         "output_hidden_size", "out_hidden_size", "width", "text_embed_dim"), WIDTH),
    **dict.fromkeys(
        ("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner",
         "ffn_hidden_size", "moe_intermediate_size", "mlp_dim", "dense_intermediate_size",
         "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size",
         "decoder_intermediate_size", "encoder_intermediate_size", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers",
         "decoder_layers", "num_decoder_layers", "num_encoder_layers", "depth",
         "encoder_num_hidden_layers", "decoder_num_hidden_layers"), LAYERS),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
         "decoder_attention_heads", "encoder_num_attention_heads",
         "decoder_num_attention_heads"), HEADS),
    **dict.fromkeys(
        ("num_key_value_heads", "num_kv_heads", "encoder_num_key_value_heads",
         "decoder_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim", "attention_head_size"), 8),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_codebooks"), 1),
    **dict.fromkeys(("vocab_size", "text_vocab_size"), VOCABULARY),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_source_positions",
         "max_target_positions"), 64),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), 5),
    "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "index_topk": 4, "index_head_dim": 16, "index_n_heads": 2,
    "image_size": 32, "patch_size": 8, "num_channels": 3, "num_mel_bins": 16, "type_vocab_size": 2,
    "global_head_dim": 8, "shape_vocab_size": VOCABULARY, "pronunciation_vocab_size": VOCABULARY,
    "num_nextn_predict_layers": 0, "rotary_dim": 8, "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
}  # fmt: skip
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def folders() -> list[str]:
    """The folders whose code calls the interface."""
    import transformers

    models = Path(transformers.__file__).parent / "models"
    return sorted(
        folder.name
        for folder in models.iterdir()
        if any("ALL_ATTENTION_FUNCTIONS" in x.read_text() for x in folder.glob("modeling_*.py"))
    )


# Names that some configurations do not take: left out in turn until one can be built.
LEFT_OUT: tuple[tuple[str, ...], ...] = (
    (), ("head_dim",), ("layer_types",), ("head_dim", "layer_types"), ("rope",),
    ("hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads"),
)  # fmt: skip


def tiny(
    config_class: Any, left_out: tuple[str, ...] = (), sizes: Mapping[str, Any] = EMPTY
) -> Any:
    """The smallest configuration that keeps the kinds of layers of the default one.

    ``sizes`` are those of the family: what a name is, ``DEFAULT`` for what the class itself says,
    and for a part of the configuration the same again, unless it names its ``model_type``.
    """
    from transformers import PreTrainedConfig

    default = config_class()
    given: dict[str, Any] = {}

    def value_of(name: str) -> Any:
        if isinstance(getattr(config_class, name, None), property):
            return None
        try:
            return getattr(default, name, None)
        except Exception:  # a configuration may refuse to tell, in an error class of its own
            return None

    for name, size in {**SIZES, **IDS}.items():
        value = value_of(name)
        if isinstance(value, int) and not isinstance(value, bool) and name not in left_out:
            given[name] = size
        elif name in IDS and name in vars(default):
            given[name] = size
    if "qk_rope_head_dim" in given and "kv_lora_rank" in given:
        given.pop("head_dim", None)
        given["num_key_value_heads"] = HEADS
    of_class = getattr(config_class, "layer_types", None)  # a constant: kinds of something else
    kinds = None if isinstance(of_class, (list, tuple)) else value_of("layer_types")
    if isinstance(kinds, (list, tuple)) and kinds and "layer_types" not in left_out:
        kinds = list(dict.fromkeys(kinds))
        given["layer_types"] = kinds if len(kinds) > 1 else kinds * LAYERS
        given["num_hidden_layers"] = len(given["layer_types"])
    rope = value_of("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        given["rope_parameters"] = {**rope, "mrope_section": [2, 1, 1]}
    if "rope" in left_out and (isinstance(rope, dict) or hasattr(default, "rope_theta")):
        plain = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
        given["rope_parameters"] = plain
    for name in getattr(config_class, "sub_configs", {}):
        part, its = value_of(name), sizes.get(name, EMPTY)
        if (
            part is not None
            and isinstance(its, dict | MappingProxyType)
            and "model_type" not in its
        ):
            given[name] = tiny(type(part), left_out, its)
    given.update({
        x: size for x, size in sizes.items() if not isinstance(given.get(x), PreTrainedConfig)
    })  # fmt: skip
    return config_class(**{x: size for x, size in given.items() if size is not DEFAULT})


def classes(folder: str, named: str | None = None) -> list[tuple[Any, Any]]:
    """(model, configuration) classes of a folder, the most useful first, or the one named."""
    from transformers import PreTrainedConfig, PreTrainedModel

    found = []
    base = importlib.import_module(f"transformers.models.{folder}")
    for file in sorted(Path(base.__path__[0]).glob("modeling_*.py")):
        if "ALL_ATTENTION_FUNCTIONS" not in file.read_text():
            continue
        module = importlib.import_module(f"{base.__name__}.{file.stem}")
        for _, x in inspect.getmembers(module, inspect.isclass):
            if issubclass(x, PreTrainedModel) and x.__module__ == module.__name__:
                config = getattr(x, "config_class", None)
                if inspect.isclass(config) and issubclass(config, PreTrainedConfig):
                    found.append((x, config))
    if named is not None:
        return [x for x in found if x[0].__name__ == named]
    order = ("ForCausalLM$|LMHeadModel$", "ForConditionalGeneration$", "ForMaskedLM$", "TextModel$",
             "(?<!Pre)(?<!PreTrained)Model$", "Encoder$")  # fmt: skip
    ranked = [
        next((i for i, x in enumerate(order) if re.search(x, model.__name__)), None)
        for model, _ in found
    ]
    pairs = [(r, i) for i, r in enumerate(ranked) if r is not None]
    pairs = [(r, i) for r, i in pairs if not re.search("PreTrained", found[i][0].__name__)]
    return [found[i] for _, i in sorted(pairs)][:3]


def built(
    model_class: Any, config_class: Any, left_out: tuple[str, ...], family: Family
) -> torch.nn.Module:
    torch.manual_seed(0)
    config = tiny(config_class, left_out, family.sizes)
    with torch.device("meta"):
        n = sum(x.numel() for x in model_class._from_config(config).parameters())
    if n > LARGEST:
        raise ValueError(f"{n / 1e6:.0f} M parameters: its sizes have other names")
    model = model_class._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # large enough for attention to be far from uniform
        if parameter.dim() >= 2:
            noise = torch.randn(parameter.shape, generator=generator)
            n_inputs = parameter.shape[-1] if parameter.dim() < 4 else parameter[0].numel()
            parameter.data.copy_(noise * 1.5 / max(n_inputs, 1) ** 0.5)
    return model.float().eval()


def inputs(model: Any, family: Family) -> dict[str, Any]:
    if family.inputs is not None:
        return family.inputs()
    generator = torch.Generator().manual_seed(1)
    accepted = inspect.signature(model.forward).parameters
    config = model.config
    if "input_ids" in accepted:
        ids = torch.randint(3, VOCABULARY, (2, N), generator=generator)
        given = {"input_ids": ids}
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
            given["decoder_input_ids"] = ids.flip(1)[:, :N]
        return given
    if "pixel_values" in accepted:
        side = getattr(config, "image_size", 32)
        side = side if isinstance(side, int) else side[0]
        shape = (2, getattr(config, "num_channels", 3), side, side)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    for name, shape in (("input_values", (2, 800)), ("input_features", (2, 16, 64))):
        if name in accepted:
            return {name: torch.randn(shape, generator=generator)}
    raise TypeError(f"inputs: {', '.join(list(accepted)[:3])}")


def first(out: Any) -> Tensor:
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(out, name, None), Tensor):
            return out[name]
    found = tree_leaves(out.to_tuple())
    return next(x for x in found if isinstance(x, Tensor) and x.is_floating_point())


def call(model: Any, given: Mapping[str, Any], **more: Any) -> Any:
    """A forward pass; an input that is a function is made anew for each."""
    torch.manual_seed(0)  # some models draw random numbers in evaluation
    return model(**{name: x() if callable(x) else x for name, x in {**given, **more}.items()})


def padded(model: Any, given: Mapping[str, Any], side: str, length: int) -> Tensor:
    """The results at the tokens that are no padding; at all places where no mask says which."""
    mask = (torch.arange(length) >= torch.tensor([[length // 4], [0]])).long()
    mask = mask if side == "left" else mask.flip(1)
    result = call(model, given, attention_mask=mask)
    out, of_frames = first(result), getattr(result, "attention_mask", None)
    if isinstance(of_frames, Tensor) and of_frames.shape == out.shape[:2]:
        return out[of_frames.bool()]
    if "input_ids" in given and "decoder_input_ids" not in given:
        if out.dim() == 3 and out.shape[1] >= length:
            more = out.shape[1] - length  # tokens that the model puts behind
            out = out[torch.nn.functional.pad(mask, (0, more), value=1).bool()]
    return out


def length_of_mask(model: Any, given: Mapping[str, Any], family: Family) -> int | None:
    if "attention_mask" not in inspect.signature(model.forward).parameters:
        return None
    tokens = given.get("input_ids", given.get("input_values"))
    return family.length if family.length or tokens is None else tokens.shape[1]


def runs(model: Any, given: Mapping[str, Any], family: Family) -> dict[str, Tensor]:
    """Column -> results at the tokens that count."""
    found = {"plain": first(call(model, given))}
    length = length_of_mask(model, given, family)
    for side in ("left", "right"):
        if length is not None and side not in family.refused:
            found[side] = padded(model, given, side, length)
    name = "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"
    # transformers 5.24 calls the cache "cache", before it was "past_key_values"
    names = {"cache", "past_key_values"} & set(inspect.signature(model.forward).parameters)
    if name in given and names:
        along = {  # what has a part for each token
            x: value
            for x, value in given.items()
            if x == name or (name == "input_ids" and value.dim() > 1 and value.shape[1] == N)
        }
        head, tail = ({x: value[:, part] for x, value in along.items()} for part in PARTS)
        options = {"use_cache": True} if name == "input_ids" else {}  # an encoder may refuse it
        start = call(model, {**given, **head}, **options)
        for cache in names:
            if getattr(start, cache, None) is not None:
                rest = {**given, **tail, cache: getattr(start, cache)}
                found["cached"] = first(call(model, rest, **options))
    return found


@torch.no_grad()
def row(folder: str) -> dict[str, str]:
    """Column -> "yes", "-" (no such input), or what is wrong, and the model that ran."""
    reason, family = "no model class", FAMILIES.get(folder, Family())
    for (model_class, config_class), left_out in product(classes(folder, family.model), LEFT_OUT):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = built(model_class, config_class, left_out, family)
                model.set_attn_implementation(family.beside)
                given = inputs(model, family)
                exact = runs(model, given, family)
        except Exception as error:  # whatever a model's own code raises is a reason
            if reason == "no model class":
                reason = f"not built: {type(error).__name__}: {error}".replace("\n", " ")[:120]
            continue
        found = compared(model, given, exact, family)
        if not set(found.values()) <= SOUND:  # is it rounding that grows?
            found = in_float64(model, given, family) or found
        if "does not call" in found.get("reason", ""):
            reason = found["reason"]
            continue
        return {"reason": family.why, "folder": folder, "model": model_class.__name__, **found}
    return {"folder": folder, "model": "", "reason": reason}


def in_float64(model: Any, given: Mapping[str, Any], family: Family) -> dict[str, str] | None:
    """The same comparison in float64, of models that can."""
    model.set_attn_implementation(family.beside)
    given = tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, given
    )
    try:
        exact = runs(model.double(), given, family)
    except Exception:  # parts of it are made for fp32
        return None
    found = compared(model, given, exact, family)
    return None if "reason" in found else found


def compared(
    model: Any, given: Mapping[str, Any], exact: dict[str, Tensor], family: Family
) -> dict[str, str]:
    """Column -> "yes", "-", "refused" or the difference; or the reason why nothing ran."""
    calls: list[torch.nn.Module] = []
    _watching.append(calls)
    try:
        model.set_attn_implementation(NAME)
        found = runs(model, given, family)
    except (NotImplementedError, ValueError) as error:
        return {"reason": f"refused: {error}"[:150]}
    except Exception as error:
        return {"reason": f"fails: {type(error).__name__}: {error}".split("\n")[0][:150]}
    finally:
        _watching.remove(calls)
    if not calls:
        return {"reason": "this model does not call the function"}
    result = dict.fromkeys(COLUMNS, "-")
    for side in family.refused:
        try:
            padded(model, given, side, length_of_mask(model, given, family) or 0)
            result[side] = "not refused"
        except NotImplementedError:
            result[side] = "refused"
    for column in exact:
        a, b = exact[column].double(), found[column].double()
        error = float((a - b).abs().max() / a.abs().max().clamp(min=1.0))
        result[column] = "yes" if error < 1e-5 else f"{error:.0e}"
    return result


TABLE = Path(__file__).parents[3] / "docs" / "adasplash" / "transformers.md"
_HEAD = """# adasplash in transformers, family by family

Every folder of models of transformers {version} whose code calls the attention interface, as a
tiny random model on a CPU: `register_transformers(name, alpha=1.0)` beside `"eager"`, at the tokens
that are no padding, in float32 (in float64 where rounding grows on the way). "yes": equal to 1e-5
of the largest result. "-": the model has no such input. "refused": with NotImplementedError.
The columns: without padding, padded on the left, on the right (where a model reads sound, its
frames are), and continued from a cache. No row may hold a number: that would be a silent
difference. Of a folder with several models the one named ran, from the inputs that
`tests/transformers_matrix.py` and `tests/transformers_families.py` of the package make.

{passed} of {total} folders pass. The last column says what is refused, what could not be built
here, and where `"eager"` itself is wrong and `"sdpa"` is what was compared with.

| folder | model | {columns} | note |
|---|---|{rules}---|
"""


def written(rows: list[dict[str, str]]) -> str:
    """The page with one row for each folder."""
    import transformers

    head = _HEAD.format(
        version=transformers.__version__, columns=" | ".join(COLUMNS), rules="---|" * len(COLUMNS),
        passed=sum(x.get("plain") == "yes" for x in rows), total=len(rows),
    )  # fmt: skip
    lines = []
    for x in rows:
        reason = x.get("reason", "").replace("|", "/").replace("`", "'").strip()
        cells = [x["folder"], x["model"], *(x.get(c, "") for c in COLUMNS), reason]
        lines.append("| " + " | ".join(cells) + " |\n")
    return head + "".join(lines)


def read() -> dict[str, list[str]]:
    """Folder -> the cells of its row on the page."""
    rows = (x.strip("| \n").split(" | ") for x in TABLE.read_text().splitlines() if "| " in x)
    cells = {x[0]: [y.strip() for y in x] for x in rows}
    return {folder: x for folder, x in cells.items() if folder != "folder"}


if __name__ == "__main__":
    register_transformers(NAME, alpha=1.0)
    TABLE.write_text(written([row(folder) for folder in folders()]))
