"""Chat models as their templates make them: what each writes around an answer, and a tokenizer that knows its tokens.

The templates that TRL ships (Apache-2.0, `trl/chat_templates`) are the models' own, read from the installed package.
The others are written here, to do what the model's own does with messages of text.
"""

from dataclasses import dataclass
from pathlib import Path

import trl
from support.rows import make_tokenizer
from transformers import PreTrainedTokenizerFast as FastTokenizer

FOLDER = Path(trl.__file__).parent / "chat_templates"

WRITTEN = {
    # A system message goes into the first question. Spaces stand around an answer's text.
    "llama2": """\
{%- set system = messages[0].content if messages[0].role == 'system' else none %}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'user' %}
        {{- bos_token + '[INST] ' }}
        {%- if loop.first and system is not none %}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{% endif %}
        {{- message.content | trim + ' [/INST]' }}
    {%- else %}{{ ' ' + message.content | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}""",
    "mistral": """\
{{- bos_token }}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}
    {%- else %}{{ message.content + eos_token }}
    {%- endif %}
{%- endfor %}""",
    "zephyr": """\
{%- for message in messages %}
    {{- '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' }}
    {%- if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
{%- endfor %}""",
    "smollm2": """\
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are SmolLM.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    # It says the date. /no_think in the system message puts an empty thought into the prompt and into every answer.
    "smollm3": """\
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- set thought = '<think>\\n\\n</think>\\n' if '/no_think' in system else '' %}
{{- '<|im_start|>system\\nToday Date: ' ~ strftime_now('%d %B %Y') ~ '\\n\\n' ~ system ~ '<|im_end|>\\n' }}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'user' %}{{ '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>assistant\\n' + thought }}
        {%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' + thought }}{% endif %}""",
    "phi4": """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '<|im_sep|>' + message.content + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}""",
    "granite": """\
{%- if messages[0].role != 'system' %}
    {{- '<|start_of_role|>system<|end_of_role|>Today\\'s Date: ' + strftime_now('%B %d, %Y') + '.<|end_of_text|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_of_role|>' + message.role + '<|end_of_role|>' + message.content + '<|end_of_text|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}""",
    # Only an answer that another message follows has a line break after it.
    "olmo2": """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|' + message.role + '|>\\n' + message.content }}
    {%- if message.role == 'assistant' %}{{ eos_token + ('' if loop.last else '\\n') }}{% else %}{{ '\\n' }}{% endif %}
    {%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}
{%- endfor %}""",
}


@dataclass(frozen=True)
class ChatModel:
    """A chat model's template, its special tokens, and what the template is known to do."""

    name: str  # of TRL's file, or of `WRITTEN`
    stop: str  # what ends an answer
    eos: str | None = None  # the tokenizer's EOS; None: the stop token
    bos: str | None = None
    special: tuple[str, ...] = ()  # other special tokens
    plain: tuple[str, ...] = ()  # tokens of one id that are not special, as <think>
    before: str = ""  # what the template writes between its generation prompt and an answer's text
    after: str = ""  # what it writes between the text and the stop token
    takes_system: bool = True
    says_date: bool = False

    @property
    def template(self) -> str:
        """The template's text."""
        return WRITTEN.get(self.name) or (FOLDER / f"{self.name}.jinja").read_text(encoding="utf-8")

    def tokenizer(self) -> FastTokenizer:
        """A byte-level tokenizer with the model's special tokens and template."""
        eos = self.eos or self.stop
        own = [token for token in dict.fromkeys((self.bos, eos, self.stop, *self.special)) if token is not None]
        tokenizer = make_tokenizer(*(token for token in own if token not in ("<s>", "</s>")))
        tokenizer.add_tokens(list(self.plain))
        tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template = self.bos, eos, self.template
        return tokenizer


CHATML = ("<|im_start|>", "<|endoftext|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>")
THINK = ("<think>", "</think>")
TURNS = ("<start_of_turn>", "<eos>")
PHI3 = ("<|system|>", "<|user|>", "<|assistant|>")
HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
COHERE = ("<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>")
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"

CHAT_MODELS = [
    ChatModel("qwen2_5", "<|im_end|>", special=CHATML),
    ChatModel("qwen3", "<|im_end|>", special=CHATML, plain=THINK, before=EMPTY_THOUGHT),
    ChatModel("qwen3_instruct_2507", "<|im_end|>", special=CHATML, plain=THINK),
    ChatModel("llama2", "</s>", bos="<s>", before=" ", after=" "),
    ChatModel("llama3", "<|eot_id|>", bos="<|begin_of_text|>", special=HEADERS),
    ChatModel("llama3_1", "<|eot_id|>", bos="<|begin_of_text|>", special=HEADERS),
    ChatModel("llama3_2", "<|eot_id|>", bos="<|begin_of_text|>", special=HEADERS, says_date=True),
    ChatModel("mistral", "</s>", bos="<s>", takes_system=False),
    ChatModel("zephyr", "</s>", bos="<s>", before="\n"),
    ChatModel("gemma", "<end_of_turn>", eos="<eos>", bos="<bos>", special=TURNS, takes_system=False),
    ChatModel("gemma3", "<end_of_turn>", eos="<eos>", bos="<bos>", special=TURNS),
    ChatModel("phi3", "<|end|>", eos="<|endoftext|>", bos="<s>", special=PHI3),
    ChatModel("phi3_5", "<|end|>", eos="<|endoftext|>", bos="<s>", special=PHI3),
    ChatModel("phi4", "<|im_end|>", special=(*CHATML, "<|im_sep|>")),
    ChatModel("smollm2", "<|im_end|>", special=CHATML),
    ChatModel("smollm3", "<|im_end|>", special=CHATML, plain=THINK, says_date=True),
    ChatModel("granite", "<|end_of_text|>", special=("<|start_of_role|>", "<|end_of_role|>"), says_date=True),
    ChatModel("olmo2", "<|endoftext|>", bos="<|endoftext|>"),
    ChatModel("cohere2", "<|END_OF_TURN_TOKEN|>", bos="<BOS_TOKEN>", special=COHERE, after="<|END_RESPONSE|>"),
    ChatModel("gptoss", "<|return|>", special=HARMONY, before="<|channel|>final<|message|>", says_date=True),
    # It writes nothing after an answer.
    ChatModel("glm4moe", "<|endoftext|>", special=("[gMASK]", *PHI3), plain=THINK, before="\n<think></think>\n"),
]
# Their generation prompts begin a thought of which a conversation shows nothing.
OPEN_THOUGHT = [
    ChatModel(name, "<｜end▁of▁sentence｜>", bos="<｜begin▁of▁sentence｜>", plain=THINK)  # noqa: RUF001
    for name in ("deepseek_r1_distill", "deepseekv3")
]
BY_NAME = {model.name: model for model in (*CHAT_MODELS, *OPEN_THOUGHT)}
