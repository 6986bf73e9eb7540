"""What decides masks besides scores: the schedule, the noise, the weights of the loss."""

import pytest
import torch

from mlomae.pretraining.masks import MaskSchedule, loss_weights
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.recipe import load_recipe

IMAGES = torch.zeros(2, 3, 4, 4)


def test_ratio_and_temperature_move_in_a_line_from_first_to_last_step():
    schedule = MaskSchedule(64, (0.25, 0.75), (2.0, 0.0), num_steps=5)
    assert [schedule.num_keep(step) for step in range(6)] == [48, 40, 32, 24, 16, 16]
    batches = [schedule.batches([IMAGES], step)[0] for step in range(5)]
    assert [batch.temperature for batch in batches] == [2.0, 1.5, 1.0, 0.5, 0.0]
    assert [batch.num_keep for batch in batches] == [48, 40, 32, 24, 16]


def test_a_single_step_has_the_first_values():
    assert MaskSchedule(100, (0.5, 0.9), num_steps=1).num_keep(0) == 50


def test_noise_differs_between_draws_steps_and_seeds_and_comes_again():
    def noise(seed: int, step: int) -> list[torch.Tensor]:
        batches = MaskSchedule(16, seed=seed).batches([IMAGES, IMAGES], step)
        return [torch.rand(4, generator=batch.generator()) for batch in batches]

    drawn = [*noise(0, 0), *noise(0, 1), *noise(1, 0)]
    assert len({tuple(values.tolist()) for values in drawn}) == 6
    assert all(map(torch.equal, noise(0, 1), drawn[2:4]))


def test_a_plain_schedule_hides_the_highest_scores_of_three_quarters():
    (batch,) = MaskSchedule(16).batches([IMAGES], 7)
    assert batch[1:3] == (4, 0.0)


@pytest.mark.parametrize(
    ("overrides", "ratio", "temperature"),
    [
        ([], (0.75, 0.75), (0.0, 0.0)),
        (["masking.mask_ratio_end=0.9"], (0.75, 0.9), (0.0, 0.0)),
        (["masking.selection=gumbel_top_k"], (0.75, 0.75), (1.0, 1.0)),
        (
            [
                "masking.selection=gumbel_top_k",
                "masking.temperature=2",
                "masking.temperature_end=0",
            ],
            (0.75, 0.75),
            (2.0, 0.0),
        ),
    ],
)
def test_a_recipe_sets_the_schedule(overrides, ratio, temperature):
    recipe = load_recipe("quickstart_mlo_mae", PretrainingRecipe, [*overrides, "seed=5"])
    schedule = MaskSchedule.of(recipe, num_steps=9)
    assert schedule == MaskSchedule(16, ratio, temperature, 9, 5)


def test_weights_as_published_and_normalized():
    scores = torch.tensor([[0.5, 0.25, 0.125, 1.0], [0.5, 0.5, 0.5, 0.5]])
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    published = [[0.5 / 3, 0.25 / 3, 0, 0], [0, 0, 0.5 / 3, 0]]
    normalized = [[0.5 / 1.25, 0.25 / 1.25, 0, 0], [0, 0, 0.5 / 1.25, 0]]
    torch.testing.assert_close(loss_weights(scores, mask, "published"), torch.tensor(published))
    torch.testing.assert_close(loss_weights(scores, mask, "normalized"), torch.tensor(normalized))


def test_a_uniform_shrink_of_the_scores_changes_nothing_when_normalized():
    scores, mask = torch.rand(3, 8).double(), (torch.rand(3, 8) > 0.4).double()
    for weighting, factor in (("published", 1e-3), ("normalized", 1.0)):
        large, small = (loss_weights(s, mask, weighting) for s in (scores, scores * 1e-3))
        torch.testing.assert_close(small, large * factor)


def test_weights_are_never_half_precision():
    scores, mask = torch.rand(1, 4).bfloat16(), torch.ones(1, 4)
    assert loss_weights(scores, mask, "published").dtype == torch.float32
