"""A level in several problems at once: each has its own wiring, records and hypergradients."""

import copy
import gc
import itertools
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mlomae.hypergrad import (
    Estimator,
    FiniteDifference,
    Identity,
    Level,
    Multilevel,
    Neumann,
    Sama,
    Truncated,
    Unrolled,
)
from mlomae.hypergrad.reference import (
    OptimizerRules,
    ReferenceLevel,
    hypergradient,
    relative_error,
)
from tests.hypergrad.problems import (
    NUM_INPUTS,
    NUM_TOKENS,
    LevelSpec,
    Weighter,
    chain2,
    chain3,
    make_optimizer,
)
from tests.hypergrad.test_multilevel_use import level, stream
from tests.hypergrad.test_multilevel_use import theta as upper_of
from tests.ranks import run_ranks


def level_of(spec: LevelSpec, num_steps: int = 1, kind: str = "adamw") -> Level:
    return Level(
        spec.name, spec.module, make_optimizer(kind, spec.module), loss=spec.loss,
        lower=spec.lower, upper=spec.upper, num_steps=num_steps,
    )  # fmt: skip


def copies(levels: Sequence[Level]) -> list[Level]:
    """Levels as they are now, in no problem."""
    fresh = []
    for each in levels:
        model, optimizer = copy.deepcopy((each.model, each.optimizer))
        options = {"lower": each.lower, "upper": each.upper, "num_steps": each.num_steps}
        fresh.append(Level(each.name, model, optimizer, loss=each.loss, **options))
    return fresh


def sharing_train(
    estimator: Estimator, num_steps: int = 2, kind: str = "adamw"
) -> tuple[Multilevel, Multilevel]:
    """Two problems over one level `train`, each with a level `theta` of its own."""
    train, theta = chain2().levels
    torch.manual_seed(7)
    other = LevelSpec(
        "theta", Weighter(NUM_TOKENS * NUM_INPUTS).double(), theta.loss, lower=("train",)
    )
    shared = level_of(train, num_steps, kind)
    return (
        Multilevel([shared, level_of(theta)], estimator=estimator),
        Multilevel([shared, level_of(other)], estimator=estimator),
    )


def value_of(problem: Multilevel, batch: Any) -> dict[str, Tensor]:
    return problem.levels["theta"].named(problem.hypergradient("theta", batch).vector)


