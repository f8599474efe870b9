"""What published models say in their config.json on the Hub: shapes to plan with, or to fill with random weights."""

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
