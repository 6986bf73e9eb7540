"""Masked autoencoders whose masks are learned from a downstream task, on DeepSpeed engines."""

import sys

import torch

__version__ = "0.1.0"


def _mend_torchvision() -> None:
    """Make `import torchvision` work where its compiled operators cannot load.

    The published torchvision wheels carry CUDA operators only. Beside a CPU build of torch they
    do not load, and the import then fails on the first operator that is looked up by name. Its
    transforms and data sets need none of them, so declaring the two schemas is enough.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{operator}",
                "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            )
        import torchvision  # noqa: F401


_mend_torchvision()  # timm imports torchvision, so this runs before any room does
