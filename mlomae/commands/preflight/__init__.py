"""Check the hosts of a launch: ssh, packages, GPUs, data, folders, clocks, ports."""

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Do what the command line asks for, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mlomae preflight", description=__doc__)
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
        "--master_port", type=int, default=29500, help="rendezvous port (default: %(default)s)"
    )
    parser.add_argument("--ssh_port", type=int, help="ssh port of every host (default: as ssh)")
    parser.add_argument("overrides", nargs="*", metavar="key.subkey=value")
    parsed = parser.parse_intermixed_args(argv)

    from mlomae.commands.preflight import command  # late, so that --help is quick

    return command.main(command.PreflightRequest(**vars(parsed)))
