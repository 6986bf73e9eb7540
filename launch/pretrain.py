"""Pretrain MLO-MAE or plain MAE on any number of GPUs, or on CPU.

    deepspeed [--hostfile H] launch/pretrain.py --recipe R.yaml --deepspeed_config D.json \\
        [--init_from PATH] [--resume] [key.subkey=value ...]
"""

import argparse
import json
import sys


def main() -> int:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
        help="start from these weights; given twice for encoder and decoder in two files",
    )
    parser.add_argument(
        "--init_from_expected",
        action="append",
        metavar="NAME",
        help="a name, with * for any text, that may be missing from them or left over",
    )
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; unused")
    parser.add_argument("overrides", nargs="*", metavar="key.subkey=value")
    arguments = parser.parse_intermixed_args()
    overrides = [
        f"{key}={json.dumps(given)}"
        for key in ("init_from", "init_from_expected")
        if (given := getattr(arguments, key))
    ]

    from mlomae.train import main as train  # late, so that --help is quick

    return train(
        arguments.recipe,
        arguments.deepspeed_config,
        arguments.resume,
        overrides + arguments.overrides,
    )


if __name__ == "__main__":
    sys.exit(main())
