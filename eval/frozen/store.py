"""Features on disk, written chunk by chunk: what is there is never encoded twice."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eval.frozen.result import make_folder
from mlomae.errors import UserError
from mlomae.recipe.yaml_text import dump_yaml

CHUNK_SIZE = 1024  # images of a file; a multiple of the encoder's batch, so that none is in two


class Features:
    """Rows of features in several tensors, which stay on disk until they are read.

    A chunk is mapped into memory, so the ranks of a node share its pages, and a bank larger than
    the memory is read through.

    Args:
        chunks: [c, D] each, one below the other.
        rows: sorted int64 [n], the rows that are meant; None for all.
    """

    def __init__(self, chunks: Sequence[Tensor], rows: np.ndarray | None = None) -> None:
        self._chunks = chunks
        self._starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])
        self._rows = np.arange(self._starts[-1]) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: np.ndarray) -> "Features":
        """Some rows, a sorted int64 array; nothing is read."""
        return Features(self._chunks, self._rows[rows])

    @property
    def num_features(self) -> int:
        """Length of a feature vector."""
        return self._chunks[0].shape[1]

    @property
    def num_parts(self) -> int:
        """Chunks, of which some may have no row that is meant."""
        return len(self._chunks)

    def part(self, number: int, device: str | torch.device) -> Tensor:
        """The rows of one chunk in order, [c, D] on the device."""
        chunk, start = self._chunks[number], self._starts[number]
        first, last = np.searchsorted(self._rows, self._starts[number : number + 2])
        if last - first == len(chunk):
            return chunk.to(device)
        return chunk[torch.from_numpy(self._rows[first:last] - start)].to(device)

    def parts(self, device: str | torch.device) -> Iterator[Tensor]:
        """All rows in order, as tensors [c, D] on the device."""
        return (self.part(number, device) for number in range(self.num_parts))

    def load(self, device: str | torch.device) -> Tensor:
        """All rows as one tensor [n, D]; besides it, memory holds one chunk."""
        out = torch.empty(len(self), self.num_features, device=device)
        start = 0
        for part in self.parts(device):
            out[start : start + len(part)] = part
            start += len(part)
        return out


class FeatureStore:
    """The chunks of one encoder's features of one set of images.

    Args:
        folder: holds the features of any number of encoders and sets.
        identity: everything that decides the features; another one is another store.
        num_images: rows in all.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], num_images: int) -> None:
        text = json.dumps(identity, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.num_images = num_images
        self._identity = identity

    @property
    def num_chunks(self) -> int:
        """Files of the whole store."""
        return -(-self.num_images // CHUNK_SIZE)

    def rows(self, number: int) -> range:
        """Rows of a chunk."""
        return range(number * CHUNK_SIZE, min((number + 1) * CHUNK_SIZE, self.num_images))

    def has(self, number: int) -> bool:
        """Whether a chunk is complete."""
        return self._file(number).is_file()

    def is_complete(self) -> bool:
        """Whether all chunks are there."""
        return all(self.has(number) for number in range(self.num_chunks))

    def prepare(self) -> None:
        """Make the folder, and say in it what it is for.

        Raises:
            UserError: it cannot be made.
        """
        make_folder(self.folder, "--features")
        with suppress(OSError):  # for people; a full disk is reported with the first chunk
            (self.folder / "about.yaml").write_text(dump_yaml(self._identity))

    def write(self, number: int, features: Tensor) -> None:
        """Write a chunk [c, D], whole or not at all.

        Raises:
            UserError: the folder, which `prepare` made, cannot be written, or is full.
        """
        file = self._file(number)
        partial = file.with_suffix(f".{os.uname().nodename}.{os.getpid()}.tmp")
        try:
            save_file({"features": features.cpu().contiguous()}, partial)
            with suppress(OSError):  # some file systems have no rights
                partial.chmod(self.folder.stat().st_mode & 0o666)
            os.replace(partial, file)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                partial.unlink()
            raise UserError(
                f"features cannot be written to {self.folder} ({error}): make room there, or give "
                "another folder with --features"
            ) from None

    def read(self) -> Features:
        """All chunks, mapped into memory.

        Raises:
            UserError: a chunk is missing or damaged.
        """
        return Features([self._map(number) for number in range(self.num_chunks)])

    def _map(self, number: int) -> Tensor:
        file = self._file(number)
        if not file.is_file():
            raise UserError(
                f"{file} of another process is not there: give a folder with --features that all "
                "nodes share"
            )
        try:
            with safe_open(file, "pt") as opened:
                features: Tensor = opened.get_tensor("features")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} is damaged ({error}): delete it") from None
        if len(features) != len(self.rows(number)):
            raise UserError(
                f"{file} holds {len(features)} images, not as many as before: delete it"
            )
        return features

    def _file(self, number: int) -> Path:
        return self.folder / f"chunk_{number:06d}.safetensors"
