"""From a command line to an exit code."""

import argparse
import errno
import json
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from data_ffcv import DataError
from mlomae.checkpoint.run_lock import release_all
from mlomae.distributed.rendezvous import COLLECTIVE_TIMEOUT
from mlomae.distributed.start import (
    report,
    report_lost_rank,
    set_up_logging,
    start_ranks,
)
from mlomae.distributed.watchdog import EX_TEMPFAIL
from mlomae.errors import UserError
from mlomae.recipe import RunRecipe
from mlomae.training.engines import NonFiniteError
from mlomae.training.program import Job, Program, check_job, make_job, run_job
from mlomae.training.trainer import Stopped

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=RunRecipe)


def run_program(program: Program[Any], description: str, argv: Sequence[str] | None = None) -> int:
    """Do what a command line asks of a program, and return the exit code."""
    arguments, overrides = parse_arguments(description, argv)
    return launch(
        program, arguments.recipe, arguments.deepspeed_config, arguments.resume, overrides
    )


def train_or_evaluate(
    program: Program[R],
    description: str,
    argv: Sequence[str] | None,
    evaluate: Callable[[Job[R], str], None],
    *,
    metavar: str,
    help: str,
) -> int:
    """Train as `run_program` does or, with `--evaluate`, count with what was trained before.

    Args:
        evaluate: counts with the weights that the flag names. All ranks call it.
        metavar, help: of the flag.
    """

    def add_evaluate(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--evaluate", metavar=metavar, help=help)

    arguments, overrides = parse_arguments(description, argv, add_evaluate)
    files = arguments.recipe, arguments.deepspeed_config
    if arguments.evaluate is None:
        return launch(program, *files, arguments.resume, overrides)

    def work() -> None:
        _refuse_beside_evaluate(arguments)
        evaluate(make_job(program.schema, *files, overrides=overrides), arguments.evaluate)

    return exit_code(work)


def parse_arguments(
    description: str,
    argv: Sequence[str] | None = None,
    add: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> tuple[argparse.Namespace, list[str]]:
    """The flags of a training program, and the overrides of its recipe.

    Args:
        add: adds the flags that this program alone has.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", required=True, help="a YAML file, or a shipped recipe's name")
    parser.add_argument("--deepspeed_config", required=True, help="a DeepSpeed JSON file")
    parser.add_argument(
        "--resume", action="store_true", help="continue from output_dir's newest checkpoint"
    )
    parser.add_argument(
        "--init_from",
        action="append",
        metavar="PATH",
        help="start from these weights; twice for encoder and decoder in two files",
    )
    parser.add_argument(
        "--init_from_expected",
        action="append",
        metavar="NAME",
        help="a name, with * for any text, that may be missing from them or left over",
    )
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; unused")
    add(parser)
    parser.add_argument("overrides", nargs="*", metavar="key.subkey=value")
    arguments = parser.parse_intermixed_args(argv)
    weights = [
        f"{key}={json.dumps(values)}"
        for key in ("init_from", "init_from_expected")
        if (values := getattr(arguments, key))
    ]
    return arguments, weights + arguments.overrides


def _refuse_beside_evaluate(arguments: argparse.Namespace) -> None:
    """Refuse flags that only training heeds, beside `--evaluate`.

    Raises:
        UserError: names the flag.
    """
    for flag in ("resume", "init_from", "init_from_expected"):
        if getattr(arguments, flag):
            raise UserError(
                f"--{flag} is for training, and --evaluate says what is counted with: remove one"
            )


def launch(
    program: Program[Any],
    recipe: str,
    deepspeed_config: str,
    resume: bool,
    overrides: Sequence[str],
) -> int:
    """Check, train, and return the exit code of `exit_code`."""

    def work() -> None:
        job = make_job(program.schema, recipe, deepspeed_config, resume, overrides)
        check_job(program, job)
        start_ranks(COLLECTIVE_TIMEOUT)
        run_job(program, job)

    return exit_code(work)


def exit_code(work: Callable[[], None]) -> int:
    """Do the work of a rank, turn what ends it into a sentence and an exit code.

    0: finished. 1: the numbers broke down. 2: bad input, or an output_dir that cannot be written.
    75: another rank is gone, or hung. 128 + n: stopped by signal n, saved.
    """
    set_up_logging()
    try:
        work()
    except (UserError, DataError) as error:
        report(error)
        return 2
    except NonFiniteError as error:
        report(error)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        report(UserError(f"{error}: free some space below output_dir, and continue with --resume"))
        return 2
    except Stopped as stopped:
        logger.info("%s", stopped)
        return stopped.code
    except RuntimeError as error:
        if not _LOST_RANK.search(str(error)):
            raise
        report_lost_rank(error)
        return EX_TEMPFAIL
    finally:
        release_all()
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


# how gloo and NCCL say that the process at the other end has ended
_LOST_RANK = re.compile("(closed|reset) by peer|Broken pipe|remote process exited")
