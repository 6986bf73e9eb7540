"""What ranks tell each other, on two of them and alone."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from mlomae.distributed import collectives
from tests.ranks import run_ranks


def calls() -> dict[str, Any]:
    """What this rank hears in each collective call."""
    rank = dist.get_rank()
    x = torch.full((2,), rank + 1.0, requires_grad=True)
    (collectives.sum_over_ranks(x) * (rank + 1)).sum().backward()
    y = torch.full((1, 2), rank + 1.0, requires_grad=True)
    whole = collectives.gather_over_ranks(y)
    (whole * torch.tensor([[1.0], [10.0]])).sum().backward()
    return {
        "place": (collectives.rank(), collectives.world_size()),
        "sum": collectives.sum_over_ranks(x).tolist(),
        "sum's gradient": x.grad.tolist(),
        "gathered": whole.tolist(),
        "gathered gradient": y.grad.tolist(),
        "float64": collectives.sum_in_float64(torch.tensor([2**24 + rank], dtype=torch.int32)),
        "agree": [collectives.all_agree(condition) for condition in (True, rank == 0, False)],
        "objects": collectives.gather_objects({"rank": rank}),
        "no problem": collectives.first_problem(None),
        "problem of the last": collectives.first_problem("full disk" if rank else None),
        "problems of both": collectives.first_problem(f"problem {rank}"),
        "from the first": collectives.from_first_rank(("first", "second")[rank]),
    }


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(f"{__name__}:calls", 2, tmp_path_factory.mktemp("collectives"))


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_hear_the_same(heard: list[dict[str, Any]], rank: int) -> None:
    result = heard[rank]
    assert result["place"] == (rank, 2)
    assert result["sum"] == [3.0, 3.0]
    assert result["gathered"] == [[1.0, 1.0], [2.0, 2.0]]
    assert result["float64"].dtype == torch.float64 and float(result["float64"]) == 2**25 + 1
    assert result["agree"] == [True, False, False]
    assert result["objects"] == [{"rank": 0}, {"rank": 1}]
    assert result["no problem"] is None
    assert result["problem of the last"] == (1, "full disk")
    assert result["problems of both"] == (0, "problem 0")
    assert result["from the first"] == "first"


@pytest.mark.parametrize("rank", [0, 1])
def test_gradients_are_those_of_the_sum_of_all_losses(
    heard: list[dict[str, Any]], rank: int
) -> None:
    assert heard[rank]["sum's gradient"] == [3.0, 3.0]  # 1 on the first rank, 2 on the second
    assert heard[rank]["gathered gradient"] == [[2.0 * 10**rank] * 2]  # both weigh it so


def test_one_process_needs_no_group() -> None:
    x = torch.ones(3)
    assert (collectives.rank(), collectives.world_size()) == (0, 1)
    assert collectives.sum_over_ranks(x) is x and collectives.gather_over_ranks(x) is x
    assert collectives.all_agree(True) and not collectives.all_agree(False)
    assert collectives.sum_in_float64(x).dtype == torch.float64
    collectives.barrier()
