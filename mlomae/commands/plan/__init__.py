"""Estimate a run before it starts: memory, time, communication, loader rate."""

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Do what the command line asks for, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mlomae plan", description=__doc__)
    parser.add_argument("--recipe", required=True, help="a YAML file, or a shipped recipe's name")
    parser.add_argument("--deepspeed_config", required=True, help="a DeepSpeed JSON file")
    parser.add_argument("--nodes", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--gpu", default="a100-80gb", help="GPU model (default: %(default)s)")
    parser.add_argument(
        "--utilization",
        type=float,
        default=0.4,
        help="share of the peak FLOP/s that is reached: an assumption (default: %(default)s)",
    )
    parser.add_argument(
        "--bandwidth",
        type=float,
        default=25.0,
        help="GB/s that a node sends to others, all its network cards (default: %(default)s)",
    )
    parser.add_argument(
        "--num_images", type=int, help="training images (default: counted in data.train)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.subkey=value")
    parsed = parser.parse_intermixed_args(argv)

    from mlomae.commands.plan import command  # late, so that --help is quick

    return command.main(command.PlanRequest(**vars(parsed)))
