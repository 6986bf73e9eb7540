"""GPUs by name: what their vendors' data sheets say, without sparsity."""

from dataclasses import dataclass

import torch

from mlomae.errors import UserError

GB = 10**9


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        memory: bytes; the data sheet's GB read as 1e9 bytes.
        bf16: dense FLOP/s of the tensor cores, 0 where they have no bf16.
        fp32: FLOP/s without TF32, which PyTorch leaves off.
        link: bytes/s between the GPUs of a node, one direction: NVLink, else PCIe 4.0 x16.
    """

    memory: float
    bf16: float
    fp32: float
    link: float

    def flops(self, dtype: torch.dtype) -> float:
        """Peak FLOP/s in a precision."""
        return self.bf16 if dtype == torch.bfloat16 else self.fp32


def _gpu(gigabytes: float, bf16: float, fp32: float, link: float) -> Gpu:
    """From GB, TFLOP/s and GB/s."""
    return Gpu(gigabytes * GB, bf16 * 1e12, fp32 * 1e12, link * GB)


GPUS = {
    "v100-32gb": _gpu(32, 0, 15.7, 150),
    "a100-40gb": _gpu(40, 312, 19.5, 300),
    "a100-80gb": _gpu(80, 312, 19.5, 300),
    "h100-80gb": _gpu(80, 989.4, 66.9, 450),
    "h200-141gb": _gpu(141, 989.4, 66.9, 450),
    "b200-180gb": _gpu(180, 2250, 75, 900),
    "l40s-48gb": _gpu(48, 362, 91.6, 32),
    "rtx-4090": _gpu(24, 165.2, 82.6, 32),
}
"""NVIDIA; those of servers in their SXM form, but for L40S and RTX 4090, which have PCIe alone."""


def find_gpu(name: str, dtype: torch.dtype) -> Gpu:
    """A GPU that computes in a precision.

    Raises:
        UserError: it is not known, or its tensor cores have no bf16.
    """
    if name.lower() not in GPUS:
        raise UserError(f"--gpu {name} is not known: give one of {', '.join(GPUS)}")
    gpu = GPUS[name.lower()]
    if not gpu.flops(dtype):
        raise UserError(f"--gpu {name} has no bf16: give a JSON without it, or another GPU")
    return gpu
