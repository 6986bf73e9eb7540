"""What the evaluation commands share: flags, processes, checks, and how a result comes about."""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_ffcv import DataError
from eval.frozen.encoders import Encoder, of_run, of_weights
from eval.frozen.features import EncodedSets, ImageSets
from eval.frozen.flag_recipe import parse_with_recipe
from eval.frozen.flags import PRECISIONS
from eval.frozen.processes import is_launched, joined
from eval.frozen.result import make_folder, refuse_run_folder, show, write_result
from mlomae.distributed.collectives import rank, world_size
from mlomae.environment import describe_machine
from mlomae.errors import UserError

STOPPED = 130  # what a shell says of a program that Ctrl-C ended


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one encoder.

    Attributes:
        features: folder of the features on disk.
        output_dir: folder of the result; exists.
    """

    encoder: Encoder
    device: torch.device
    features: Path
    output_dir: Path

    def encode(self, sets: ImageSets) -> EncodedSets:
        """Features of a training and a test set. All ranks must call."""
        return sets.encode(self.encoder, self.features, self.device)


def refuse_weights_flags(args: argparse.Namespace, instead: str) -> None:
    """Refuse flags that only `--init_from` heeds."""
    for flag in ("init_from_expected", "image_size", "num_heads", "global_pool"):
        if getattr(args, flag):
            raise UserError(f"--{flag} is for --init_from, and {instead} has its recipe: remove it")


def pretrained_encoder(
    args: argparse.Namespace, paths: Sequence[str], *, with_decoder: bool = False
) -> Encoder:
    """The encoder of weights that are no run's, as the flags say."""
    return of_weights(
        paths,
        image_size=args.image_size,
        global_pool=args.global_pool,
        num_heads=args.num_heads,
        expected=args.init_from_expected,
        with_decoder=with_decoder,
    )


def default_device() -> torch.device:
    """This process's GPU where there is one, the CPU otherwise."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def evaluate_encoder(
    args: argparse.Namespace,
    name: str,
    evaluate: Callable[[Evaluation], dict[str, Any]],
    protocol: str,
    *,
    with_decoder: bool = False,
) -> None:
    """Run one evaluation of one encoder as the flags say; write and show its result.

    All ranks must call.

    Args:
        name: of the evaluation.
        evaluate: returns what result.json says of it: floats are what was measured, and `settings`
            is among them. What ranks other than the first return is not looked at.
        protocol: what the report says of it.
        with_decoder: the model's decoder is needed.

    Raises:
        DataError, UserError: An input is bad; nothing has been written.
    """
    start = time.perf_counter()
    encoder = _encoder(args, with_decoder)
    folder = args.output_dir or _default_folder(args, name)
    kept = getattr(args, "features", None)
    features = kept or (folder if args.output_dir else folder.parent) / "features"
    refuse_run_folder(folder, "--output_dir")
    make_folder(folder, "--output_dir")
    measured = evaluate(Evaluation(encoder, default_device(), features, folder))
    if rank() != 0:
        return
    result = {
        "evaluation": name,
        "encoder": encoder.name,
        **encoder.source,
        **{key: getattr(args, key) for key in ("train", "test") if hasattr(args, key)},
        **measured,
        "precision": args.precision,
        "num_ranks": world_size(),
        "command": args.command,
        "machine": describe_machine(),
        "seconds": round(time.perf_counter() - start, 3),
    }
    write_result(folder, result, protocol)
    show(result, folder)


def _encoder(args: argparse.Namespace, with_decoder: bool) -> Encoder:
    encoder = _load_encoder(args, with_decoder)
    encoder.model.to(PRECISIONS[args.precision])
    return encoder


def _load_encoder(args: argparse.Namespace, with_decoder: bool) -> Encoder:
    if args.checkpoint is not None:
        refuse_weights_flags(args, "--checkpoint")
        return of_run(args.checkpoint, untrained=args.untrained, with_decoder=with_decoder)
    if args.untrained:
        raise UserError("--untrained is for a run: give --checkpoint instead of --init_from")
    if args.output_dir is None:
        raise UserError("--output_dir is missing: weights that are no run's have no folder for it")
    return pretrained_encoder(args, args.init_from, with_decoder=with_decoder)


def _default_folder(args: argparse.Namespace, name: str) -> Path:
    """RUN/eval/NAME; results of one checkpoint folder get a folder of its name."""
    name = f"{name}_untrained" if args.untrained else name
    run: Path = args.checkpoint
    if run.parent.name == "checkpoints":
        return run.parents[1] / "eval" / run.name / name
    return run / "eval" / name


def describe(data: EncodedSets) -> dict[str, int]:
    """The counts every result carries."""
    return {
        "num_train_images": len(data.train.labels),
        "num_test_images": len(data.test.labels),
        "num_classes": data.num_classes,
    }


def run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    command: Callable[[argparse.Namespace], None],
) -> int:
    """Return the exit code of a command; bad input becomes one sentence and code 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args = parse_with_recipe(parser, argv)
        with joined():
            starter = "deepspeed" if world_size() > 1 else "python"
            flags = [text for text in argv if not text.startswith("--local_rank")]
            args.command = shlex.join([starter, parser.prog, *flags])
            command(args)
    except (UserError, DataError) as error:
        _report(error)
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("error: stopped; the same command goes on with the features it has\n")
        return STOPPED
    return 0


def _report(error: Exception) -> None:
    if is_launched():
        from mlomae.distributed.start import report  # late: it loads DeepSpeed

        report(error)
    else:
        sys.stderr.write(f"error: {error}\n")
