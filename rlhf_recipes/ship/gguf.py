"""A policy of a run as one GGUF file, made by the user's own checkout of llama.cpp, and as a model of Ollama's.

llama.cpp's converter is on no package index, and what it can convert changes weekly: it is called and never copied.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.import_utils import is_gguf_available

from .folder import check_room, new_folder
from .measure import Measured, Reference, compare
from .merged import write_merged
from .modelfile import modelfile
from .trained import ExportSettings, find_trained

FILE = "model.gguf"
CONVERTED = ("f32", "f16", "bf16", "q8_0")  # types that the converter writes; llama-quantize makes all others
HOW_TO_GET = (
    "git clone --depth 1 https://github.com/ggml-org/llama.cpp && "
    "pip install -r llama.cpp/requirements/requirements-convert_hf_to_gguf.txt"
)
HOW_TO_BUILD = "cmake -B build && cmake --build build --target llama-quantize"


def export_gguf(run_dir: Path, to: Path, settings: ExportSettings) -> dict[str, Measured | None]:
    """Write a policy as a GGUF file; for Ollama with a Modelfile beside it.

    Returns how close the merged weights are to the adapter on its base (`merged`), from which the file is made, and how
    close the file is, as transformers reads it back (`gguf`): None where that is not possible.

    Raises ValueError as `export_merged` does, and where llama.cpp is missing or fails.
    """
    trained = find_trained(run_dir, settings.model, scores=False)
    converter, quantizer = find_llama_cpp(settings.llama_cpp, settings.gguf_type)
    with new_folder(to) as folder, tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        check_room(folder, trained.base, trained.dtype, copies=2.0)
        merged = Path(scratch) / to.name  # the name goes into the file
        merged.mkdir()
        written = write_merged(run_dir, trained, merged, settings)
        converted = "auto" if quantizer is not None else settings.gguf_type
        whole = folder / FILE if quantizer is None else Path(scratch) / FILE
        call([sys.executable, str(converter), str(merged), "--outfile", str(whole), "--outtype", converted])
        if quantizer is not None:
            call([str(quantizer), str(whole), str(folder / FILE), settings.gguf_type])
        if settings.ollama:
            text = modelfile(trained.tokenizer, written.sampling, written.conversational)
            (folder / "Modelfile").write_text(text, encoding="utf-8")
        measured = {"merged": written.measured, "gguf": _read_back(folder, written.reference)}
        trained.write_record(folder, format="gguf", type=settings.gguf_type, onto=settings.onto, measured=measured)
    return measured


def find_llama_cpp(folder: Path | None, gguf_type: str) -> tuple[Path, Path | None]:
    """The converter of a llama.cpp checkout, and the program that quantizes where the converter cannot.

    Raises ValueError where one is missing, with the lines that bring it.
    """
    converter = None if folder is None else folder / "convert_hf_to_gguf.py"
    if folder is None or converter is None or not converter.is_file():
        where = "Set --llama-cpp or $LLAMA_CPP" if folder is None else f"{folder} has no convert_hf_to_gguf.py: set it"
        raise ValueError(f"{where} to a checkout of llama.cpp, which `{HOW_TO_GET}` brings.")
    if gguf_type in CONVERTED:
        return converter, None
    for place in (folder / "build" / "bin", folder / "build", folder):
        if (place / "llama-quantize").is_file():
            return converter, place / "llama-quantize"
    raise ValueError(
        f"--gguf-type {gguf_type} needs llama-quantize, which {folder} has not been built with: run `{HOW_TO_BUILD}` "
        f"there, or take one of {', '.join(CONVERTED)}."
    )


def call(command: list[str]) -> None:
    """Run a program of llama.cpp's. Raises ValueError with its last line where it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        lines = done.stdout.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise ValueError(f"{' '.join(command[:2])}: {lines[-1]}")


def _read_back(folder: Path, reference: Reference) -> Measured | None:
    """How close a GGUF file is, as transformers reads it; None where it does not know the architecture or the type."""
    if not is_gguf_available():
        return None
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    except (ValueError, NotImplementedError):  # what transformers says of those that it does not know
        return None
    return compare(reference, model)


def gguf_table(measured: dict[str, Any]) -> str:
    """What was measured, in words."""
    from_file = measured["gguf"]
    if from_file is None:
        return (
            f"the merged weights from which {FILE} was made, {_line(measured['merged'])}; {FILE} itself was not "
            "measured, because transformers cannot read it here (`pip install 'rlhf_recipes[gguf]'` lets it read most)"
        )
    return f"the merged weights, {_line(measured['merged'])}; {FILE}, {_line(from_file)}"


def _line(measured: Measured) -> str:
    return f"KL {measured['kl']:.2g} nats a token, same likeliest token {measured['same_greedy']:.1%}"
