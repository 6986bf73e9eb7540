"""Folders written by Hugging Face `datasets`, or of parquet files as on its hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_ffcv.errors import DataError
from data_ffcv.sources.base import Sample, first_line, numbered_class_names, read_classes
from data_ffcv.sources.image import read_image

_KNOWN_PARTS = frozenset(("train", "test", "validation", "valid", "val", "dev"))


@dataclass(frozen=True, eq=False)
class HuggingFaceSource:
    """Rows of a `datasets.Dataset` whose only column is the image, not decoded."""

    path: Path
    classes: tuple[str, ...]
    labels: np.ndarray
    rows: Any
    column: str

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{self.path}, row {index}"

    def read(self, index: int) -> Sample:
        cell = self.rows[index][self.column]
        file = cell and (cell["bytes"] or cell["path"])
        if not file:
            raise DataError("the image is missing; remove the row")
        image, notes = read_image(file)
        return Sample(image, None, notes)


def open_hugging_face(path: Path, part: str, classes: Path | None = None) -> HuggingFaceSource:
    """Opens what `save_to_disk` wrote, or a folder of parquet files.

    The columns of image and label are found by their types. Nothing in the folder is run. Parquet
    files are unpacked into the cache of `datasets` (HF_HOME) first.

    Args:
        path: The folder.
        part: Name of the split.
        classes: Names for labels that are bare numbers; see `read_classes`.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"reading {path} needs the package datasets; run: pip install datasets"
        ) from error
    if not path.is_dir():
        raise DataError(f"{path} is not a folder; give the folder that save_to_disk wrote")
    try:
        rows = _load(datasets, path, part)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{path} cannot be opened by datasets ({first_line(error)}); get it again"
        ) from error
    return _to_source(datasets, path, rows, classes)


def _load(datasets: Any, path: Path, part: str) -> Any:
    """Returns the `datasets.Dataset` of one part."""
    if (path / "dataset_dict.json").is_file():
        parts = datasets.load_from_disk(str(path))
        if part not in parts:
            raise DataError(f"{path} has no part {part!r}; choose one of {', '.join(parts)}")
        return parts[part]
    if (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    files = [str(file) for file in _parquet_files(path, part)]
    return datasets.load_dataset("parquet", data_files={"part": files}, split="part")


def _parquet_files(path: Path, part: str) -> list[Path]:
    """Returns the files of a part: train-00000-of-00002.parquet, or any in a folder train."""
    part_of = {}
    for file in sorted(path.rglob("*.parquet")):
        words = (*file.relative_to(path).parts[:-1], file.stem.split("-")[0])
        part_of[file] = next((word for word in words if word in {part, *_KNOWN_PARTS}), None)
    if not part_of:
        raise DataError(f"{path} holds neither a saved data set nor .parquet files; give another")
    if not any(part_of.values()):  # the folder of one part
        return list(part_of)
    files = [file for file, name in part_of.items() if name == part]
    if not files:
        parts = ", ".join(sorted({name for name in part_of.values() if name}))
        raise DataError(f"{path} has no part {part!r}; choose one of {parts}")
    return files


def _to_source(datasets: Any, path: Path, rows: Any, classes: Path | None) -> HuggingFaceSource:
    kinds = rows.features
    image = _only(
        [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)], "image", path
    )
    named = [name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    numbers = [name for name, kind in kinds.items() if _is_integer(datasets, kind)]
    label = _only(named or numbers, "label", path)
    column = rows.data.column(label)
    if column.null_count or not len(column):
        raise DataError(f"{path} has no label for some rows, or no rows; choose another part")
    labels = column.to_numpy().astype(np.int64)
    if classes:
        names = read_classes(classes)
    else:
        names = tuple(kinds[label].names) if named else numbered_class_names(labels.max(), path)
    if not 0 <= labels.min() <= labels.max() < len(names):
        raise DataError(
            f"{path} has labels from {labels.min()} to {labels.max()} for {len(names)} classes; "
            "choose a part with labels or give other classes"
        )
    rows = rows.select_columns(image).cast_column(image, datasets.Image(decode=False))
    return HuggingFaceSource(path, names, labels, rows, image)


def _is_integer(datasets: Any, kind: Any) -> bool:
    return isinstance(kind, datasets.Value) and kind.dtype.startswith(("int", "uint"))


def _only(columns: list[str], what: str, path: Path) -> str:
    if len(columns) == 1:
        return columns[0]
    actual = f"several {what} columns ({', '.join(columns)})" if columns else f"no {what} column"
    raise DataError(f"{path} has {actual}; keep exactly one, by select_columns, and save it again")
