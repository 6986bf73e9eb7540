"""Masked autoencoders whose masks are learned from a downstream task, on DeepSpeed engines."""

from data_ffcv.sources.torchvision_import import mend_torchvision

__version__ = "0.1.0"

mend_torchvision()  # timm imports torchvision, so this runs before any room does
