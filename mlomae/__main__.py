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
    parser = _parser("gradcheck", _gradcheck.__doc__)
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


def _export(arguments: Sequence[str]) -> int:
    """Write a run's weights as timm, Transformers or ONNX load them."""
    parser = _parser("export", _export.__doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder, or one of its checkpoint folders")
    parser.add_argument(
        "--format", required=True, choices=("timm", "hf", "safetensors", "onnx"), help="for whom"
    )
    parser.add_argument("--output", metavar="DIR", help="a new folder (default: RUN/export/FORMAT)")
    given = parser.parse_args(arguments)

    from mlomae.export import main as export

    return export(given.run, given.format, given.output)


def _show_masks(arguments: Sequence[str]) -> int:
    """Draw the masks of a run on your images."""
    parser = _parser("show-masks", _show_masks.__doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder, or one of its checkpoint folders")
    parser.add_argument("--images", required=True, metavar="DIR", help="a folder of images")
    parser.add_argument(
        "--output", metavar="FILE", help="the picture (default: RUN/masks_<name of DIR>.png)"
    )
    parser.add_argument("--num_images", type=int, default=8, help="rows (default: %(default)s)")
    given = parser.parse_args(arguments)

    from mlomae.show_masks import main as show_masks

    return show_masks(given.run, given.images, given.output, given.num_images)


def _preflight(arguments: Sequence[str]) -> int:
    """Check the hosts of a launch: ssh, packages, GPUs, data, folders, clocks, ports."""
    parser = _parser("preflight", _preflight.__doc__)
    parser.add_argument("--hostfile", metavar="H", help="as deepspeed takes it; without, localhost")
    parser.add_argument("--recipe", help="a YAML file, or a shipped recipe's name")
    parser.add_argument("--deepspeed_config", help="a DeepSpeed JSON file; checked with the recipe")
    parser.add_argument("--output_dir", metavar="DIR", help="in place of the recipe's")
    parser.add_argument(
        "--full_checksum",
        action="store_true",
        help="compare all bytes of the data, not both ends of each file and 64 blocks between",
    )
    parser.add_argument("--master_addr", help="the first host's address (default: as deepspeed)")
    parser.add_argument(
        "--master_port", type=int, default=29500, help="of the rendezvous (default: %(default)s)"
    )
    parser.add_argument("--ssh_port", type=int, help="of all hosts (default: as ssh)")
    parser.add_argument("overrides", nargs="*", metavar="key.subkey=value")
    given = parser.parse_intermixed_args(arguments)

    from mlomae.preflight.command import Request
    from mlomae.preflight.command import main as preflight

    return preflight(Request(**vars(given)))


def _plan(arguments: Sequence[str]) -> int:
    """Say what a run takes before it is paid for: memory, time, network, loaders."""
    parser = _parser("plan", _plan.__doc__)
    parser.add_argument("--recipe", required=True, help="a YAML file, or a shipped recipe's name")
    parser.add_argument("--deepspeed_config", required=True, help="a DeepSpeed JSON file")
    parser.add_argument("--nodes", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--gpu", default="a100-80gb", help="its name (default: %(default)s)")
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
        "--num_images", type=int, help="in data.train (default: counted there, if it is here)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.subkey=value")
    given = parser.parse_intermixed_args(arguments)

    from mlomae.plan.command import Request
    from mlomae.plan.command import main as plan

    return plan(Request(**vars(given)))


def _parser(command: str, description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"python -m mlomae {command}", description=description)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "gradcheck": _gradcheck,
    "export": _export,
    "show-masks": _show_masks,
    "preflight": _preflight,
    "plan": _plan,
}


if __name__ == "__main__":
    sys.exit(main())
