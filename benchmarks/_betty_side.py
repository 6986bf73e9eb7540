"""Betty's side: the MLO-MAE problem as the public implementation hands it to Betty 0.2.1.

Three problems of one step each, type "darts" at its default radius 0.01, `retain_graph=True`, and
the paths of the public code: mask -> pretrain, once directly and once through the head. As in the
rest of this benchmark, and other than in the public code, scores are frozen and the head has no
dropout; neither changes the work.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _problem import Problem, adamw
from torch import nn

from mlomae.models import reconstruction_loss

FOLDER = Path(__file__).resolve().parent / ".betty"
REQUIREMENT = "betty-ml==0.2.1"


def install() -> None:
    """Put Betty into a folder of its own, without the old torch that it asks for."""
    if FOLDER.exists():
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    flags = ["--no-deps", "--ignore-requires-python", "--target", str(FOLDER)]
    subprocess.run([*pip, *flags, REQUIREMENT], check=True)


def betty_darts(problem: Problem) -> tuple[Callable[[], None], Callable[[], None]]:
    """The contender; see `_contenders`."""
    pretrain, classifier, mask = levels = _levels(problem)
    states = [level.optimizer.state_dict() for level in levels]
    _connect(pretrain, classifier, mask)
    for level, state in zip(levels, states, strict=True):  # Betty made new optimizers
        level.optimizer.load_state_dict(state)

    def lower() -> None:
        pretrain.embedding = None
        pretrain.one_step_descent()
        classifier.one_step_descent()

    def update() -> None:
        # `one_step_descent` without the optimizer's step, which is the same for everybody.
        mask.cur_batch = mask.get_batch()
        loss, _ = mask.get_loss(mask.cur_batch)
        mask.backward(
            loss=loss,
            params=mask.trainable_parameters(),
            paths=mask.paths,
            create_graph=False,
            retain_graph=mask.config.retain_graph,
            allow_unused=mask.config.allow_unused,
        )

    return lower, update


def _levels(problem: Problem) -> list[Any]:
    sys.path.append(str(FOLDER))
    from betty.configs import Config
    from betty.problems import ImplicitProblem

    class Pretrain(ImplicitProblem):
        embedding: Any = None  # of the latest step

        def training_step(self, batch: Any) -> Any:
            out = self.module(batch[0], scorer=self.score)
            return reconstruction_loss(out["patch_loss"] * out["scores"], out["mask"])

        def score(self, embedding: Any) -> Any:
            # A difference of weights would move the scores, too, if they were not kept.
            self.embedding = embedding if self.embedding is None else self.embedding
            return self.mask.module(self.embedding)

    class Classifier(ImplicitProblem):
        def training_step(self, batch: Any) -> Any:
            return F.cross_entropy(self.module(self.pretrain.module(batch[0])), batch[1])

    class Mask(ImplicitProblem):
        def training_step(self, batch: Any) -> Any:
            features = self.pretrain.module(batch[0])
            return F.cross_entropy(self.classifier.module(features), batch[1])

    def level(kind: type, network: nn.Module, optimizer: torch.optim.AdamW, batch: Any) -> Any:
        # Betty builds its optimizer from the defaults, where torch 2.13 has a key that the
        # constructor does not take.
        optimizer.defaults.pop("decoupled_weight_decay", None)
        return kind(
            name=kind.__name__.lower(),
            config=Config(type="darts", retain_graph=True),
            module=network,
            optimizer=optimizer,
            train_data_loader=[batch],
        )

    return [
        level(Pretrain, problem.autoencoder, problem.autoencoder_optimizer, (problem.unlabeled,)),
        level(Classifier, problem.head, problem.head_optimizer, problem.labeled),
        level(Mask, problem.masking, adamw(problem.masking, lr=5e-5), problem.held_out),
    ]


def _connect(pretrain: Any, classifier: Any, mask: Any) -> None:
    from betty.configs import EngineConfig
    from betty.engine import Engine

    strategy = "gpu" if next(mask.module.parameters()).is_cuda else "cpu"
    Engine(
        problems=[pretrain, classifier, mask],
        config=EngineConfig(strategy=strategy),
        dependencies={
            "u2l": {mask: [pretrain]},
            "l2u": {pretrain: [classifier, mask], classifier: [mask]},
        },
    )
