"""The commands of this package: `python -m mlomae COMMAND ...`."""

import argparse
import sys
from collections.abc import Callable, Sequence


def main() -> int:
    """Parse the command line and run a command."""
    parser = argparse.ArgumentParser(
        prog="python -m mlomae", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.epilog = "\n".join(f"{name:12} {run.__doc__}" for name, run in COMMANDS.items())
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # set by the deepspeed launcher
    parser.add_argument(
        "command", choices=COMMANDS, help="what to do; each has a --help of its own"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    return COMMANDS[arguments.command](arguments.arguments)


def _gradcheck(arguments: Sequence[str]) -> int:
    """Check every hypergradient estimator against float64, on a recipe at reduced size."""
    parser = argparse.ArgumentParser(
        prog="python -m mlomae gradcheck", description=_gradcheck.__doc__
    )
    parser.add_argument(
        "--recipe",
        default="quickstart_mlo_mae",
        help="a YAML file, or a shipped recipe's name (default: %(default)s)",
    )
    parser.add_argument(
        "--deepspeed_config",
        help="a DeepSpeed JSON file (default: ZeRO-2, in bf16 on GPUs and in fp32 without)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.subkey=value")
    given = parser.parse_intermixed_args(arguments)

    from mlomae.gradcheck import main as gradcheck  # late, so that --help is quick

    return gradcheck(given.recipe, given.deepspeed_config, given.overrides)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"gradcheck": _gradcheck}


if __name__ == "__main__":
    sys.exit(main())
