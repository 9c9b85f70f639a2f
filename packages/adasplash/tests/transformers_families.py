"""Sizes and inputs of tiny models of transformers, where their own defaults do not do."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

N = 12
VOCABULARY = 64
# What the class of a configuration says itself.
DEFAULT = object()
EMPTY: Mapping[str, Any] = MappingProxyType({})
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


class Family(NamedTuple):
    """How a folder's tiny model is made.

    Attributes:
        model: name of the class; by default the most useful one that can be built.
        sizes: of its configuration, in the place of the general ones.
        inputs: of its forward pass.
        length: of the mask of padding, where it is not that of the ids or of the sound.
        refused: the sides on which padding is refused.
        beside: the attention function that is right where "eager" is not.
        why: what the reader of the page should know.
    """

    model: str | None = None
    sizes: Mapping[str, Any] = EMPTY
    inputs: Callable[[], dict[str, Any]] | None = None
    length: int | None = None
    refused: tuple[str, ...] = ()
    beside: str = "eager"
    why: str = ""


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def ids(n: int = N, batch: int = 2, highest: int = VOCABULARY) -> Tensor:
    return torch.randint(3, highest, (batch, n), generator=torch.Generator().manual_seed(n))


def _pixels(*shape: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": noise(*(shape or (2, 3, 32, 32)))}


def _session(folder: str) -> Any:
    """A video of two pictures with a point in the first."""
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    [kind] = [x for name, x in vars(module).items() if name.endswith("InferenceSession")]
    session = kind(video=noise(2, 3, 64, 64), video_height=64, video_width=64, dtype=torch.float32)
    session.obj_id_to_idx(1)
    points = {
        "point_coords": torch.full((1, 1, 1, 2), 20.0),
        "point_labels": torch.ones(1, 1, 1).int(),
    }
    session.add_point_inputs(0, 0, points)
    session.obj_with_new_inputs = [1]
    return session


# Gemma 4 is tested with narrow heads.
_NARROW = {"global_head_dim": 8}
_WIDE = "with heads of 512 numbers, as published: refused, at most 256"

_BOOLEAN = '"eager" adds the boolean mask of its speech encoder to the scores: beside "sdpa"'
_LEAKS = "tokens of padding that come first change the others, in eager, too"
_ADDED = '"eager" reads its additive mask the other way round: beside "sdpa"'

# Backbones of a few thousand weights for models that find objects.
_DETECTOR: dict[str, Any] = {
    "num_queries": 8, "encoder_in_channels": (16, 24, 32), "encoder_hidden_dim": 32,
    "decoder_in_channels": (32, 32, 32),
}  # fmt: skip
_RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32],
           "depths": [1, 1, 1, 1], "out_features": ["stage2", "stage3", "stage4"]}  # fmt: skip

# fmt: off
FAMILIES: dict[str, Family] = {
    "audio_spectrogram_transformer": Family(sizes={"max_length": 64, "num_mel_bins": 16},
        inputs=lambda: {"input_values": noise(2, 64, 16)}, length=8),
    "bamba": Family(sizes={"layer_types": DEFAULT, "attn_layer_indices": [1],
        "num_hidden_layers": 2, "mamba_n_heads": 4, "mamba_d_state": 8}),
    "blip_2": Family("Blip2ForConditionalGeneration", {"num_query_tokens": 4,
        "image_token_index": 63, "text_config": {"word_embed_proj_dim": 32}},
        lambda: {**_pixels()(), "input_ids": torch.cat((torch.full((2, 4), 63), ids(8,
        highest=60)), 1)}),
    "blt": Family(sizes={"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3,
        4], "num_hidden_layers": 2, "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32}}, refused=("left",), why=_LEAKS),
    "canary": Family(sizes={"encoder_config": {"subsampling_conv_channels": 8,
        "num_mel_bins": 16}}, inputs=lambda: {"input_features": noise(2, 64, 16),
        "decoder_input_ids": ids()}, length=64),
    "chameleon": Family(sizes={"vocabulary_map": {"<image>": 5}, "vq_config": {"base_channels": 32,
        "num_embeddings": 8}}),
    "cohere_asr": Family(sizes={"encoder_config": {"subsampling_conv_channels": 8,
        "num_mel_bins": 16}}, inputs=lambda: {"input_features": noise(2, 64, 16),
        "decoder_input_ids": ids()}, length=64),
    "cohere_compass": Family(sizes={"rope_parameters": {"full_attention": _ROPE,
        "sliding_attention": _ROPE}}),
    "conditional_detr": Family(sizes={"backbone_config": _RESNET}),
    "csm": Family("CsmBackboneModel", sizes={"num_codebooks": 4, "codebook_size": 64},
        inputs=lambda: {"input_ids": ids(4 * N).view(2, N, 4)}),
    "d_fine": Family(sizes={"backbone_config": _RESNET, **_DETECTOR}),
    "dbrx": Family(sizes={"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "num_key_value_heads": DEFAULT, "ffn_config": {"moe_top_k": 2}}),
    "deepseek_ocr2": Family(sizes={"text_config": {"mlp_layer_types": ["dense", "sparse"],
        "num_experts_per_tok": 2, "n_group": DEFAULT, "topk_group": DEFAULT}}),
    "deepseek_v2": Family(sizes={"num_experts_per_tok": 2}),
    "deformable_detr": Family(sizes={"backbone_config": _RESNET}),
    "deimv2": Family(sizes={"backbone_config": _RESNET, **_DETECTOR}, inputs=_pixels(2, 3, 64,
        64)),
    "detr": Family(sizes={"backbone_config": _RESNET}),
    "diffusion_gemma": Family("DiffusionGemmaEncoderTextModel", {"num_experts": 4,
        "top_k_experts": 2, "moe_intermediate_size": 16, **_NARROW}, why=_WIDE),
    "dots1": Family(sizes={"n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_shared_experts": 1}),
    "dots3_note": Family(sizes={"shared_experts_intermediate_size": 48,
        "mlp_layer_types": ["dense", "sparse"], "rope_parameters": {"indexed_attention": _ROPE,
        "sliding_attention": _ROPE}, "kv_lora_rank": 16, "num_key_value_heads": 4,
        "num_attention_heads": 4, "v_head_dim": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}),
    "edgetam": Family("EdgeTamModel", {"vision_config": {"backbone_channel_list": [32, 24, 16, 8],
        "fpn_hidden_size": 32, "backbone_config": {**_RESNET, "out_features": ["stage1", "stage2",
        "stage3", "stage4"]}, "backbone_feature_sizes": [[8, 8], [4, 4], [2, 2]]},
        "prompt_encoder_config": {"hidden_size": 32, "image_size": 32, "patch_size": 16},
        "mask_decoder_config": {"iou_head_hidden_dim": 32}}, lambda: {"image_embeddings": [noise(2,
        4, 8, 8), noise(2, 8, 4, 4), noise(2, 32, 2, 2)], "input_points": 16 * noise(2, 1, 2,
        2).abs()}),
    "edgetam_video": Family(sizes={"image_size": 64, "memory_attention_hidden_size": 32,
        "memory_attention_mlp_hidden_size": 48, "memory_attention_num_layers": 1,
        "memory_attention_rope_feat_sizes": [4, 4], "memory_attention_rope_k_sizes": [2, 2],
        "memory_encoder_hidden_size": 32, "memory_encoder_output_channels": 16,
        "mask_downsampler_embed_dim": 32, "memory_fuser_embed_dim": 32,
        "memory_fuser_intermediate_dim": 48, "memory_fuser_num_layers": 1,
        "perceiver_resampler_num_latents": 4, "perceiver_resampler_num_latents_2d": 4,
        "perceiver_resampler_hidden_size": 16, "perceiver_resampler_mlp_intermediate_size": 32,
        "perceiver_resampler_attention_head_dim": 16, "perceiver_resampler_num_layers": 1,
        "vision_config": {"backbone_channel_list": [64, 48, 32, 16],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "fpn_hidden_size": 32,
        "backbone_config": {"hidden_size": 16, "image_size": [64, 64], "num_attention_heads": 1,
        "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [16, 32, 48, 64],
        "num_attention_heads_per_stage": [1, 2, 2, 4], "window_size_per_stage": [4, 4, 2, 2],
        "global_attention_blocks": [3], "window_positional_embedding_background_size": [4, 4]}},
        "prompt_encoder_config": {"image_size": 64, "patch_size": 16},
        "mask_decoder_config": {"iou_head_hidden_dim": 32}},
        inputs=lambda: {"inference_session": partial(_session, "edgetam_video"), "frame_idx": 0}),
    "efficientloftr": Family(sizes={"stage_num_blocks": [1, 1, 1, 1], "out_features": [16, 16, 24,
        32], "hidden_size": 32, "num_attention_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "rope_parameters": {**_ROPE, "partial_rotary_factor": 2.0}},
        inputs=lambda: {"pixel_values": noise(1, 2, 3, 64, 64)}),
    "embedding_gemma2": Family(sizes=_NARROW, why=_WIDE),
    "eomt": Family("EomtForUniversalSegmentation", {"num_queries": 5, "num_blocks": 1}),
    "eomt_dinov3": Family("EomtDinov3ForUniversalSegmentation", {"num_queries": 5,
        "num_blocks": 1}),
    "ernie4_5_vl_moe": Family(sizes={"text_config": {"rope_parameters": {**_ROPE,
        "mrope_section": [1, 1, 2]}, "moe_intermediate_size": [16, 16],
        "mlp_layer_types": ["dense", "sparse"]}}),
    "esm": Family(sizes={"vocab_size": VOCABULARY, "mask_token_id": 3,
        "position_embedding_type": "rotary"}),
    "esmc": Family(sizes={"num_key_value_heads": 4, "mask_token_id": 32}),
    "florence2": Family(sizes={"vision_config": {"depths": (1, 1), "embed_dim": (8, 16),
        "num_heads": (2, 2), "num_groups": (2, 2), "patch_size": (7, 3), "patch_stride": (4, 2),
        "patch_padding": (3, 1), "patch_prenorm": (False, True)}}),
    "fun_asr_nano": Family(sizes={"adaptor_config": {"intermediate_size": 8}}),
    "gemma4": Family(sizes=_NARROW, why=_WIDE),
    "gemma4_unified": Family(sizes=_NARROW, why=_WIDE),
    "glm4v_moe": Family(sizes={"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1,
        1]}, "head_dim": 16}}),
    "glm5_next": Family(sizes={"text_config": {"index_kpool": 2, "qk_rope_head_dim": 0,
        "linear_num_heads": 4, "linear_head_dim": 8, "layer_types": ["linear_attention",
        "indexed_attention"], "mlp_layer_types": ["dense", "sparse"], "indexer_types": ["full",
        "full"]}}),
    "gradium_phonon_tts": Family(sizes={"flow_head_config": {"condition_dim": 32}}),
    "granite_speech5": Family(sizes={"context_size": 16, "num_key_value_heads": 4},
        inputs=lambda: {"input_features": noise(2, 64, 64)}, length=64),
    "granitemoehybrid": Family(sizes={"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_head": 16,
        "shared_intermediate_size": 32, "layer_types": ["linear_attention", "full_attention"]}),
    "hunyuan_v1_dense": Family(sizes={"rope_parameters": _ROPE, "head_dim": 8}),
    "hunyuan_v1_moe": Family(sizes={"rope_parameters": _ROPE, "head_dim": 8, "moe_topk": 1}),
    "hunyuan_vl": Family(sizes={"text_config": {"head_dim": 8}}),
    "idefics": Family(sizes={"additional_vocab_size": 4, "use_resampler": True,
        "perceiver_config": {"use_resampler": True, "resampler_n_latents": 4, "resampler_depth": 1,
        "resampler_n_heads": 2, "resampler_head_dim": 8}}, inputs=lambda: {"input_ids": ids(),
        "pixel_values": noise(2, 1, 3, 32, 32), "image_attention_mask": torch.ones(2, N, 1)}),
    "informer": Family(sizes={"prediction_length": 6, "context_length": 12, "lags_sequence": [1,
        2], "num_time_features": 1}, inputs=lambda: {"past_values": noise(2, 14),
        "past_time_features": noise(2, 14, 1), "past_observed_mask": torch.ones(2, 14),
        "future_values": noise(2, 6), "future_time_features": noise(2, 6, 1)}),
    "jamba": Family(sizes={"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8}),
    "kyutai_speech_to_text": Family(sizes={"codebook_vocab_size": 64, "num_codebooks": 3,
        "audio_pad_token_id": 70, "codec_config": {"upsample_groups": 32, "num_filters": 4,
        "upsampling_ratios": [2, 2], "codebook_dim": 8, "vector_quantization_hidden_dimension": 8,
        "codebook_size": 16}, "bos_token_id": 65}, inputs=lambda: {"input_ids": ids(4 * N).view(2,
        N, 4)}),
    "lasr": Family(sizes={"subsampling_conv_channels": 8},
        inputs=lambda: {"input_features": noise(2, 64, 16)}, length=64),
    "lfm2_moe": Family(sizes={"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "lightglue": Family("LightGlueForKeypointMatching", inputs=lambda: {"pixel_values": noise(1, 2,
        3, 32, 32)}),
    "longcat_flash": Family(sizes={"head_dim": 8}),
    "lw_detr": Family(sizes={"num_queries": 8, "group_detr": 2, "d_model": 32,
        "projector_scale_factors": [1.0, 0.5], "decoder_self_attention_heads": 4,
        "decoder_cross_attention_heads": 4, "backbone_config": {"image_size": 64,
        "pretrain_image_size": 64, "num_windows": 4, "num_hidden_layers": 4,
        "window_block_indices": [0, 2], "out_features": ["stage2", "stage4"]}}, inputs=_pixels(2,
        3, 64, 64)),
    "maskformer": Family(sizes={"fpn_feature_size": 32, "mask_feature_size": 32,
        "backbone_config": {"model_type": "swin", "embed_dim": 8, "depths": [1, 1, 1, 1],
        "num_heads": [2, 2, 2, 2], "window_size": 4, "image_size": 64, "out_features": ["stage1",
        "stage2", "stage3", "stage4"]}, "decoder_config": {"model_type": "detr", "d_model": 32,
        "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 8}},
        inputs=_pixels(2, 3, 64, 64)),
    "mimi": Family("MimiModel", {"upsample_groups": 32, "num_filters": 4, "upsampling_ratios": [2,
        2], "codebook_dim": 8, "vector_quantization_hidden_dimension": 8, "codebook_size": 16,
        "num_quantizers": 4}, lambda: {"input_values": noise(2, 1, 160)}),
    "ministral": Family(sizes={"head_dim": 8}),
    "moonshine": Family(sizes={"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
        inputs=lambda: {"input_values": noise(2, 4000), "decoder_input_ids": ids()}),
    "muse_glimmer_assistant": Family(sizes={"target_layer_ids": [0, 1], "block_size": 4,
        "layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2},
        inputs=lambda: {"noise_embeds": noise(2, 4, 32), "context_hidden_states": noise(2, 8, 64)},
        length=12),
    "muse_spark": Family("MuseSparkTextModel", {"moe_hidden_size": 32,
        "layer_types": ["sliding_attention", "full_attention"], "layer_rope_theta": [500000.0, 0],
        "mlp_layer_types": ["dense", "sparse"]}),
    "nemotron": Family(sizes={"num_key_value_heads": 2}),
    "nemotron3_5_transcribe": Family("Nemotron3_5TranscribeAsrAudioModel",
        {"num_key_value_heads": 4}, lambda: {"input_features": noise(2, 64, 16)}, length=64),
    "nemotron3_diarization": Family("Nemotron3DiarizationAudioModel",
        inputs=lambda: {"input_features": noise(2, 64, 16)}, length=64),
    "nemotron_asr_streaming": Family(sizes={"subsampling_conv_channels": 8},
        inputs=lambda: {"input_features": noise(2, 64, 16)}, length=64, beside="sdpa", why=_ADDED),
    "neucodec": Family(sizes={"encoder_hidden_size": 4, "quantization_dim": 64,
        "num_key_value_heads": 4, "semantic_model_config": {"feature_projection_input_dim": 16}},
        inputs=lambda: {"input_values": noise(1, 1, 640), "input_features": noise(1, 2, 16)}),
    "parakeet": Family(sizes={"subsampling_conv_channels": 8},
        inputs=lambda: {"input_features": noise(2, 64, 16)}, length=64),
    "patchtsmixer": Family(sizes={"self_attn": True, "d_model": 32, "self_attn_heads": 4},
        inputs=lambda: {"past_values": noise(2, 32, 1)}),
    "patchtst": Family(sizes={"do_mask_input": False}, inputs=lambda: {"past_values": noise(2, 32,
        1)}),
    "pe_audio": Family("PeAudioEncoder", {"dac_config": {"encoder_hidden_size": 4,
        "downsampling_ratios": [2, 2], "upsampling_ratios": [2, 2], "decoder_hidden_size": 16,
        "codebook_dim": 8}}, lambda: {"input_values": noise(2, 1, 64)}),
    "phi4_multimodal": Family(sizes={"pad_token_id": 0, "audio_config": {"num_blocks": 1,
        "nemo_conv_channels": 8, "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32,
        "input_size": 16, "audio_token_id": 62, "nemo_final_size": 2},
        "vision_config": {"crop_size": 32, "image_token_id": 63}}),
    "pix2struct": Family(sizes={"text_config": {"use_cache": True},
        "vision_config": {"patch_embed_hidden_size": 48, "seq_len": 16}},
        inputs=lambda: {"flattened_patches": torch.cat((torch.arange(32).view(2, 16, 1).expand(2,
        16, 2) % 4, noise(2, 16, 48)), -1), "decoder_input_ids": ids()}, length=16),
    "pocket_tts": Family(sizes={"flow_head_config": {"condition_dim": 32}}),
    "pocket_tts_audio_tokenizer": Family("PocketTTSAudioTokenizerModel", {"upsample_groups": 32,
        "num_filters": 4, "upsampling_ratios": [2, 2], "latent_stride": 4, "latent_dim": 8},
        lambda: {"input_values": noise(2, 1, 160)}),
    "pp_doclayout_v2": Family(sizes={"layer_types": DEFAULT, "backbone_config": _RESNET,
        **_DETECTOR}, inputs=_pixels(2, 3, 64, 64)),
    "pp_doclayout_v3": Family(sizes={"layer_types": DEFAULT, "backbone_config": {**_RESNET,
        "out_features": ["stage1", "stage2", "stage3", "stage4"]}, **_DETECTOR, "x4_feat_dim": 8},
        inputs=_pixels(2, 3, 64, 64)),
    "pp_doclayout_v4": Family(sizes={"backbone_config": _RESNET, **_DETECTOR}, inputs=_pixels(2, 3,
        64, 64)),
    "pp_ocrv5_mobile_rec": Family("PPOCRV5MobileRecEncoderWithSVTR", {"hidden_size": 32},
        lambda: {"hidden_states": noise(2, 512, 1, 8)}),
    "pp_ocrv5_server_rec": Family("PPOCRV5ServerRecEncoderWithSVTR",
        inputs=lambda: {"hidden_states": noise(2, 2048, 1, 8)}),
    "pp_ocrv6_small_rec": Family("PPOCRV6SmallRecEncoderWithSVTR",
        inputs=lambda: {"hidden_states": noise(2, 384, 1, 8)}),
    "qwen2_5_omni": Family("Qwen2_5OmniThinkerForConditionalGeneration",
        {"vision_start_token_id": 63, "text_config": {"rope_parameters": {**_ROPE,
        "mrope_section": [2, 1, 1]}}}),
    "qwen3_omni_moe": Family("Qwen3OmniMoeThinkerForConditionalGeneration",
        {"vision_start_token_id": 63}),
    "qwen4_exp": Family(sizes={"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
        "indexer_budget": 4, "indexer_compress_ratio": 2, "ngram_vocab_size_base": 64,
        "split_ngram_parts": 1, "hc_lowrank": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "output_gate_type": "sigmoid", "layer_types": ["linear_attention", "indexed_attention"]}),
    "recurrent_gemma": Family(sizes={"layer_types": DEFAULT, "num_hidden_layers": 3,
        "lru_width": 32, "head_dim": DEFAULT}),
    "rf_detr": Family(sizes={"num_queries": 8, "group_detr": 2, "d_model": 32,
        "decoder_self_attention_heads": 4, "decoder_cross_attention_heads": 4,
        "backbone_config": {"image_size": 64, "patch_size": 8, "num_windows": 2,
        "num_hidden_layers": 4, "out_features": ["stage2", "stage4"]}}, inputs=_pixels(2, 3, 64,
        64)),
    "rt_detr": Family(sizes={"layer_types": DEFAULT, "backbone_config": {"embedding_size": 8,
        "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic",
        "layer_types": DEFAULT, "num_hidden_layers": DEFAULT, "out_features": ["stage2", "stage3",
        "stage4"]}, **_DETECTOR}, inputs=_pixels(2, 3, 64, 64)),
    "rt_detr_v2": Family(sizes={"layer_types": DEFAULT, "backbone_config": {"embedding_size": 8,
        "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic",
        "layer_types": DEFAULT, "num_hidden_layers": DEFAULT, "out_features": ["stage2", "stage3",
        "stage4"]}, **_DETECTOR}, inputs=_pixels(2, 3, 64, 64)),
    "sam": Family("SamModel", {"prompt_encoder_config": {"hidden_size": 32},
        "vision_config": {"output_channels": 32, "window_size": 2, "global_attn_indexes": (1,),
        "num_pos_feats": 16}}, lambda: {**_pixels()(), "input_points": 16 * noise(2, 1, 2,
        2).abs()}),
    "sam2": Family("Sam2VisionModel", {"backbone_channel_list": [32, 16],
        "backbone_feature_sizes": [[16, 16], [8, 8]], "fpn_hidden_size": 16,
        "fpn_top_down_levels": [0, 1], "num_feature_levels": 2,
        "backbone_config": {"hidden_size": 16, "image_size": [64, 64], "num_attention_heads": 1,
        "num_query_pool_stages": 1, "blocks_per_stage": [1, 2], "embed_dim_per_stage": [16, 32],
        "num_attention_heads_per_stage": [1, 2], "window_size_per_stage": [4, 4],
        "global_attention_blocks": [2], "window_positional_embedding_background_size": [4, 4]}},
        _pixels(2, 3, 64, 64)),
    "sam2_video": Family(sizes={"image_size": 64, "memory_attention_hidden_size": 32,
        "memory_attention_feed_forward_hidden_size": 48, "memory_attention_num_layers": 1,
        "memory_attention_rope_feat_sizes": [4, 4], "memory_encoder_hidden_size": 32,
        "memory_encoder_output_channels": 16, "mask_downsampler_embed_dim": 32,
        "memory_fuser_embed_dim": 32, "memory_fuser_intermediate_dim": 48,
        "memory_fuser_num_layers": 1, "vision_config": {"backbone_channel_list": [64, 48, 32, 16],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "fpn_hidden_size": 32,
        "backbone_config": {"hidden_size": 16, "image_size": [64, 64], "num_attention_heads": 1,
        "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [16, 32, 48, 64],
        "num_attention_heads_per_stage": [1, 2, 2, 4], "window_size_per_stage": [4, 4, 2, 2],
        "global_attention_blocks": [3], "window_positional_embedding_background_size": [4, 4]}},
        "prompt_encoder_config": {"image_size": 64, "patch_size": 16},
        "mask_decoder_config": {"iou_head_hidden_dim": 32}},
        inputs=lambda: {"inference_session": partial(_session, "sam2_video"), "frame_idx": 0}),
    "sam3_lite_text": Family("Sam3LiteTextModel", {"vision_config": {"fpn_hidden_size": 32,
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "backbone_config": {"window_size": 2,
        "global_attn_indexes": [0], "num_hidden_layers": 1, "pretrain_image_size": 32}},
        "detr_decoder_config": {"num_queries": 8, "num_layers": 1},
        "geometry_encoder_config": {"num_layers": 1}, "detr_encoder_config": {"num_layers": 1},
        "text_config": {"num_hidden_layers": 1}}, lambda: {**_pixels()(), "input_ids": ids()}),
    "sam3_tracker": Family(sizes={"vision_config": {"fpn_hidden_size": 32,
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "backbone_config": {"window_size": 2,
        "global_attn_indexes": [1], "pretrain_image_size": 32}},
        "mask_decoder_config": {"iou_head_hidden_dim": 32}}, inputs=lambda: {**_pixels()(),
        "input_points": 16 * noise(2, 1, 2, 2).abs()}),
    "sam3_tracker_video": Family(sizes={"image_size": 64, "memory_attention_hidden_size": 32,
        "memory_attention_feed_forward_hidden_size": 48, "memory_attention_num_layers": 1,
        "memory_attention_rope_feat_sizes": [8, 8], "memory_encoder_hidden_size": 32,
        "memory_encoder_output_channels": 16, "mask_downsampler_embed_dim": 32,
        "mask_downsampler_total_stride": 16, "memory_fuser_embed_dim": 32,
        "memory_fuser_intermediate_dim": 48, "memory_fuser_num_layers": 1,
        "vision_config": {"fpn_hidden_size": 32, "backbone_feature_sizes": [[32, 32], [16, 16], [8,
        8]], "backbone_config": {"image_size": 64, "window_size": 2, "global_attn_indexes": [1],
        "pretrain_image_size": 64}}, "prompt_encoder_config": {"image_size": 64, "patch_size": 8},
        "mask_decoder_config": {"iou_head_hidden_dim": 32}},
        inputs=lambda: {"inference_session": partial(_session, "sam3_tracker_video"),
        "frame_idx": 0}),
    "sam_hq": Family("SamHQModel", {"prompt_encoder_config": {"hidden_size": 32},
        "mask_decoder_config": {"vit_dim": 32}, "vision_config": {"output_channels": 32,
        "window_size": 2, "global_attn_indexes": (1,), "num_pos_feats": 16}},
        lambda: {**_pixels()(), "input_points": 16 * noise(2, 1, 2, 2).abs()}),
    "seamless_m4t": Family("SeamlessM4TForSpeechToText", {"feature_projection_input_dim": 16,
        "num_conv_pos_embeddings": 8, "speech_encoder_layers": 2,
        "speech_encoder_attention_heads": 4, "speech_encoder_intermediate_size": 48,
        "max_source_positions": 64}, lambda: {"input_features": noise(2, 32, 16),
        "decoder_input_ids": ids()}, length=32),
    "seamless_m4t_v2": Family("SeamlessM4Tv2ForSpeechToText", {"feature_projection_input_dim": 16,
        "num_conv_pos_embeddings": 8, "speech_encoder_layers": 2,
        "speech_encoder_attention_heads": 4, "speech_encoder_intermediate_size": 48,
        "max_source_positions": 64, "speech_encoder_chunk_size": 12},
        lambda: {"input_features": noise(2, 32, 16), "decoder_input_ids": ids()}, length=32,
        beside="sdpa", why=_BOOLEAN),
    "speech_to_text": Family(sizes={"conv_channels": 32, "input_feat_per_channel": 16},
        inputs=lambda: {"input_features": noise(2, 64, 16), "decoder_input_ids": ids()},
        length=64),
    "step3p7": Family(sizes={"text_config": {"sliding_window": 5, "layer_types": ["full_attention",
        "sliding_attention"], "rope_parameters": {"full_attention": _ROPE,
        "sliding_attention": _ROPE}, "mlp_layer_types": ["dense", "sparse"],
        "num_sliding_attention_heads": 4, "share_expert_dim": 16}}),
    "switch_transformers": Family("SwitchTransformersForConditionalGeneration"),
    "swin": Family(sizes={"embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "window_size": 2,
        "patch_size": 4, "hidden_size": DEFAULT, "num_hidden_layers": DEFAULT,
        "num_attention_heads": DEFAULT}),
    "time_series_transformer": Family(sizes={"prediction_length": 6, "context_length": 12,
        "lags_sequence": [1, 2], "num_time_features": 1}, inputs=lambda: {"past_values": noise(2,
        14), "past_time_features": noise(2, 14, 1), "past_observed_mask": torch.ones(2, 14),
        "future_values": noise(2, 6), "future_time_features": noise(2, 6, 1)}),
    "timesfm": Family(sizes={"patch_length": 8, "context_length": 64, "horizon_length": 8},
        inputs=lambda: {"past_values": noise(2, 64), "past_values_padding": torch.zeros(2, 64),
        "freq": torch.zeros(2, 1, dtype=torch.int64)}),
    "timesfm2_5": Family(sizes={"patch_length": 8, "context_length": 64, "horizon_length": 8,
        "output_quantile_len": 8}, inputs=lambda: {"past_values": noise(2, 64),
        "past_values_padding": torch.zeros(2, 64)}),
    "udop": Family(sizes={"max_2d_position_embeddings": 32}, inputs=lambda: {"input_ids": ids(),
        "bbox": torch.rand(2, N, 4), "decoder_input_ids": ids()}),
    "unlimited_ocr": Family(sizes={"text_config": {"num_key_value_heads": 4,
        "mlp_layer_types": ["dense", "sparse"], "num_hidden_layers": 2}}),
    "videomae": Family(sizes={"num_frames": 4}, inputs=_pixels(2, 4, 3, 32, 32)),
    "videomt": Family("VideomtForUniversalSegmentation", {"num_queries": 5, "num_blocks": 1},
        lambda: {"pixel_values_videos": noise(1, 2, 3, 32, 32)}),
    "vitpose_backbone": Family("VitPoseBackbone", {"part_features": 8, "image_size": (32, 32),
        "patch_size": (8, 8), "num_experts": 1}, _pixels()),
    "vivit": Family(sizes={"num_frames": 4, "tubelet_size": (2, 8, 8)}, inputs=_pixels(2, 4, 3, 32,
        32)),
    "vjepa2": Family(sizes={"crop_size": 32, "frames_per_clip": 4, "patch_size": 8,
        "pred_hidden_size": 48, "pred_num_hidden_layers": 2, "pred_num_attention_heads": 4},
        inputs=lambda: {"pixel_values_videos": noise(2, 4, 3, 32, 32)}),
    "voxtral_realtime": Family("VoxtralRealtimeTextModel", inputs=lambda: {"input_ids": ids(),
        "t_cond": noise(1, 1, 32)}),
    "wav2vec2_bert": Family(sizes={"feature_projection_input_dim": 16},
        inputs=lambda: {"input_features": noise(2, 32, 16)}, length=32),
    "xcodec2": Family(sizes={"encoder_hidden_size": 4, "quantization_dim": 64,
        "num_key_value_heads": 4, "semantic_model_config": {"feature_projection_input_dim": 16}},
        inputs=lambda: {"input_values": noise(1, 1, 640), "input_features": noise(1, 2, 16)}),
    "xmod": Family(sizes={"default_language": "en_XX"}),
    "zamba": Family(sizes={"layers_block_type": DEFAULT, "layer_types": DEFAULT,
        "num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2,
        "attention_hidden_size": 64, "attention_head_dim": 16, "mamba_dt_rank": 8,
        "num_key_value_heads": 4}),
    "zamba2": Family(sizes={"layers_block_type": ["linear_attention", "hybrid", "linear_attention",
        "hybrid"], "num_hidden_layers": 4, "mamba_headdim": 8, "mamba_d_state": 8,
        "adapter_rank": 4}),
    "zaya": Family(sizes={"num_experts_per_tok": 1, "router_hidden_size": 16,
        "layer_types": ["hybrid", "hybrid"]}),
}
# fmt: on
