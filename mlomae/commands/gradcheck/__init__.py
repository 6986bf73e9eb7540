"""Check every hypergradient estimator against float64, on a recipe at reduced size."""

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Do what the command line asks for, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mlomae gradcheck", description=__doc__)
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
    parsed = parser.parse_intermixed_args(argv)

    from mlomae.commands.gradcheck import command  # late, so that --help is quick

    return command.main(parsed.recipe, parsed.deepspeed_config, parsed.overrides)
