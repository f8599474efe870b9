"""Code that loads what was shipped, for its card: by plain transformers and PEFT, and by vLLM."""

from .trained import Trained

# With double quantization and the dtype of training, as `load_base` has it.
QUANTIZATION = {
    "nf4": 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, '
    "bnb_4bit_compute_dtype={dtype}",
    "int8": "load_in_8bit=True",
}

ADAPTER = """\
import torch
from peft import PeftModel
from transformers import {names}, pipeline

tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
base = {base_class}.from_pretrained({options})
model = PeftModel.from_pretrained(base, "{repo_id}")
"""
SAMPLING = """model.generation_config = GenerationConfig.from_pretrained("{repo_id}")
"""
GENERATE = """\
generate = pipeline("text-generation", {model})
print(generate({prompt}, max_new_tokens=256))
"""
SCORE = """\
score = pipeline("text-classification", {model})
text = {text}
print(score(text, add_special_tokens=False, function_to_apply="none"))
"""
CHAT_PROMPT = '[{"role": "user", "content": "Hello"}]'
CHAT_TEXT = """score.tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello to you."}], tokenize=False
)"""


def load_code(trained: Trained, format: str, repo_id: str, base_id: str, chats: bool) -> str:
    """Python that loads a model from a repository and asks it once.

    Args:
        format: as of `export`.
        chats: whether its prompts are messages.
    """
    head, model = "from transformers import pipeline\n\n", f'"{repo_id}"'
    if format == "adapter":
        head, model = _adapter_code(trained, repo_id, base_id), "model=model, tokenizer=tokenizer"
    if trained.scores:
        text = CHAT_TEXT if chats else '"Hello" + " to you." + score.tokenizer.eos_token'
        return head + SCORE.format(model=model, text=text)
    return head + GENERATE.format(model=model, prompt=CHAT_PROMPT if chats else '"Hello"')


def _adapter_code(trained: Trained, repo_id: str, base_id: str) -> str:
    """An adapter on its base, which is quantized as in training."""
    quantization, dtype = trained.base.quantization, f"torch.{trained.fingerprint['dtype']}"
    options = [f'"{base_id}"', f"dtype={dtype}"]
    if trained.fingerprint["revision"] is not None:
        options.append(f'revision="{trained.fingerprint["revision"]}"')
    if quantization is not None:
        options.append(f"quantization_config=BitsAndBytesConfig({QUANTIZATION[quantization].format(dtype=dtype)})")
    options += ["trust_remote_code=True"] * trained.base.trust_remote_code
    if trained.scores:
        options += ["num_labels=1", "pad_token_id=tokenizer.pad_token_id"]
    kind = "AutoModelForSequenceClassification" if trained.scores else "AutoModelForCausalLM"
    names = [kind, "AutoTokenizer", *["BitsAndBytesConfig"] * (quantization is not None)]
    names += ["GenerationConfig"] * (not trained.scores)
    code = ADAPTER if trained.scores else ADAPTER + SAMPLING
    return code.format(names=", ".join(names), base_class=kind, repo_id=repo_id, options=", ".join(options))


def serve_command(trained: Trained, format: str, repo_id: str, base_id: str) -> str:
    """The command by which vLLM serves a policy. Its largest rank is a power of two from 8 on."""
    if format != "adapter":
        return f"vllm serve {repo_id}"
    rank = max(8, 2 ** (trained.recipe.lora.r - 1).bit_length())
    return f"vllm serve {base_id} --enable-lora --lora-modules policy={repo_id} --max-lora-rank {rank}"
