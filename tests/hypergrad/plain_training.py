"""A tiny network, its data, and its training by plain PyTorch in float64."""

from typing import Any

import torch
from torch import Tensor, nn

LR = 0.1
DECAYS = (0.1, 0.0)
EPS = 1e-3


class Network(nn.Module):
    """Odd sizes, so that shards have padding and cut parameters in two; one frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 5)
        self.norm = nn.LayerNorm(5)
        self.frozen = nn.Linear(5, 3).requires_grad_(False)
        self.last = nn.Linear(3, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.frozen(self.norm(self.first(x)))))


def adamw(network: nn.Module) -> torch.optim.AdamW:
    params = [p for p in network.parameters() if p.requires_grad]
    groups = [params[:3], params[3:]]
    return torch.optim.AdamW(
        [{"params": g, "weight_decay": d} for g, d in zip(groups, DECAYS, strict=True)],
        lr=LR,
        eps=EPS,
    )


def micro_batch(step: int, i: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + 10 * i + rank)
    return torch.randn(4, 7, generator=generator), torch.randn(4, 9, generator=generator)


def schedule(step: int) -> float:
    return 1 / (1 + step)


def random_like(shapes: dict[str, Any], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def error(value: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest absolute difference; the names must agree."""
    assert value.keys() == expected.keys()
    return max(float((value[n].double() - e.double()).abs().max()) for n, e in expected.items())


class Reference:
    """The whole network in float64 with PyTorch's own optimizer and clipping."""

    def __init__(self, network: nn.Module, dtype: torch.dtype, max_norm: float) -> None:
        network = network.to(dtype).double()  # training starts from the rounded weights
        self.params = {n: p for n, p in network.named_parameters() if p.requires_grad}
        self.optimizer = adamw(network)
        self.max_norm = max_norm

    def step(self, gradient: dict[str, Tensor], num_steps: int) -> None:
        for name, param in self.params.items():
            param.grad = gradient[name].double()
        nn.utils.clip_grad_norm_(self.params.values(), self.max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = LR * schedule(num_steps)
        self.optimizer.step()

    def gradient(self) -> dict[str, Tensor]:
        """What the latest step used."""
        return {name: param.grad for name, param in self.params.items() if param.grad is not None}

    def weights(self) -> dict[str, Tensor]:
        return {name: param.detach() for name, param in self.params.items()}


def relative_error(value: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    difference = [(value[n].double() - e).flatten() for n, e in expected.items()]
    return float(
        torch.cat(difference).norm() / torch.cat([*map(torch.flatten, expected.values())]).norm()
    )
