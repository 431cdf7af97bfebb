"""A tiny random model of any class of transformers: its default config, with the numbers shrunk by name."""

import copy
import dataclasses
import re
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig


class NotBuilt(Exception):
    """Why there is no tiny one of a class."""


VOCABULARY = 384
WINDOW = 16
# The first pattern that a field's whole name matches gives its value; `None` leaves the default
SIZES: list[tuple[str, Any]] = [
    (r"pad_token_id", 0),
    (r"bos_token_id|decoder_start_token_id", 1),
    (r"eos_token_id", 3),
    (r"(?!n_layer$).*_layer", None),
    (r"base_channels|latent_channels|num_embeddings", 32),
    (r"adapter_in_dim|adapter_out_dim|adapter_input_size", 32),
    (r"type_vocab_size|.*token_id.*|.*_index|.*_id", None),
    (r".*vocab_size.*|.*vocab_size_base", VOCABULARY),
    (r"n_positions|n_ctx|.*max_(position|seq|source|target|2d_position).*|context_length|max_.*_positions", 512),
    (r"sliding_window(_size)?|attention_chunk_size|.*window_size|local_attention|keep_window_size", WINDOW),
    (r"rel_extent|local_attention_window_len|n_local_ctx", WINDOW),
    (r"index_topk", WINDOW),
    (r"index(er)?_n_heads", 32),
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_mtp.*layers", 0),
    (r"num_dense_layers|first_k_dense_replace|max_window_layers|n_groups?|topk_group|moe_layer_start_index", 1),
    (r"num_attention_heads_per_layer|.*layer_types|layers_block_type", None),
    (r".*top_?k|.*experts_per_tok|moe_k|num_selected_experts", 2),
    (r".*shared_experts?", 1),
    (r".*experts|zero_expert_num", 4),
    (r".*_rank", 16),
    (r".*(key_value|kv)_heads", 2),
    (r"(.*_)?(num|n)_(.*_)?heads?|.*attention_heads|n_head", 4),
    (r".*(num_|n_)(.*_)?layers?|n_layer|depth|num_blocks|.*_layers|layers|.*num_layers_.*|resampler_depth", 2),
    (r".*intermediate_size.*|.*ffn_dim|n_inner|d_ff|dff|dim_ff|.*ffn_hidden_size|d_inner|.*mlp_dim", 64),
    (r"(.*_)?head_(dim|size)|(.*_)?d_head|.*dim_head|qk_.*dim|v_head_dim|index_head_dim|kv_channels|d_kv", 8),
    (r"hidden_size_per_layer_input|word_embed_proj_dim|embedding_size|.*embed_dim|.*embedding_dim|emb_dim", 32),
    (r"(.*_)?hidden_size|d_model|n_embd|(.*_)?hidden_dim|(.*_)?dim|width|lru_width|classifier_proj_size", 32),
    (r".*chunk_size|.*block_size|.*state_size|.*d_state", 16),
]

# Numbers that scale or bound something, which at their default of 1 or None would not show
SCALES = r".*(multiplier|logit_scale|scaling|scale_factor|scaling_factor)"
SOFTCAPS = r".*soft_?cap(ping)?"


def shrunk(name: str, default: Any) -> Any:
    for pattern, value in SIZES:
        if re.fullmatch(pattern, name):
            return default if value is None else value
    return default


def tiny_config(config_class: type[PreTrainedConfig], window: bool = False, **own: Any) -> PreTrainedConfig:
    """`config_class()` with its sizes shrunk by name, its parts likewise, and each kind of its layers once or twice.

    Args:
        window: a sliding window also where the default config has it off.
        own: fields that are given as they are; those of a part as a dict.
    """
    default = config_class()
    types = OWN.get(config_class.model_type, {})
    own = {**types, **own}
    given: dict[str, Any] = {}
    for name in getattr(config_class, "sub_configs", {}):
        value = default.__dict__.get(name)
        if isinstance(value, PreTrainedConfig):
            given[name] = tiny_config(type(value), window, **dict(own.pop(name, {})))
    for field in dataclasses.fields(config_class):
        value = default.__dict__.get(config_class.attribute_map.get(field.name, field.name))
        if value == 1.0 and type(value) is float and re.fullmatch(SCALES, field.name):
            given[field.name] = 0.7
        if value is None and re.fullmatch(SOFTCAPS, field.name):
            given[field.name] = 5.0
        if window and not value and field.name in ("sliding_window", "use_sliding_window"):
            given[field.name] = WINDOW if field.name == "sliding_window" else True
        if type(value) is not int and not field.name.endswith("token_id"):
            continue
        small = shrunk(field.name, value)
        if value is None and not field.name.startswith(("pad_", "bos_", "eos_")):
            continue
        given[field.name] = small
    fields = {field.name for field in dataclasses.fields(config_class)}
    heads, kv = default.__dict__.get("num_attention_heads"), default.__dict__.get("num_key_value_heads")
    if heads is not None and heads == kv:
        given["num_key_value_heads"] = given["num_attention_heads"]
    kinds: dict[str, list] = {}
    for name in ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types"):
        if isinstance(values := default.__dict__.get(name), list) and name in fields:
            kinds[name] = values
    if kinds:
        layers = list(zip(*kinds.values(), strict=False))
        few = list(dict.fromkeys(layers)) or layers
        few = few * 2 if len(few) == 1 else few
        if (
            window
            and "sliding_window" in fields
            and kinds.keys() == {"layer_types"}
            and set(few) == {("full_attention",)}
        ):
            few[0] = ("sliding_attention",)
        for place, name in enumerate(kinds):
            given[name] = [layer[place] for layer in few]
        if "num_hidden_layers" in fields:
            given["num_hidden_layers"] = len(few)
    rope = copy.deepcopy(default.__dict__.get("rope_parameters"))
    if isinstance(rope, dict) and "rope_parameters" in fields:
        for part in [rope, *(v for v in rope.values() if isinstance(v, dict))]:
            if "mrope_section" in part:
                part["mrope_section"] = [2, 1, 1]
            if "original_max_position_embeddings" in part:
                part["original_max_position_embeddings"] = 512
        given["rope_parameters"] = rope
    given.update(own)
    return config_class(**given)


