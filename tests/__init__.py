"""Importing mlomae first fixes an import of torchvision, and so of timm, on CPU builds of torch."""

import mlomae  # noqa: F401
