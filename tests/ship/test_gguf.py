"""GGUF files by a checkout of llama.cpp, and what goes with them to Ollama."""

import json
import os
import re
from pathlib import Path

import pytest
from support.chat_templates import BY_NAME
from support.command_line import error_of, failed
from support.shipped import make_run

from rlhf_recipes.cli.main import main_cli
from rlhf_recipes.data.tokens import render
from rlhf_recipes.ship.modelfile import ollama_template

WRITTEN = ("qwen2_5", "qwen3", "llama3", "llama3_1", "mistral", "gemma", "phi3", "phi4", "smollm2", "olmo2")
REFUSED = ("llama2", "zephyr", "gptoss")
# Stands in the place of the converter, and says what it was asked.
CONVERTER = """
import json, pathlib, sys
folder, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1])
assert (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()
out.write_text(json.dumps({"name": folder.name, "words": sys.argv[2:]}))
"""


def spoken(template: str, messages: list[dict[str, str]]) -> str:
    """What Ollama makes of messages by a template of the kind that is written."""
    found = re.fullmatch(
        r"(?:{{ if .System }}(?P<before>.*){{ .System }}(?P<behind>.*?){{ else }}(?P<start>.*?){{ end }}|"
        r"(?P<only>.*?))"
        r'{{ range .Messages }}{{ if eq .Role "user" }}(?P<user>.*){{ .Content }}(?P<to_answer>.*)'
        r'{{ else if eq .Role "assistant" }}{{ .Content }}(?P<end>.*){{ end }}{{ end }}',
        template,
        re.DOTALL,
    )
    assert found is not None, template
    part = {name: text or "" for name, text in found.groupdict().items()}
    text = part["start"] + part["only"]
    if messages[0]["role"] == "system":
        text = part["before"] + messages[0]["content"] + part["behind"]
        messages = messages[1:]
    for message in messages:
        user = message["role"] == "user"
        text += part["user"] + message["content"] + part["to_answer"] if user else message["content"] + part["end"]
    return text


@pytest.mark.parametrize("name", WRITTEN)
def test_ollama_is_told_what_the_template_writes(name: str) -> None:
    tokenizer = BY_NAME[name].tokenizer()
    template = ollama_template(tokenizer)
    talk = [
        {"role": ("user", "assistant")[number % 2], "content": text}
        for number, text in enumerate(["Hello?", "Yes.", "Who is it?", "Me.", "Good."])
    ]
    for messages in (talk[:1], talk, [{"role": "system", "content": "Be kind."}, *talk]):
        if messages[0]["role"] == "system" and ".System" not in template:
            continue
        wanted = render(tokenizer, messages, add_generation_prompt=True)
        assert spoken(template, messages) == wanted.removeprefix(str(tokenizer.bos_token))


@pytest.mark.parametrize("name", REFUSED)
def test_what_ollama_cannot_be_told_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="llama-server --jinja"):
        ollama_template(BY_NAME[name].tokenizer())


def test_the_converter_of_the_checkout_is_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    run, to, checkout = make_run(tmp_path), tmp_path / "mine", tmp_path / "llama.cpp"
    words = ["export", str(run), "--format", "ollama", "--to", str(to)]
    capsys.readouterr()
    error = error_of(capsys, words)
    assert "Set --llama-cpp or $LLAMA_CPP" in error and "git clone" in error
    words += ["--llama-cpp", str(checkout)]
    assert "has no convert_hf_to_gguf.py" in error_of(capsys, words)
    checkout.mkdir()
    (checkout / "convert_hf_to_gguf.py").write_text("raise SystemExit('there is no vocabulary')")
    assert failed(capsys, words).endswith("there is no vocabulary") and not to.exists()
    assert "cmake --build" in error_of(capsys, [*words, "--gguf-type", "q4_k_m"])
    (checkout / "convert_hf_to_gguf.py").write_text(CONVERTER)
    main_cli([*words, "--gguf-type", "f16"])
    assert sorted(path.name for path in to.iterdir()) == ["Modelfile", "export.json", "model.gguf"]
    called = json.loads((to / "model.gguf").read_text())
    assert called["name"] == "mine" and called["words"][2:] == ["--outtype", "f16"]
    lines = (to / "Modelfile").read_text().splitlines()
    assert lines[:3] == ["FROM ./model.gguf", 'TEMPLATE """{{ .Prompt }}"""', 'PARAMETER stop "<eos>"']
    assert "PARAMETER temperature 0.7" in lines and "PARAMETER repeat_penalty 1.0" in lines


@pytest.mark.long
def test_a_file_of_the_real_converter_is_read_back(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    if "LLAMA_CPP" not in os.environ:
        pytest.skip("needs a checkout of llama.cpp in $LLAMA_CPP")
    smollm2 = Path(os.environ.get("SMOLLM2", "smollm2"))
    if not smollm2.is_dir():
        pytest.skip("needs a folder of SmolLM2-135M-Instruct in $SMOLLM2")
    run = make_run(tmp_path, size=0.02, model=str(smollm2), dtype="bfloat16")
    for gguf_type, largest in (("f16", 0.005), ("q8_0", 0.01)):
        to = tmp_path / gguf_type
        main_cli(["export", str(run), "--format", "gguf", "--gguf-type", gguf_type, "--to", str(to)])
        assert json.loads((to / "export.json").read_text())["measured"]["gguf"]["kl"] < largest
