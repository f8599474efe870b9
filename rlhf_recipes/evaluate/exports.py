"""What `export` wrote, opened to be talked to: a merged policy, or an adapter on the base that it was trained on."""

from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..model.base import load_base, load_tokenizer
from ..model.shared import SharedBase
from ..recipe.lookup import is_function
from ..recipe.values import Base, Lora
from ..records.contents import Fingerprint
from ..records.files import read_json
from ..records.folder import read_export


class OpenExport(NamedTuple):
    """An export in memory."""

    shared: SharedBase
    role: str
    base: Base
    tokenizer: PreTrainedTokenizerBase
    fingerprint: Fingerprint  # of the run that it is of
    temperature: float  # of its settings of sampling


def open_export(folder: Path) -> OpenExport:
    """Load a policy that was exported as `merged` or `adapter`.

    Raises ValueError where it is neither, or is a stranger's whose base is not named by an id or a folder.
    """
    record = read_export(folder)
    sampling = read_json(folder / "generation_config.json")
    if record is None or sampling is None or record["format"] not in ("merged", "adapter"):
        raise ValueError(f"{folder} is no policy that was exported as merged or adapter, and one can talk to no other.")
    if record["format"] == "merged":
        base, adapter = Base(str(folder), dtype=record["dtype"]), None
    else:
        base, adapter = _trained_on(folder, record), folder
    shared, role = SharedBase(load_base(base), Lora()), "base"
    if adapter is not None:
        role = "exported"
        shared.add_role(role, adapter)
    tokenizer = load_tokenizer(Base(str(folder)))
    return OpenExport(shared, role, base, tokenizer, record["base"], sampling.get("temperature", 1.0))


def _trained_on(folder: Path, record: dict[str, Any]) -> Base:
    """The base of an exported adapter, quantized as in training."""
    base_id, trained = record["base_id"], record["base"]
    if is_function(base_id):  # it would be called
        raise ValueError(f"{folder}: its base must be a Hub id or a folder, and is {base_id!r}.")
    revision = read_json(folder / "adapter_config.json").get("revision")
    return Base(base_id, revision, trained["quantization"], trained["dtype"])
