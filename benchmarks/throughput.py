"""Images per second of training steps, against a plain loop of timm blocks in the same run.

Contenders: `plain loop` (`_plain_mae.py`), `mae` (one step of the program's plain MAE), `mlo_mae`
(its cycle of one encoder step, one classifier step and one mask step, with batches of equal size).
Data are synthetic and stay on the device. Contenders take turns in every round; the table has
medians and ratios within the run.

Model FLOP utilisation is FLOPs of the mathematics per second over the peak of the device:

    mae: 3 F              mlo_mae: 3 F + E + (2 F + 6 E)

where F is a masked forward pass and E a pass of the encoder over all patches, counted by PyTorch's
FLOP counter on the meta device, a multiplication and an addition as two. A backward pass counts
twice its forward pass. In the cycle, the encoder step is 3 F, the features of the classifier are E,
and the mask update counts as its bound of 2 F + 6 E. What is computed twice to save memory is not
counted.
"""

import argparse
import gc
import itertools
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from _about import HERE, about, save, table
from _measure import seconds_of
from _plain_mae import PlainLoop
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mlomae.commands.gradcheck.memory import PeakMemory
from mlomae.distributed.start import start_ranks
from mlomae.errors import UserError
from mlomae.models import MaskedAutoencoder
from mlomae.models.attention import check_backend
from mlomae.pretraining.images import LevelImages
from mlomae.pretraining.program import build_levels, build_task
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.pretraining.task import MloMaePretraining
from mlomae.training.deepspeed_config import check_deepspeed_config, load_deepspeed_config
from mlomae.training.program import Job

PEAK_TFLOPS = {  # dense bfloat16, as the vendor states it; the first name that fits counts
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "L40S": 362.0,
    "A100": 312.0,
    "RTX 4090": 165.2,
}
NUM_CLASSES = 1000
NUM_WARM_STEPS = 2
BASELINE = "plain loop"


@dataclass(frozen=True)
class Settings:
    """One row of an ablation."""

    model: str
    image_size: int
    batch_size: int
    attention: str
    is_compiled: bool
    is_fused: bool
    config: dict[str, Any]

    def recipe(self, method: str) -> PretrainingRecipe:
        """A recipe of the program that trains this model."""
        preset, _, patch_size = self.model.removeprefix("mae_").rpartition("_patch")
        level = {"batch_size": self.batch_size, "lr": 1e-4}
        names = ("pretrain", "classifier", "mask") if method == "mlo_mae" else ("pretrain",)
        model = {"preset": preset, "image_size": self.image_size, "patch_size": int(patch_size)}
        model |= {"attention": self.attention, "compile_blocks": self.is_compiled}
        return PretrainingRecipe.model_validate(
            {"method": method, "output_dir": "synthetic", "epochs": 1.0, "masking": {}}
            | {"data": {"train": "synthetic", "num_classes": NUM_CLASSES}, "model": model}
            | dict.fromkeys(names, level)
        )

    def cells(self) -> list[str]:
        """What differs between the rows of an ablation."""
        flags = ["yes" if flag else "no" for flag in (self.is_compiled, self.is_fused)]
        stage = self.config.get("zero_optimization", {}).get("stage", 0)
        return [self.attention, *flags, str(stage), str(self.dtype).removeprefix("torch.")]

    @property
    def dtype(self) -> torch.dtype:
        """The compute precision that the DeepSpeed config asks for."""
        is_half = self.config.get("bf16", {}).get("enabled", False)
        return torch.bfloat16 if is_half else torch.float32


