"""The commands of this package: `python -m mlomae COMMAND ...`."""

import argparse
import importlib
import sys

COMMANDS = {
    "quickstart": "Train on small images, from data to a report, in minutes.",
    "gradcheck": "Check every hypergradient estimator against float64, on a reduced recipe.",
    "plan": "Estimate a run before it starts: memory, time, communication, loader rate.",
    "preflight": "Check the hosts of a launch: ssh, packages, GPUs, data, folders, clocks, ports.",
    "export": "Write a run's weights as timm, Transformers or ONNX load them.",
    "show-masks": "Draw the masks of a run on your images.",
}


def main() -> int:
    """Parse the command line and run a command."""
    parser = argparse.ArgumentParser(
        prog="python -m mlomae", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.epilog = "\n".join(f"{name:12} {summary}" for name, summary in COMMANDS.items())
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # set by the deepspeed launcher
    parser.add_argument(
        "command", choices=COMMANDS, help="what to do; each has a --help of its own"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    module = importlib.import_module(f"mlomae.commands.{arguments.command.replace('-', '_')}")
    exit_code: int = module.main(arguments.arguments)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
