"""Filling a masked autoencoder with pretrained weights: all keys fit, or an error lists them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from mlomae.errors import UserError
from mlomae.foreign.fix import suggest_fix
from mlomae.foreign.layouts import to_timm
from mlomae.foreign.read import HEAD_LAYOUTS, HEADS, PretrainedWeights, grid_size, read_weights
from mlomae.models import MaskedAutoencoder

log = logging.getLogger(__name__)

Parts = Literal["all", "encoder"]


@dataclass
class Loaded:
    """What `load_weights` did, by names of tensors: those that it filled, and those it did not."""

    files: list[Path]
    names: list[str] = field(default_factory=list)
    interpolated: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return " and ".join(map(str, self.files))


def load_weights(
    model: MaskedAutoencoder,
    paths: Sequence[str | Path],
    *,
    expected: Sequence[str] = (),
    parts: Parts = "all",
) -> Loaded:
    """Fill a model with the weights of one file, or of several that together hold it.

    Positions of another grid are interpolated (bicubic, as MAE does; the class row is kept).
    Values are cast to the model's dtype. Nothing of the model is changed when this raises.

    Args:
        model: not yet sharded; on any device.
        paths: files or folders as `find_file` takes them.
        expected: globs of names that may be missing, unexpected or of another shape; such tensors
            of the model keep their values.
        parts: "encoder" neither needs nor takes the decoder.

    Raises:
        UserError: a file cannot be read, or a key does not fit and is not named in `expected`.
    """
    tensors, done = _fit(model, paths, expected, parts)
    model.load_state_dict({name: tensors[name] for name in done.names}, strict=False)
    num_wanted = len(_part(model.state_dict(), parts))
    log.info("%d of %d tensors loaded from %s", len(done.names), num_wanted, done)
    return done


def check_weights(
    model: MaskedAutoencoder,
    paths: Sequence[str | Path],
    *,
    expected: Sequence[str] = (),
    parts: Parts = "all",
) -> None:
    """Raise as `load_weights` would, for a model that may be on the meta device."""
    _fit(model, paths, expected, parts)


def _fit(
    model: MaskedAutoencoder, paths: Sequence[str | Path], expected: Sequence[str], parts: Parts
) -> tuple[dict[str, Tensor], Loaded]:
    """The tensors of the files under the model's names, at the model's grid."""
    files = [read_weights(path, num_patches=model.num_patches) for path in paths]
    done = Loaded([weights.file for weights in files])
    tensors: dict[str, Tensor] = {}
    for weights in files:
        _check_model(weights, model, parts)
        _add(tensors, _fit_positions(weights, model, parts, done), weights.file)
    if parts == "encoder" and "patch_embed.proj.weight" not in tensors:
        raise UserError(f"{done} holds no encoder: give the encoder's file")
    wanted = _part(model.state_dict(), parts)
    _compare(tensors, wanted, done)
    _check_names(tensors, wanted, expected, done)
    _check_values(tensors, done)
    return tensors, done


def _part(state: dict[str, Tensor], parts: Parts) -> dict[str, Tensor]:
    return to_timm(state) if parts == "encoder" else dict(state)


def _check_model(weights: PretrainedWeights, model: MaskedAutoencoder, parts: Parts) -> None:
    """What no shape tells: the kind of a head's file, and how many heads attend."""
    if weights.layout in HEAD_LAYOUTS:
        raise UserError(
            f"{weights.file} holds a {weights.layout.replace('_', ' ')} and no part of the masked "
            "autoencoder: leave it out"
        )
    tensors = _part(weights.tensors, parts)
    for key, prefix in (("num_heads", "blocks"), ("decoder_num_heads", "decoder_blocks")):
        theirs = weights.config.get(key)
        ours = getattr(model, prefix)[0].attn.num_heads
        if f"{prefix}.0.norm1.weight" in tensors and theirs not in (None, ours):
            raise UserError(
                f"{weights.file} is of {theirs} heads where the model has {ours}: "
                f"set model.{key}={theirs}"
            )
    usual = HEADS.get(model.embed_dim, model.num_heads)
    if "num_heads" not in weights.config and usual != model.num_heads:
        message = "%s does not tell its heads: published encoders %d wide have %d, the model has %d"
        log.warning(message, weights.file, model.embed_dim, usual, model.num_heads)


def _fit_positions(
    weights: PretrainedWeights, model: MaskedAutoencoder, parts: Parts, done: Loaded
) -> dict[str, Tensor]:
    """The tensors of a file, with the positions [1, 1 + N, D] brought to the model's grid."""
    tensors = _part(weights.tensors, parts)
    for name in ("pos_embed", "decoder_pos_embed"):
        if name not in tensors or tensors[name].ndim != 3:
            continue
        old, new = grid_size(weights, name, model.patch_size, model.grid_size), model.grid_size
        if old != new:
            tensors[name] = resample_abs_pos_embed(
                tensors[name], list(new), list(old), antialias=False
            )
            done.interpolated.append(name)
            message = "%s: %s interpolated from a grid of %d x %d patches to %d x %d"
            log.info(message, weights.file, name, *old, *new)
    return tensors


def _add(tensors: dict[str, Tensor], more: dict[str, Tensor], file: Path) -> None:
    if twice := sorted(tensors.keys() & more.keys()):
        raise UserError(
            f"{file} holds {', '.join(twice)}, which another file holds as well: "
            "give each part of the model once"
        )
    tensors.update(more)


def _compare(tensors: dict[str, Tensor], wanted: dict[str, Tensor], done: Loaded) -> None:
    done.missing = [name for name in wanted if name not in tensors]
    done.unexpected = [name for name in tensors if name not in wanted]
    shared = [name for name in wanted if name in tensors]
    done.misshapen = [name for name in shared if tensors[name].shape != wanted[name].shape]
    done.names = [name for name in shared if name not in done.misshapen]


def _check_names(
    tensors: dict[str, Tensor], wanted: dict[str, Tensor], expected: Sequence[str], done: Loaded
) -> None:
    def surprising(names: list[str]) -> list[str]:
        return [n for n in names if not any(fnmatchcase(n, glob) for glob in expected)]

    misshapen = surprising(done.misshapen)
    shapes = [
        f"{n} is {[*tensors[n].shape]} there and {[*wanted[n].shape]} in the model"
        for n in misshapen
    ]
    missing, unexpected = surprising(done.missing), surprising(done.unexpected)
    listed = {"missing": missing, "unexpected": unexpected, "misshapen": shapes}
    problems = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in listed.items() if names)
    if problems:
        advice = suggest_fix(tensors, wanted, [*missing, *unexpected, *misshapen])
        raise UserError(f"{done} does not fit the model: {advice} ({problems})")
    if not done.names:
        raise UserError(f"{done} fills nothing of the model: name fewer keys as expected")


def _check_values(tensors: dict[str, Tensor], done: Loaded) -> None:
    if integer := [n for n in done.names if not tensors[n].is_floating_point()]:
        raise UserError(f"{done} holds no real numbers in {', '.join(integer)}: give other weights")
    if broken := [name for name in done.names if not torch.isfinite(tensors[name]).all()]:
        raise UserError(
            f"{done} holds NaN or infinite values in {', '.join(broken)}: "
            "its training diverged, give an earlier checkpoint"
        )
