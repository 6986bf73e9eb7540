"""The average of sharded weights, and whole weights out of shards, against written-out sums."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.ranks import run_ranks

STAGES = (0, 1, 2, 3)
DECAY, NUM_STEPS = 0.9, 4


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.Linear(7, 3))


def average_while_training(config: dict[str, Any]) -> list[Any]:
    """Per stage: every trajectory of whole weights, the average, and both on the first rank."""
    from mlomae.recipe import LevelRecipe
    from mlomae.training.averaging import WeightAverage
    from mlomae.training.engines import build_level, full_weights

    recipe = LevelRecipe(batch_size=8, lr=0.05, weight_decay=0.1)
    found = []
    for stage in STAGES:
        level = build_level(
            "head",
            model(),
            recipe,
            config | {"zero_optimization": {"stage": stage}},
            loss=lambda models, batch: models["head"](batch).square().mean(),
            total_steps=10,
            warmup_steps=0,
        )
        average = WeightAverage(level, DECAY)
        trajectory = [full_weights(level, everywhere=True)]
        generator = torch.Generator().manual_seed(dist.get_rank())
        for _ in range(NUM_STEPS):
            level.step(torch.randn(4, 5, generator=generator))
            average.update()
            trajectory.append(full_weights(level, everywhere=True))
        on_first = [full_weights(level), average.weights(everywhere=False)]
        found.append((trajectory, average.weights(), on_first))
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    config = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "steps_per_print": 10**9}
    return run_ranks(
        "tests.training.test_averaging:average_while_training",
        2,
        tmp_path_factory.mktemp("ranks"),
        config=config,
    )


@pytest.mark.parametrize("stage", STAGES)
def test_the_average_is_the_written_out_sum_of_whole_weights(outcomes, stage):
    for rank in range(2):
        trajectory, average, _ = outcomes[rank][stage]
        for name in dict(model().named_parameters()):
            expected = trajectory[0][name].double()
            for weights in trajectory[1:]:
                expected = DECAY * expected + (1 - DECAY) * weights[name].double()
            assert not torch.allclose(expected, trajectory[-1][name].double(), atol=1e-3)
            torch.testing.assert_close(average[name].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_buffers_are_the_latest_and_counters_stay_integers(outcomes, stage):
    trajectory, average, *_ = outcomes[0][stage]
    assert torch.equal(average["1.running_mean"], trajectory[-1]["1.running_mean"])
    assert average["1.num_batches_tracked"].dtype == torch.int64
    assert int(average["1.num_batches_tracked"]) == NUM_STEPS


@pytest.mark.parametrize("stage", STAGES)
def test_whole_weights_are_alike_at_all_stages_and_on_the_first_rank_alone_unless_asked(
    outcomes, stage
):
    for name in dict(model().named_parameters()):
        ours, theirs = (outcomes[0][s][0][-1][name] for s in (stage, 0))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    for number in range(2):  # the weights, and their average
        weights: list[dict[str, Tensor]] = [outcomes[rank][stage][2][number] for rank in range(2)]
        assert "0.weight" in weights[0] and "0.weight" not in weights[1]
    assert torch.equal(outcomes[0][stage][2][1]["0.weight"], outcomes[0][stage][1]["0.weight"])


def test_masters_begin_as_the_module(outcomes):
    for name, value in model().named_parameters():
        assert torch.equal(outcomes[0][0][0][0][name], value.detach())