class Ours:
    """The program's task on its engines, fed with the same images in every level."""

    def __init__(self, settings: Settings, method: str, images: Tensor) -> None:
        recipe = settings.recipe(method)
        names = "the benchmark", "its config"
        check_deepspeed_config(settings.config, recipe, dist.get_world_size(), *names)
        job = Job(recipe, settings.config, *names)
        levels = build_levels(job, num_cycles=10**6)
        for level in levels.values():
            for group in level.optimizer.param_groups:
                group["fused"], group["foreach"] = settings.is_fused or None, None
        sizes = {name: LevelImages(None, range(10**6), None) for name in levels}  # type: ignore[arg-type]
        self.task = build_task(recipe, levels, sizes)
        self.images = images
        self.labels = torch.arange(len(images), device=images.device) % NUM_CLASSES

    def step(self) -> None:
        """One cycle."""
        self.task.pretrain_step([self.images])
        if isinstance(self.task, MloMaePretraining):
            self.task.problem.classifier_step(self.images, self.labels)
            self.task.problem.mask_step(self.images, self.labels)


@dataclass
class Found:
    """What was measured of a contender: seconds of each round's steps, and most bytes at once."""

    seconds: list[float]
    num_bytes: int | None


def main() -> None:
    args = _parse()
    _join()
    device = torch.device("cuda", torch.cuda.current_device()) if args.is_cuda else "cpu"
    head = about("throughput.py", torch.device(device).type)
    head["model"] = f"{args.model} at {args.image_size} pixels, batches of {args.batch_size}"
    heads = ["attention", "compiled", "fused", "ZeRO", "precision", "contender", "images/s"]
    heads += ["range", f"/ {BASELINE}", "utilisation", "peak MB", f"/ {BASELINE}"]
    rows = []
    for settings in _variants(args):
        found = measure(settings, args, torch.device(device))
        rows += _rows(settings, found, args)
    text = save(args.output, f"throughput-{args.name}", "Throughput", head, table(heads, rows))
    if dist.get_rank() == 0:
        print(text)


def _variants(args: argparse.Namespace) -> Iterator[Settings]:
    """The settings asked for, or all of an ablation that work here."""
    config = load_deepspeed_config(args.deepspeed_config)
    base = Settings(args.model, args.image_size, args.batch_size, args.attention,
                    args.compile_blocks, args.fused, config)  # fmt: skip
    if args.stages:
        for stage in range(4):
            zero = config.get("zero_optimization", {}) | {"stage": stage}
            yield replace(base, config=config | {"zero_optimization": zero})
    elif args.ablation:
        device = torch.device("cuda" if args.is_cuda else "cpu")
        backends = [b for b in ("flash_attn", "sdpa", "math") if _works(b, device, base.dtype)]
        for backend, compiled, fused in itertools.product(backends, (False, True), (False, True)):
            yield replace(base, attention=backend, is_compiled=compiled, is_fused=fused)
    else:
        yield base


