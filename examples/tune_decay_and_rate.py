"""Tuning the learning rate and weight decay of each parameter group by hypergradient.

A network w learns 100 digits by heart, a fifth of which have a random label. Above it, a tuner
holds a learning rate and a weight decay for each layer. It follows the exact derivative of the
validation loss through the whole training, every one of its AdamW steps:

    w_(t+1) = AdamW step at w_t with exp(log_lr), exp(log_weight_decay),   t = 0 ... num_steps - 1,
    the tuner minimises validation_loss(w_num_steps).

A cycle is one training from the same start, then one step of the tuner. The first training, with
the settings as they were given, is compared with the last one on test samples that serve for
nothing else. The validation labels teach the tuner only.

    python examples/tune_decay_and_rate.py
"""

import argparse
import copy
import math
from itertools import repeat

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mlomae.hypergrad import Level, Multilevel, Unrolled

Samples = tuple[Tensor, Tensor]  # images [n, 64] and labels [n]
UNTUNED_LR, UNTUNED_DECAY = 0.01, 0.1


class Tuner(nn.Module):
    """The settings of each parameter group; logarithms keep them positive."""

    def __init__(self, num_groups: int) -> None:
        super().__init__()
        self.log_lr = nn.Parameter(torch.full((num_groups,), math.log(UNTUNED_LR)))
        self.log_weight_decay = nn.Parameter(torch.full((num_groups,), math.log(UNTUNED_DECAY)))

    def forward(self) -> list[dict[str, Tensor]]:
        pairs = zip(self.log_lr.exp(), self.log_weight_decay.exp(), strict=True)
        return [{"lr": lr, "weight_decay": decay} for lr, decay in pairs]


def mean_loss(models, batch: Samples) -> Tensor:
    return F.cross_entropy(models["network"](batch[0]), batch[1])


def two_levels(network: nn.Sequential, tuner: Tuner, num_steps: int) -> Multilevel:
    groups = [{"params": layer.parameters()} for layer in network if isinstance(layer, nn.Linear)]
    below = Level(
        "network",
        network,
        torch.optim.AdamW(groups),
        loss=mean_loss,
        upper=["tuner"],
        settings=lambda models: models["tuner"](),
        num_steps=num_steps,
    )
    adam = torch.optim.Adam(tuner.parameters(), lr=0.2)
    above = Level("tuner", tuner, adam, loss=mean_loss, lower=["network"])
    return Multilevel([below, above], estimator=Unrolled(steps=num_steps))


def split(seed: int) -> tuple[Samples, ...]:
    """100 training samples, 200 for validation, and the rest for the test."""
    torch.manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    parts = torch.randperm(len(labels)).tensor_split([100, 300])
    (inputs, truth), *others = [(images[part], labels[part]) for part in parts]
    is_random = torch.rand(truth.shape) < 0.2
    return (inputs, torch.where(is_random, torch.randint(10, truth.shape), truth)), *others


@torch.no_grad()
def loss_and_accuracy(network: nn.Module, samples: Samples) -> tuple[float, float]:
    logits = network(samples[0])
    accuracy = 100 * (logits.argmax(1) == samples[1]).double().mean()
    return F.cross_entropy(logits, samples[1]).item(), accuracy.item()


def run(seed: int, num_cycles: int, num_steps: int) -> tuple[list[float], list[dict]]:
    """Test loss and accuracy of the first and of the last training, and the last settings."""
    training, validation, test = split(seed)
    network = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    start = copy.deepcopy(network.state_dict())
    problem = two_levels(network, Tuner(num_groups=2), num_steps)
    optimizer = problem.levels["network"].optimizer
    found = []
    for _ in range(num_cycles):
        network.load_state_dict(start)
        optimizer.state.clear()
        problem.cycle({"network": repeat(training), "tuner": repeat(validation)})
        found.append(loss_and_accuracy(network, test))
    return [*found[0], *found[-1]], optimizer.param_groups


def main(arguments: list[str] | None = None) -> np.ndarray:
    """Print a column for each seed; return test loss and accuracy, untuned and tuned [4, 3]."""
    parser = argparse.ArgumentParser(description="Tuning rates and decays by hypergradient.")
    parser.add_argument("--num_cycles", type=int, default=20, help="trainings")
    parser.add_argument("--num_steps", type=int, default=60, help="of each training")
    args = parser.parse_args(arguments)
    runs = [run(seed, args.num_cycles, args.num_steps) for seed in range(3)]
    table = np.array([values for values, _ in runs]).T
    names = ["test loss, untuned", "accuracy, %, untuned", "test loss, tuned", "accuracy, %, tuned"]
    print(f"{'':22}seed 0  seed 1  seed 2    mean     std")
    for name, row in zip(names, table, strict=True):
        print(f"{name:20}", "".join(f"{v:8.3g}" for v in (*row, row.mean(), row.std(ddof=1))))
    for layer in range(2):
        for key in ("lr", "weight_decay"):
            learned = [groups[layer][key] for _, groups in runs]
            print(f"{f'layer {layer + 1}, {key}':20}", "".join(f"{v:8.2g}" for v in learned))
    return table


if __name__ == "__main__":
    main()
