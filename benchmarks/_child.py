"""One contender in a process of its own: run its cycles, measure them, save what was found.

Started by `hypergradient.py`; not meant to be started by hand.
"""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _contenders import CONTENDERS, REFERENCES, Cycle
from _measure import peak_of, resident, seconds_of
from _problem import SIZES, Problem, autoencoder_step, head_step, load, prepare


def main() -> None:
    args = _parse()
    logging.disable(logging.INFO)
    device = torch.device(args.device)
    size = SIZES[args.size]
    if args.what == "prepare":
        prepare(size, args.state, device=device)
        return
    dtype = torch.float64 if args.what in REFERENCES else torch.float32
    problem = load(size, args.state, dtype=dtype, device=device)
    if args.what == "passes":
        result = _passes(problem, args.num_cycles)
    else:
        cycle = Cycle(*(CONTENDERS | REFERENCES)[args.what](problem))
        result = _memory(problem, cycle) if args.memory else _time(problem, cycle, args.num_cycles)
    torch.save(result, args.result)


def _time(problem: Problem, cycle: Cycle, num_cycles: int) -> dict[str, Any]:
    """Seconds of both halves, after a cycle that warms up and whose hypergradient is kept.

    Later cycles start at other weights, but cost the same.
    """
    _clear(problem)
    result = {"mask": _hidden(problem)}
    cycle.lower()
    cycle.update()
    result["vector"] = torch.cat([p.grad.flatten().cpu() for p in problem.masking.parameters()])
    result["lower"], result["update"] = [], []
    for _ in range(num_cycles):
        _clear(problem)
        result["lower"].append(seconds_of(cycle.lower, problem.device))
        result["update"].append(seconds_of(cycle.update, problem.device))
    return result


def _memory(problem: Problem, cycle: Cycle) -> dict[str, float]:
    """Megabytes resident before a cycle, and at most during each half of it."""
    _clear(problem)
    before = resident(problem.device)
    lower = peak_of(cycle.lower, problem.device)
    update = peak_of(cycle.update, problem.device)
    return {"before": before, "lower": lower, "update": update}


def _passes(problem: Problem, num_rounds: int) -> dict[str, list[float]]:
    """Seconds of the passes that costs are counted in, after a round that warms up.

    F is a masked forward pass without gradients, E one of the encoder on all patches.
    """

    def plain_steps() -> None:
        autoencoder_step(problem)
        head_step(problem)

    passes: dict[str, Callable[[], Any]] = {
        "F": torch.no_grad()(lambda: problem.reconstruction_loss(problem.unlabeled)),
        "E": torch.no_grad()(lambda: problem.autoencoder(problem.labeled[0])),
        "F forward and backward": lambda: _backward_of_reconstruction(problem),
        "E forward and backward": lambda: problem.classification_loss(*problem.labeled).backward(),
        "plain lower steps": plain_steps,
    }
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(1 + num_rounds):
        for name, run in passes.items():
            _clear(problem)
            seconds[name].append(seconds_of(run, problem.device))
    return {name: times[1:] for name, times in seconds.items()}


def _backward_of_reconstruction(problem: Problem) -> None:
    loss = problem.reconstruction_loss(problem.unlabeled)
    loss.backward(inputs=list(problem.autoencoder.parameters()))


@torch.no_grad()
def _hidden(problem: Problem) -> torch.Tensor:
    """Which patches the autoencoder's step hides, [B, N]: the same for all contenders."""
    return problem.autoencoder(problem.unlabeled, scorer=problem.masking)["mask"].bool().cpu()


def _clear(problem: Problem) -> None:
    for network in problem.networks.values():
        network.zero_grad()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["prepare", "passes", *CONTENDERS, *REFERENCES])
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--result", type=Path)
    parser.add_argument("--num_cycles", type=int, default=1)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--device", required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
