"""Heads of MAE-CT in files: ours and the published ones, which have the same names."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mlomae.checkpoint.folders import find_checkpoint
from mlomae.contrastive.queue import Queue
from mlomae.contrastive.recipe import HeadRun, TuneRun
from mlomae.errors import UserError
from mlomae.foreign.files import read_tensors
from mlomae.models.contrastive import NnclrHead

HEAD_FILE = "head.safetensors"
_QUEUE = ("queue", "queue_y", "queue_id", "queue_ptr")


def build_head(recipe: HeadRun | TuneRun) -> NnclrHead:
    """An untrained head, drawn from the recipe's seed."""
    sizes = recipe.nnclr
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed + 3)  # the networks of pretraining take those below
        return NnclrHead(
            recipe.model.embed_dim,
            sizes.projector_hidden_dim,
            sizes.projection_dim,
            sizes.predictor_hidden_dim,
        )


def read_head(recipe: TuneRun) -> dict[str, Tensor]:
    """The tensors of `head_from`: a file, or the newest checkpoint of a run.

    Raises:
        UserError: nothing is there, or it is not the recipe's head.
    """
    path = recipe.head_from
    if not path.exists():
        raise UserError(f"head_from {path} does not exist: give a head's file, or a run of one")
    if path.is_dir():
        path = find_checkpoint(path) / HEAD_FILE
    state = read_tensors(path)
    wanted = _wanted(recipe)
    missing = [name for name in (*wanted, *_QUEUE) if name not in state]
    if missing:
        raise UserError(
            f"head_from {path} is no contrastive head (it lacks {', '.join(missing[:3])}): give "
            "the file of an MAE-CT head, or a run of the step head"
        )
    for name, shape in wanted.items():
        if state[name].shape != shape:
            raise UserError(
                f"head_from {path} does not fit the recipe: {name} is {[*state[name].shape]} there "
                f"and {[*shape]} in the recipe's head: fix the sizes in model and nnclr"
            )
    return state


def load_head(head: NnclrHead, queue: Queue, state: dict[str, Tensor]) -> None:
    """Fill a new head and its queue with what `read_head` gave; nothing of it changes nothing."""
    if not state:
        return
    head.load_state_dict({name: state[name] for name in head.state_dict()})
    queue.load_state_dict({name: state[name] for name in _QUEUE})


def _wanted(recipe: TuneRun) -> dict[str, torch.Size]:
    """Names and shapes that a head file must have."""
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in build_head(recipe).state_dict().items()}
    size = recipe.nnclr.queue_size
    vectors = torch.Size((size, recipe.nnclr.projection_dim))
    return wanted | {"queue": vectors, "queue_y": vectors[:1], "queue_id": vectors[:1]}


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without that beginning."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
