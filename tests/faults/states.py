"""What a kill would leave: a copy of a folder after each of its writes, and with each write torn in its middle.

All that a process knew is lost with it, and the disk stays: a copy of the folder at the moment of the kill is the same.
So one run of some work shows all moments between its writes. What is between two of them leaves no other state.
"""

import builtins
import io
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from transformers import PreTrainedTokenizerFast


class States:
    """Copies of a folder: `NUMBER torn NAME` and `NUMBER after NAME` of each write, deletion and renaming."""

    def __init__(self, folder: Path, copies: Path, seed: int = 0) -> None:
        """
        Args:
            folder: what is watched.
            copies: where the copies go.
            seed: of the places at which writes are torn.
        """
        self.folder, self.copies, self.writes = folder, copies, 0
        self.rng = random.Random(seed)

    def __iter__(self) -> Iterator[Path]:
        """The copies, in the order of the writes."""
        return iter(sorted(self.copies.iterdir()))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A block whose writes in the folder are copied, whether of Python, torch, safetensors or tokenizers."""
        with (
            mock.patch.object(builtins, "open", opened := self._open(io.open)),
            mock.patch.object(io, "open", opened),
            mock.patch.object(torch, "save", self._write(torch.save, 1)),
            mock.patch.object(safetensors.torch, "serialize_file", self._write(safetensors.torch.serialize_file, 1)),
            mock.patch.object(PreTrainedTokenizerFast, "_save_pretrained", self._save_tokenizer()),
            mock.patch.multiple(
                os, **{name: self._change(getattr(os, name)) for name in ("mkdir", "rmdir", "unlink", "remove")}
            ),
            mock.patch.multiple(os, **{name: self._change(getattr(os, name), 1) for name in ("rename", "replace")}),
        ):
            yield

    def _is_watched(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and self.folder in Path(os.path.abspath(path)).parents

    def _open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not self._is_watched(file) or not set(mode) & set("wax+"):
                return real(file, mode, *args, **kwargs)
            path = Path(file)
            before = path.stat().st_size if "a" in mode and path.exists() else 0
            stream = real(file, mode, *args, **kwargs)
            close = stream.close

            def closed() -> None:
                if not stream.closed:
                    close()
                    self._note(path, before, torn="+" not in mode)

            stream.close = closed
            return stream

        return opened

    def _write(self, real: Callable[..., Any], place: int) -> Callable[..., Any]:
        """A function that writes a whole file, which is its argument of that place."""

        def write(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            if len(args) > place and self._is_watched(args[place]):
                self._note(Path(args[place]))
            return result

        return write

    def _save_tokenizer(self) -> Callable[..., Any]:
        real = PreTrainedTokenizerFast._save_pretrained

        def save(tokenizer: Any, **kwargs: Any) -> Any:
            result = real(tokenizer, **kwargs)
            if self._is_watched(path := Path(kwargs["save_directory"]) / "tokenizer.json"):
                self._note(path)
            return result

        return save

    def _change(self, real: Callable[..., Any], place: int = 0) -> Callable[..., Any]:
        """A function that changes the folder at once; the path that it leaves is its argument of that place."""

        def change(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            # A tree is deleted by the names in its folders, which are given as descriptors.
            if self._is_watched(args[place]) or kwargs.get("dir_fd") is not None:
                self._note(Path(args[place]), torn=False)
            return result

        return change

    def _note(self, path: Path, before: int = 0, torn: bool = True) -> None:
        """Copy the folder as it is after a write and, before that, with the write cut somewhere.

        Args:
            before: the size of the file without what was written.
        """
        self.writes += 1
        name = str(path.relative_to(self.folder) if path.is_absolute() else path).replace("/", "|")
        written = path.stat().st_size - before if torn else 0
        if written > 0:
            copy = shutil.copytree(self.folder, self.copies / f"{self.writes:04} torn {name}")
            os.truncate(copy / path.relative_to(self.folder), before + self.rng.randrange(written))
        shutil.copytree(self.folder, self.copies / f"{self.writes:04} after {name}")
