"""Makes torchvision importable beside a CPU build of torch."""

import sys

import torch


def fix_torchvision_import() -> None:
    """Makes `import torchvision` work where its compiled operators cannot load.

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