# Fields that can't be had by their names
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
_DEEPSEEK_MOE = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "mlp_layer_types": ["dense", "sparse"]}
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"n_group": 1, "topk_group": 1},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "bert": {"is_decoder": True},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_hidden_layers": 2,
        "rope_parameters": {
            name: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
            for name in ("sliding_attention", "full_attention")
        },
    },
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
        "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8, "head_dim": 16, "sliding_window": WINDOW,
    },
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [64, 64],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "num_dense_layers": 1,
    },
    "muse_spark_audio": {"num_hidden_layers": 1, "patch_sizes": [4], "hidden_sizes": [32], "depths": [1]},
    "hrm_text": {"num_layers_per_stack": None},
    "deepseek_v2": _DEEPSEEK_MOE,
    "deepseek_ocr2": {"text_config": _DEEPSEEK_MOE},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    **{
        f"{name}_text": _MROPE
        for name in ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "glm4v", "glm46v", "glm_ocr", "paddleocr_vl")
    },
    "glm4v_moe_text": {"rope_parameters": _MROPE["rope_parameters"] | {"mrope_section": [1, 1, 0]}},
    "glm5_next_text": {"qk_rope_head_dim": 0, "head_dim": 0, "index_kpool": 4},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "nemotron3_5_transcribe_word_timestamp": {"blank_token_id": 383},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 6},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 6},
    "granite4_vision": {
        "downsample_rate": "1/2", "vision_config": {"hidden_size": 64}, "deepstack_layer_map": [[0, 0]],
    },
    "step3p5": {"sliding_window": WINDOW},
    "qwen4_exp_text": {
        "indexer_n_heads": 32, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": WINDOW,
        "indexer_compress_ratio": 4, "split_ngram_parts": 1, "make_ngram_vocab_size_divisible_by": 1,
    },
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1,
             "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    "flint": {"mlp_only_layers": [0]},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": _MAMBA | {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl_text": {"head_dim": 8} | _MROPE,
    "inkling2_loop_text": {
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"], "num_hidden_layers": 3,
        "loop_layer_index_start": 1, "loop_layer_index_end": 2, "loop_num_passes": 2, "n_layers_per_attn_res_block": 1,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "longcat_flash": {"qk_head_dim": 16, "head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "num_key_value_heads": 1},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlstm": {"num_heads": 1, "hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0, "chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3,
        "attention_hidden_size": 64, "attention_head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


# Classes of which no tiny one can be built, or that take no text
UNBUILT = {
    "Apertus1p5ForConditionalGeneration": "its image tokenizer has no SDPA attention, and is built with it by default",
    "BltForCausalLM": "the sizes of its five parts depend on one another in a way that their names don't tell",
    "Florence2ForConditionalGeneration": "the sizes of its image encoder are lists, 91 million weights at least",
    "Gemma4AssistantForCausalLM": "it drafts tokens for another model, from that one's keys and values",
    "InklingForConditionalGeneration": "the sizes of its image encoder follow from its patches, 761 billion weights",
    "KyutaiSpeechToTextForConditionalGeneration": "the sizes of its audio codec depend on one another",
    "PI0ForConditionalGeneration": "it moves a robot, and generates no text",
    "Qwen2_5OmniForConditionalGeneration": "it is several models, of which its thinker trains on text",
    "Qwen3OmniMoeForConditionalGeneration": "it is several models, of which its thinker trains on text",
    "VibeVoiceAsrForConditionalGeneration": "the sizes of its audio encoders are lists, 687 million weights at least",
}


def build(class_name: str, window: bool = False, **own: Any):
    """A random float32 model in eval mode, of which every parameter matters: no weight is all zeros or ones.

    Raises:
        NotBuilt: there is none, and why.
    """
    if class_name in UNBUILT:
        raise NotBuilt(UNBUILT[class_name])
    model_class = getattr(transformers, class_name)
    config = tiny_config(model_class.config_class, window, **own)
    torch.manual_seed(0)
    try:
        model = model_class._from_config(config).float()
    except ImportError as error:
        library = re.search(r"requires the (\w+) library", str(error))
        raise NotBuilt(f"it needs the library {library[1] if library else error}") from error
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() < 2:
                p.add_(0.1 * torch.randn_like(p))
            elif not 0.1 < float(p.std()) < 0.5:
                p.normal_(0, 0.2)
    return model.eval()
