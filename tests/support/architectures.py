"""A tiny random model of each text architecture of transformers, written to a folder with a word-level tokenizer."""

from pathlib import Path
from typing import Any

import torch
from support.tiny_models import VOCABULARY, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# What each setting of that name becomes, whatever the architecture.
SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 128),
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}
LATENT = {"num_key_value_heads": 4}  # DeepSeek's attention has as many as there are heads
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
# What one architecture needs beside: settings that must agree with the small ones, or that make it more than its kin.
SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text"), LATENT),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3", "sarvam_mla", "youtu"), LATENT),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), LINEAR),
    "codegen": {"rotary_dim": 8},
    "bamba": {**MAMBA2, "attn_layer_indices": [1]},
    "cohere": {"logit_scale": 0.25},
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "gemma2": {"final_logit_softcapping": 1.0},
    "gemma3n_text": {
        **{"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "laurel_rank": 4},
        **{"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0},
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granite": {"logits_scaling": 4.0},
    "granitemoe": {"logits_scaling": 4.0},
    "granitemoehybrid": {**MAMBA2, "layer_types": ["mamba", "attention"], "logits_scaling": 4.0},
    "hyperclovax": {"logits_scaling": 0.5},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**LATENT, **LINEAR, "num_experts_per_token": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "n_groups": 1, "state_size": 8},
    "mistral": {"sliding_window": 6},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
}
# Not text alone, or an encoder that was made to decode.
OTHERS = """
    apertus1p5 bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small blt camembert cpmant
    cohere_compass_text data2vec-text electra emu3 ernie fuyu gemma3 gemma3n gemma4 gemma4_assistant gemma4_unified
    gemma4_unified_assistant git got_ocr2 llama4 marian mbart megatron-bert mllama moshi moss_transcribe_diarize
    musicgen musicgen_melody mvp pegasus phi4_multimodal plbart prophetnet qwen3_5 qwen3_5_moe qwen4_exp reformer
    rembert roberta roberta-prelayernorm roc_bert roformer trocr whisper xglm xlm xlm-roberta xlm-roberta-xl xlnet
    xmod dots3_note
"""
# Of these no tiny model can be made of the small settings.
UNBUILT = "bailing_hybrid dbrx inkling2_loop_text inkling2_text qwen4_exp_text xlstm zamba zamba2"
ARCHITECTURES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {*OTHERS.split(), *UNBUILT.split()})


def tiny_config(architecture: str, **settings: Any) -> PreTrainedConfig:
    """The configuration of an architecture, with the small settings, its own and the given ones."""
    config_class: Any = type(AutoConfig.for_model(architecture))
    known = config_class().to_dict()
    small = {key: value for key, value in SMALL.items() if key in known}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return config_class(**small | SETTINGS.get(architecture, {}) | settings, **tokens, initializer_range=0.1)


def save_architecture(folder: Path, architecture: str, **settings: Any) -> Path:
    """Write a random model of an architecture and its tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(architecture, **settings)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_vision_model(folder: Path) -> Path:
    """Write a random Gemma 3 that sees: a text model with a vision tower, as the Hub has it from 4B on."""
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tiny_config("gemma3_text").to_dict()
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text,
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
        image_token_index=VOCABULARY - 1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
