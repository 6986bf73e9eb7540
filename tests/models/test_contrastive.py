"""The contrastive head: its size, its names, and its batch norm, in one process."""

import pytest
import torch
from torch import nn

from mlomae.models.batch_norm import BatchNorm
from mlomae.models.contrastive import NnclrHead


@pytest.mark.parametrize(("embed_dim", "millions"), [(768, 6.3), (1024, 6.8), (1280, 7.3)])
def test_a_head_has_the_published_number_of_parameters(embed_dim: int, millions: float) -> None:
    with torch.device("meta"):
        head = NnclrHead(embed_dim)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (head.projector, head.predictor)]
    assert [round(size / 1e6, 1) for size in sizes] == [millions, 2.1]


def test_a_head_has_the_published_names() -> None:
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {f"projector.{i}.weight" for i in (0, 3, 6)}
    expected |= {f"projector.{i}.{name}" for i in (1, 4, 7) for name in norm}
    expected |= {f"predictor.{i}.weight" for i in (0, 3)}
    expected |= {f"predictor.1.{name}" for name in norm}
    assert NnclrHead(8, 4, 4, 4).state_dict().keys() == expected


def test_without_other_ranks_a_batch_norm_is_that_of_torch() -> None:
    torch.manual_seed(0)
    theirs = nn.BatchNorm1d(5).double()
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    ours = BatchNorm(5).double()
    ours.load_state_dict(theirs.state_dict())
    for _ in range(3):
        x = torch.randn(7, 5, dtype=torch.float64) * 3 + 2
        weights = torch.randn(7, 5, dtype=torch.float64)
        results = []
        for norm in (ours, theirs):
            norm.zero_grad()
            leaf = x.clone().requires_grad_()
            (norm(leaf) * weights).sum().backward()
            results.append((leaf.grad, norm.weight.grad, norm.bias.grad, norm(x)))
        for result, expected in zip(*results, strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-12)
    assert ours.running_var.sub(1).abs().max() > 0.5
    for name, buffer in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], buffer)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_a_batch_that_is_not_finite_leaves_the_running_statistics() -> None:
    torch.manual_seed(0)
    norm = BatchNorm(3)
    norm(torch.randn(8, 3))
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    bad = torch.randn(8, 3)
    bad[0, 0] = torch.nan
    assert norm(bad)[:, 0].isnan().all()
    assert norm.running_mean[0] == mean[0] and norm.running_var[0] == var[0]
    assert (norm.running_mean[1:] != mean[1:]).all() and (norm.running_var[1:] != var[1:]).all()


def test_statistics_of_half_precision_are_float32() -> None:
    """With an offset of 100, bfloat16 would leave nothing of a deviation of 1."""
    torch.manual_seed(0)
    x = (torch.randn(512, 4) + 100).bfloat16()
    norm = BatchNorm(4).bfloat16()
    normed = norm(x)
    assert normed.dtype == torch.bfloat16
    expected = (x.double() - x.double().mean(dim=0)) / x.double().std(dim=0, unbiased=False)
    torch.testing.assert_close(normed.double(), expected, rtol=1e-2, atol=1e-2)


def test_views_pass_one_by_one() -> None:
    """Batch norms see the statistics of one view, and the second view after the first."""
    torch.manual_seed(0)
    head = NnclrHead(6, 8, 4, 8)
    features = torch.stack([torch.randn(9, 6), torch.randn(9, 6) * 5 + 3])
    both = head(features)
    for view in (0, 1):
        alone = head(features[view : view + 1])
        for name in ("projections", "predictions", "features"):
            torch.testing.assert_close(both[name][view], alone[name][0])
    assert head.projector[1].num_batches_tracked == 4