def _works(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    try:
        check_backend(backend, device, dtype)
    except UserError:
        return False
    return True


def measure(settings: Settings, args: argparse.Namespace, device: torch.device) -> dict[str, Found]:
    """Build the contenders, and time their steps in turns. All ranks must call."""
    torch.manual_seed(0)
    num_images = settings.batch_size // dist.get_world_size()
    images = torch.randn(num_images, 3, settings.image_size, settings.image_size, device=device)
    model = settings.recipe("mae").model
    build = {
        BASELINE: lambda: PlainLoop(model, images, settings.dtype, is_fused=settings.is_fused),
        "mae": lambda: Ours(settings, "mae", images),
        "mlo_mae": lambda: Ours(settings, "mlo_mae", images),
    }
    found, contenders = {}, {}
    for name in [BASELINE, *args.contenders]:
        # Memory that compiled code takes on the CPU cannot be counted.
        is_counted = device.type == "cuda" or not settings.is_compiled
        with PeakMemory(device) if is_counted else nullcontext() as memory:
            contenders[name] = build[name]()
            for _ in range(NUM_WARM_STEPS):
                contenders[name].step()
        contenders[name].step()  # code is compiled once more, without the counter
        found[name] = Found([], memory.bytes if memory else None)
    for _, (name, contender) in itertools.product(range(args.num_rounds), contenders.items()):
        seconds = seconds_of(partial(_run, contender, args.num_steps), device)
        found[name].seconds.append(seconds / args.num_steps)
    contenders.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def _run(contender: PlainLoop | Ours, num_steps: int) -> None:
    for _ in range(num_steps):
        contender.step()


def _rows(settings: Settings, found: dict[str, Found], args: argparse.Namespace) -> list[list[str]]:
    flops = count_flops(settings)
    plain, rows = found[BASELINE], []
    for name, one in found.items():
        rates = sorted(settings.batch_size / seconds for seconds in one.seconds)
        used = median(rates) * flops["mlo_mae" if name == "mlo_mae" else "mae"]
        peak = 1e12 * args.peak_tflops * dist.get_world_size()
        row = [*settings.cells(), name, f"{median(rates):.2f}", f"{rates[0]:.2f}-{rates[-1]:.2f}"]
        row += [f"{median(plain.seconds) / median(one.seconds):.3f}"]
        row += [f"{100 * used / peak:.1f} %" if peak else "-"]
        if one.num_bytes and plain.num_bytes:
            row += [f"{one.num_bytes / 1e6:.0f}", f"{one.num_bytes / plain.num_bytes:.2f}"]
        rows.append(row if one.num_bytes else [*row, "-", "-"])
    return rows


def count_flops(settings: Settings) -> dict[str, float]:
    """FLOPs for each image of the encoder step; see the formula above."""
    recipe = settings.recipe("mae")
    with torch.device("meta"):
        values = recipe.model.model_dump(exclude={"preset"})
        values |= {"compile_blocks": False, "attention": "math"}  # as many operations on any kernel
        model = MaskedAutoencoder(**values, mask_ratio=recipe.masking.mask_ratio)
        images = torch.empty(1, 3, settings.image_size, settings.image_size)

        def count(**options: Any) -> int:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(images, **options)
            return counter.get_total_flops()

        masked, whole = count(scorer=lambda x: x[..., 0]), count()
    return {"mae": 3 * masked, "mlo_mae": 5 * masked + 7 * whole}


def _join() -> None:
    """Join the ranks of a launcher, or be the only one."""
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    start_ranks()


def _peak_tflops() -> float:
    """Of this GPU, 0 where it is not known."""
    if not torch.cuda.is_available():
        return 0.0
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), 0.0)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    is_cuda = torch.cuda.is_available()
    config = "zero2_bf16" if is_cuda else "cpu_zero2_fp32"
    flags = parser.add_argument
    flags("--model", default="mae_vit_base_patch16", help="name in timm's registry")
    flags("--image_size", type=int, default=224)
    flags("--batch_size", type=int, default=128 if is_cuda else 4, help="over all ranks")
    flags("--attention", default="auto", help="auto, flash_attn, sdpa or math")
    flags("--compile_blocks", action="store_true", help="torch.compile for each block")
    flags("--fused", action=argparse.BooleanOptionalAction, default=True, help="fused AdamW")
    flags("--deepspeed_config", default=str(HERE.parent / "ds_configs" / f"{config}.json"))
    flags("--ablation", action="store_true", help="attention x compile x fused AdamW")
    flags("--stages", action="store_true", help="ZeRO stages 0 to 3 of the config")
    flags("--contenders", nargs="*", choices=["mae", "mlo_mae"], default=["mae", "mlo_mae"])
    flags("--num_rounds", type=int, default=5, help="turns (default: 5)")
    flags("--num_steps", type=int, default=10 if is_cuda else 1, help="steps a turn")
    flags("--peak_tflops", type=float, default=_peak_tflops(), help="of the device")
    flags("--name", default="cuda" if is_cuda else "cpu", help="of the result file")
    flags("--output", type=Path, default=HERE / "results", help="folder of the result file")
    args = parser.parse_args()
    args.is_cuda = is_cuda
    return args


if __name__ == "__main__":
    main()
