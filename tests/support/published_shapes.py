"""What published models say in their config.json on the Hub: shapes to plan with, or to fill with random weights."""

from typing import Any

MISTRAL_7B = {  # mistralai/Mistral-7B-v0.3
    "model_type": "mistral",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 32768,
    "rope_theta": 1e6,
    "sliding_window": None,
}
QWEN = {"model_type": "qwen2", "hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 8}
QWEN |= {"vocab_size": 152064, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
QWEN_14B = QWEN | {"num_hidden_layers": 48, "intermediate_size": 13824}  # Qwen/Qwen2.5-14B
QWEN_32B = QWEN | {"num_hidden_layers": 64, "intermediate_size": 27648}  # Qwen/Qwen2.5-32B
QWEN3 = {"model_type": "qwen3", "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
QWEN3 |= {"head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
QWEN3_4B = QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}  # Qwen/Qwen3-4B-Base
QWEN3_8B = QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}  # Qwen/Qwen3-8B-Base
LLAMA_8B = {  # meta-llama/Llama-3.1-8B
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "rope_theta": 5e5,
    "tie_word_embeddings": False,
}
LLAMA_70B = LLAMA_8B | {  # meta-llama/Llama-3.1-70B
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "intermediate_size": 28672,
}
SMOLLM3_3B = {  # HuggingFaceTB/SmolLM3-3B-Base
    "model_type": "smollm3",
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 11008,
    "vocab_size": 128256,
    "rope_theta": 5e6,
    "tie_word_embeddings": True,
}
GEMMA3_TEXT = {"model_type": "gemma3_text", "head_dim": 256, "vocab_size": 262208, "sliding_window": 1024}
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
SIGLIP |= {"model_type": "siglip_vision_model", "image_size": 896, "patch_size": 14}


def gemma3(**text: int) -> dict[str, Any]:
    """A Gemma 3 that sees, whose text model has these sizes."""
    return {"model_type": "gemma3", "text_config": GEMMA3_TEXT | text, "vision_config": SIGLIP}


GEMMA3_4B = gemma3(  # google/gemma-3-4b-pt
    hidden_size=2560, num_hidden_layers=34, num_attention_heads=8, num_key_value_heads=4, intermediate_size=10240
)
GEMMA3_12B = gemma3(  # google/gemma-3-12b-pt
    hidden_size=3840, num_hidden_layers=48, num_attention_heads=16, num_key_value_heads=8, intermediate_size=15360
)