def assert_same_bits(value: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert value.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(value[name], tensor), name


# --- two uppers of the same name -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("estimator", [Unrolled(2), Sama()], ids=str)
def test_each_problem_steps_and_differentiates_with_its_own_upper_level(
    estimator: Estimator, kind: str
) -> None:
    """As a problem does that is made from copies, and whose levels know no other problem."""
    problems, batches = sharing_train(estimator, kind=kind), stream(chain2(), 1)
    for problem in problems * 2:  # in turn
        alone = Multilevel(copies([*problem.levels.values()]), estimator=estimator)
        taken = [next(batches), next(batches)]
        losses = [problem.step("train", batch) for batch in taken]
        assert losses == [alone.levels["train"].step(batch) for batch in taken]
        top = next(batches)
        assert_same_bits(value_of(problem, top), value_of(alone, top))
        theta, other = problem.levels["theta"], alone.levels["theta"]
        theta.set_gradient(problem.hypergradient("theta", top).vector)
        other.set_gradient(alone.hypergradient("theta", top).vector)
        theta.apply(), other.apply()
        problem.clear()
        for name, each in alone.levels.items():
            assert_same_bits(problem.levels[name].model.state_dict(), each.model.state_dict())


def test_both_equal_the_reference() -> None:
    problems, batches = sharing_train(Unrolled(2)), stream(chain2(), 1)
    for problem in problems * 2:
        train, theta = problem.levels["train"], problem.levels["theta"]
        taken, top = [next(batches), next(batches)], next(batches)
        references = [
            ReferenceLevel(
                "train", train.model, train.loss, [[batch] for batch in taken],
                OptimizerRules.of(train.optimizer, train.model),
            ),
            ReferenceLevel("theta", theta.model, theta.loss, [[top]]),
        ]  # fmt: skip
        for batch in taken:
            problem.step("train", batch)
        expected = hypergradient(references, "theta")
        assert relative_error(value_of(problem, top), expected) <= 1e-10
        problem.clear()


def test_cycles_in_turn_train_both() -> None:
    problems, batches = sharing_train(Unrolled(2)), stream(chain2(), 1)
    for problem in problems * 2:
        alone = Multilevel(copies([*problem.levels.values()]), estimator=problem.estimator)
        taken = {"train": [next(batches), next(batches)], "theta": [next(batches)]}
        losses, expected = (
            each.cycle({name: iter(parts) for name, parts in taken.items()})
            for each in (problem, alone)
        )
        assert losses == expected
        for name, each in alone.levels.items():
            assert_same_bits(problem.levels[name].model.state_dict(), each.model.state_dict())


# --- two estimators over the same levels -----------------------------------------------------

PAIRS = [
    (Unrolled(2), Unrolled(1)),
    (Identity(), Unrolled(3)),
    (Truncated(3), Neumann(2, 0.1)),
    (Unrolled({"w": 3, "head": 1}), FiniteDifference(Unrolled(2), relative_step=1e-4)),
]


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_two_estimators_at_the_same_time(pair: Sequence[Estimator], kind: str) -> None:
    """One step serves both, whatever each has of it recorded and kept."""
    levels = [level_of(spec, 3, kind) for spec in chain3(dropout=0.3).levels]
    w, head, _ = levels
    problems = [
        Multilevel(levels, estimator=estimator, keep_activations=keeps)
        for estimator, keeps in zip(pair, (True, False), strict=True)
    ]
    batches = stream(chain3(), 1)
    for order in (problems, problems[::-1], problems):
        alone = [Multilevel(copies(levels), estimator=estimator) for estimator in pair]
        for stepped in (w, head):
            for batch in itertools.islice(batches, 3):
                state = torch.get_rng_state()
                stepped.step(batch)
                for each in alone:
                    torch.set_rng_state(state)
                    each.step(stepped.name, batch)
        top = next(batches)
        for problem in order:
            expected = value_of(alone[problems.index(problem)], top)
            assert relative_error(value_of(problem, top), expected) <= 1e-12
        for problem in problems:
            problem.clear()


def test_two_estimators_in_turn() -> None:
    levels = [level_of(spec, 3) for spec in chain3().levels]
    problems = [
        Multilevel(levels, estimator=estimator) for estimator in (Unrolled(2), Truncated(3))
    ]
    batches = stream(chain3(), 1)
    for problem in problems * 2:
        alone = Multilevel(copies(levels), estimator=problem.estimator)
        taken = {name: [next(batches) for _ in range(3)] for name in problem.levels}
        for each in (problem, alone):
            each.cycle({name: iter(parts) for name, parts in taken.items()})
        for name, each in alone.levels.items():
            assert_same_bits(problem.levels[name].model.state_dict(), each.model.state_dict())


# --- in mid-cycle ----------------------------------------------------------------------------


@pytest.mark.parametrize("is_other_upper", [False, True])
def test_another_problem_in_mid_cycle_takes_no_records(is_other_upper: bool) -> None:
    train, theta = (level_of(spec, 3) for spec in chain2().levels)
    batches = [next(stream(chain2(), seed)) for seed in range(4)]
    problem = Multilevel([train, theta], estimator=Unrolled(3))
    alone, single = (
        Multilevel(copies([train, theta]), estimator=Unrolled(steps)) for steps in (3, 1)
    )
    for batch in batches[:2]:
        train.step(batch), alone.step("train", batch), single.step("train", batch)
    upper = copies([theta])[0] if is_other_upper else theta
    late = Multilevel([train, upper], estimator=Unrolled(1))
    assert len(train.records) == 2
    for each in (problem, alone, single):
        each.step("train", batches[2])
    assert_same_bits(value_of(problem, batches[3]), value_of(alone, batches[3]))
    if is_other_upper:
        with pytest.raises(RuntimeError, match=r"has taken 0 recorded steps .* 1 are needed"):
            value_of(late, batches[3])
    else:  # it joined in time for the last step
        assert_same_bits(value_of(late, batches[3]), value_of(single, batches[3]))


def test_each_problem_says_what_is_recorded_for_it() -> None:
    levels = [level_of(spec, num_steps=2) for spec in chain2().levels]
    first, batch = Multilevel(levels, estimator=Unrolled(1)), next(stream(chain2(), 1))
    levels[0].step(batch)
    second = Multilevel(levels, estimator=Unrolled(2))  # it has missed the first step
    assert not first.is_recorded("train")
    levels[0].step(batch)
    assert first.is_recorded("train") and not second.is_recorded("train")
    alone = Multilevel(copies(levels), estimator=Unrolled(1))
    assert not alone.is_recorded("train")
    value_of(first, batch)


def test_a_problem_made_between_the_halves_of_a_step() -> None:
    train, theta = (level_of(spec) for spec in chain2().levels)
    batch, top = (next(stream(chain2(), seed)) for seed in range(2))
    problem = Multilevel([train, theta])
    alone = Multilevel(copies([train, theta]))
    train.backward(batch), alone.step("train", batch)
    other = Multilevel([train, *copies([theta])])
    train.apply()
    assert_same_bits(value_of(problem, top), value_of(alone, top))
    with pytest.raises(RuntimeError, match="has taken 0 recorded steps"):
        value_of(other, top)


def test_a_dropped_problem_is_gone() -> None:
    problem, other = sharing_train(Unrolled(2))
    train, batch = problem.levels["train"], next(stream(chain2(), 1))
    alone = Multilevel(copies([*problem.levels.values()]), estimator=Unrolled(2))
    upper = weakref.ref(other.levels["theta"])
    with pytest.raises(ValueError, match="mean different levels by theta"):
        train.step(batch)
    del other
    gc.collect()
    assert upper() is None and len(train.bindings) == 1
    for _ in range(2):
        train.step(batch), alone.step("train", batch)
    assert_same_bits(value_of(problem, batch), value_of(alone, batch))
    del problem
    with pytest.raises(ValueError, match=r"uses models\['theta'\], but level train is in no"):
        train.step(batch)


def test_a_level_in_no_problem_steps_by_itself() -> None:
    single = level("a")
    before = single.model.weight.detach().clone()
    single.step(torch.ones(3, 2))
    assert not torch.equal(single.model.weight, before) and single.is_recorded


# --- refusals --------------------------------------------------------------------------------


def test_a_step_that_could_be_of_either_problem_is_refused() -> None:
    problem, other = sharing_train(Unrolled(2))
    train, batch = problem.levels["train"], next(stream(chain2(), 1))
    before = copy.deepcopy(train.model.state_dict())
    message = (
        r"level train is in several problems that mean different levels by theta, .* call "
        r"step\('train', \.\.\.\) of the problem it is for, or drop the other problems"
    )
    for refused in (train.step, train.backward):
        with pytest.raises(ValueError, match=message):
            refused(batch)
    assert_same_bits(train.model.state_dict(), before)
    for each in (problem, other):
        each.step("train", batch)
    assert train.num_moves == 2


def test_records_from_which_the_level_has_moved_are_refused() -> None:
    problem, other = sharing_train(Unrolled(2))
    batches = stream(chain2(), 1)
    message = (
        r"level train has taken a step that is not recorded for this problem.*; clear\(\) the "
        "problem, and take all steps of a cycle for it"
    )
    problem.step("train", next(batches)), problem.step("train", next(batches))
    other.step("train", next(batches))
    with pytest.raises(ValueError, match=message):
        value_of(problem, next(batches))
    problem.step("train", next(batches))  # between its two newest records is another's step
    with pytest.raises(ValueError, match=message):
        value_of(problem, next(batches))
    problem.clear()
    alone = Multilevel(copies([*problem.levels.values()]), estimator=Unrolled(2))
    for batch in itertools.islice(batches, 2):
        problem.step("train", batch), alone.step("train", batch)
    assert_same_bits(value_of(problem, batch), value_of(alone, batch))


@pytest.mark.parametrize("is_after_backward", [False, True])
def test_a_step_along_a_set_gradient_is_not_one_to_go_back_through(is_after_backward: bool) -> None:
    problem = Multilevel([level_of(spec) for spec in chain2().levels], estimator=Unrolled())
    train, batch = problem.levels["train"], next(stream(chain2(), 1))
    problem.step("train", batch)
    if is_after_backward:
        train.backward(batch)
    train.set_gradient(train.partition.zeros())
    train.apply()
    with pytest.raises(ValueError, match="level train has taken a step that is not recorded"):
        value_of(problem, batch)


def test_records_whose_upper_level_has_moved_are_refused() -> None:
    train, theta = (level_of(spec) for spec in chain2().levels)
    problems = [Multilevel([train, theta], estimator=each) for each in (Unrolled(), Identity())]
    batch = next(stream(chain2(), 1))
    train.step(batch)
    theta.set_gradient(problems[0].hypergradient("theta", batch).vector)
    theta.apply()
    message = (
        r"level theta has taken a step since the recorded steps of level train, .*; take it "
        r"before that step, or clear\(\) the problem and step level train again"
    )
    for problem in problems:
        with pytest.raises(ValueError, match=message):
            value_of(problem, batch)


def test_records_whose_lower_level_has_moved_are_refused() -> None:
    """The head is bound alike in both problems, so that its steps are recorded for both."""
    w, head, theta = (level_of(spec) for spec in chain3().levels)
    problem = Multilevel([w, head, theta])
    other = Multilevel([w, head, *copies([theta])])
    batches = stream(chain3(), 1)
    problem.step("w", next(batches)), head.step(next(batches))
    other.step("w", next(batches))
    message = "level w has taken a step since the recorded steps of level head"
    for each in (problem, other):
        with pytest.raises(ValueError, match=message):
            value_of(each, next(batches))
    head.step(next(batches))
    assert all(v.isfinite().all() for v in value_of(other, next(batches)).values())
    with pytest.raises(ValueError, match="level w has taken a step that is not recorded"):
        value_of(problem, next(batches))


def test_a_problem_has_no_other_levels_to_step() -> None:
    problem = Multilevel([level("a", upper=["theta"]), upper_of("a")])
    with pytest.raises(ValueError, match="'b' is no level; there are a, theta"):
        problem.step("b", torch.ones(3, 2))


# --- engines ---------------------------------------------------------------------------------


def test_two_uppers_on_engines_of_two_processes(tmp_path: Path) -> None:
    cases = [
        {"problem": "chain3", "shipped": shipped, "dtype": "fp32", "num_steps": 2, "max_norm": 0.05}
        for shipped in ("zero2_bf16", "zero3_bf16")
    ]
    first, second = run_ranks(
        "tests.hypergrad.graph_cases:two_uppers_in_turn", 2, tmp_path, cases=cases
    )
    assert first == second
    for case, result in zip(cases, first, strict=True):
        assert max(result["errors"]) <= 1e-5, case
        assert "mean different levels by theta" in result["ambiguous"], case
        assert "level w has taken a step since the recorded steps of level head" in result["stale"]
