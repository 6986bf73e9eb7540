"""What the plan predicts of memory and communication, against real processes on the CPU.

Every case is a recipe on a DeepSpeed JSON and a number of ranks: `python -m mlomae plan` would say
what one rank holds and sends, and the ranks really run two cycles of it on random images, of which
the second counts. See `_memory_ranks.py` for how bytes are counted.
"""

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _about import HERE, about, save, table

from mlomae.commands.plan.cycle import Cycle, simulate
from mlomae.pretraining.recipe import PretrainingRecipe

ROOT = HERE.parent
METHODS = ("mae", "mlo_mae")
TIMEOUT = 900


def main() -> None:
    """Predict and measure all cases, and write the table."""
    args = _parse()
    head = about("memory.py", "cpu")
    cases = [_case(args, *chosen) for chosen in itertools.product(
        args.methods, args.num_ranks, args.precisions, args.stages)]  # fmt: skip
    head["model"] = f"{args.model} at {args.image_size} pixels, {args.batch_size} images a rank"
    rows, found = [], []
    for group in [cases] if args.together else [[case] for case in cases]:
        for case, measured in zip(group, _measure(group), strict=True):
            one = _compare(case, measured)
            found.append(one)
            rows.append(_row(one))
            print("  ".join(rows[-1]), flush=True)
    heads = ["method, ranks, precision, ZeRO", "at rest MB", "plan", "peak MB", "plan"]
    heads += ["moment", "sent MB", "plan"]
    text = save(args.output, args.name, "Memory and communication", head, table(heads, rows))
    (args.output / f"{head['date']}-{args.name}.json").write_text(
        json.dumps(found, indent=1) + "\n"
    )
    print(text)


def _case(
    args: argparse.Namespace, method: str, num_ranks: int, precision: str, stage: int
) -> dict[str, Any]:
    level = {"batch_size": args.batch_size * num_ranks, "lr": 1e-4, "weight_decay": 0.01}
    names = ("pretrain",) if method == "mae" else ("pretrain", "classifier", "mask")
    preset, _, patch_size = args.model.rpartition("_patch")
    model = {"preset": preset, "image_size": args.image_size, "patch_size": int(patch_size)}
    if args.depth:
        model |= {"depth": args.depth, "decoder_depth": args.depth}
    levels = {name: dict(level) for name in names}
    levels["pretrain"]["gradient_accumulation_steps"] = args.gradient_accumulation_steps
    data = {"train": "random"} | ({} if method == "mae" else {"num_classes": 100})
    recipe = {"method": method, "output_dir": "none", "epochs": 1.0, "masking": {}, "data": data}
    zero = {"stage": stage, "reduce_bucket_size": args.bucket_size, "overlap_comm": args.overlap}
    zero |= {"stage3_prefetch_bucket_size": args.bucket_size}
    return {
        "name": f"{method}, {num_ranks}, {precision}, {stage}",
        "num_ranks": num_ranks,
        "recipe": recipe | {"model": model} | levels,
        "config": {
            "zero_optimization": zero,
            "bf16": {"enabled": precision == "bf16"},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        },
    }


def _measure(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run cases of equally many ranks in the same processes."""
    num_ranks = cases[0]["num_ranks"]
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        common = {
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(probe.getsockname()[1]),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "PYTHONPATH": str(ROOT),
        }
        probe.close()
        files = [Path(folder) / name for name in ("cases.json", "result.json")]
        files[0].write_text(json.dumps(cases))
        command = [sys.executable, str(HERE / "_memory_ranks.py"), *map(str, files)]
        ranks = [
            subprocess.Popen(command, env=os.environ | common | {"RANK": str(r), "LOCAL_RANK": "0"})
            for r in range(num_ranks)
        ]
        try:
            codes = [rank.wait(TIMEOUT) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        if any(codes):
            raise SystemExit(f"ranks ended with {codes}")
        found: list[dict[str, Any]] = json.loads(files[1].read_text())
    return found


def _compare(case: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    cycle = simulate(
        PretrainingRecipe.model_validate(case["recipe"]), case["config"], case["num_ranks"]
    )
    return {
        "case": case["name"],
        "measured": measured,
        "planned": {
            "at rest": cycle.at_rest.total,
            "peaks": {name: moment.total for name, moment in cycle.moments.items()},
            "parts": cycle.fullest.parts,
            "sent": _by_phase(cycle),
        },
    }


def _by_phase(cycle: Cycle) -> dict[str, int]:
    found: dict[str, int] = {}
    for (phase, _), num_bytes in cycle.sent.items():
        found[phase] = found.get(phase, 0) + num_bytes
    return found


def _row(one: dict[str, Any]) -> list[str]:
    measured, planned = one["measured"], one["planned"]
    moment, peak = max(planned["peaks"].items(), key=lambda item: item[1])
    sent = sum(measured["sent"].values()), sum(planned["sent"].values())
    pairs = (measured["at rest"], planned["at rest"]), (max(measured["peaks"].values()), peak), sent
    cells = [[f"{real / 1e6:.1f}", f"{100 * (plan / real - 1):+.1f} %"] for real, plan in pairs]
    return [one["case"], *cells[0], *cells[1], moment, *cells[2]]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    flags = parser.add_argument
    flags("--model", default="vit_tiny_patch16", help="preset and patch size")
    flags("--depth", type=int, help="blocks of encoder and of decoder, in place of the preset's")
    flags("--image_size", type=int, default=224)
    flags("--batch_size", type=int, default=8, help="images of every level on a rank")
    flags("--gradient_accumulation_steps", type=int, default=1)
    flags("--bucket_size", type=int, default=5_000_000, help="elements of ZeRO's buckets")
    flags("--overlap", action="store_true", help="overlap_comm")
    flags("--methods", nargs="*", choices=METHODS, default=METHODS)
    flags("--num_ranks", nargs="*", type=int, default=[2])
    flags("--precisions", nargs="*", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    flags("--stages", nargs="*", type=int, choices=range(4), default=[0, 1, 2, 3])
    flags("--together", action="store_true", help="all cases in the same processes: quicker")
    flags("--name", default="memory-cpu", help="of the result files")
    flags("--output", type=Path, default=HERE / "results", help="folder of the result files")
    return parser.parse_args()


if __name__ == "__main__":
    main()
