"""What a plan says, against closed forms and against itself under the change that it advises."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mlomae.commands.plan.advice import Plan
from mlomae.commands.plan.command import PlanRequest, main
from mlomae.commands.plan.cycle import simulate
from mlomae.commands.plan.hardware import GB, Gpu
from mlomae.commands.plan.speed import Cluster, expected_speed, moved_bytes
from mlomae.pretraining.recipe import PretrainingRecipe

MODEL = {
    "image_size": 32,
    "patch_size": 8,
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 2,
    "decoder_embed_dim": 32,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
LEVEL = {"batch_size": 64, "lr": 1e-3}
GPU = Gpu(80 * GB, 312e12, 19.5e12, 300 * GB)


def recipe(method: str = "mae", **sections) -> PretrainingRecipe:
    names = ("pretrain",) if method == "mae" else ("pretrain", "classifier", "mask")
    data = {"train": "nowhere"} | ({} if method == "mae" else {"num_classes": 10})
    values = {"method": method, "output_dir": "x", "epochs": 2.0, "masking": {}, "data": data}
    values |= {"model": MODEL, **{name: LEVEL for name in names}}
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return PretrainingRecipe.model_validate(values)


def config(stage: int, **zero) -> dict:
    return {"zero_optimization": {"stage": stage, "reduce_bucket_size": 1000, **zero}}


# --- FLOPs --------------------------------------------------------------------------------------


def linear(tokens: int, inputs: int, outputs: int) -> int:
    return 2 * tokens * inputs * outputs


def block(tokens: int, width: int) -> int:
    attention = 2 * linear(tokens, tokens, width)
    return linear(tokens, width, 12 * width) + attention


def test_flops_of_mae_are_those_of_its_matrix_products():
    cycle = simulate(recipe(pretrain={"batch_size": 8}), config(2), world_size=2)
    patches, visible, width, narrow, pixels = 16, 4, 64, 32, 8 * 8 * 3
    embed = linear(patches, pixels, width)
    forward = 2 * block(1 + visible, width) + linear(1 + visible, width, narrow)
    forward += block(1 + patches, narrow) + linear(1 + patches, narrow, pixels)
    # Twice as much backward, but for the images; fused attention computes its scores once more.
    recomputed = 2 * linear(5, 5, width) + linear(17, 17, narrow)
    assert cycle.flops["pretrain step"] == 4 * (3 * forward + 2 * embed + recomputed)


def test_recomputed_blocks_cost_another_forward_pass_but_its_last_product():
    plain, again = (
        simulate(recipe(model=MODEL | {"activation_checkpointing": flag}), config(1), 2).flops
        for flag in (False, True)
    )
    wide = block(5, 64) - linear(5, 4 * 64, 64)
    narrow = block(17, 32) - linear(17, 4 * 32, 32)
    assert again["pretrain step"] - plain["pretrain step"] == 32 * (2 * wide + narrow)


def test_steps_that_are_not_recorded_count():
    one, eight = (
        simulate(recipe("mlo_mae", pretrain=LEVEL | {"steps_per_cycle": k}), config(2), 2)
        for k in (1, 8)
    )
    for attribute in ("flops", "sent"):
        first, all_ = (
            {str(key): n for key, n in getattr(c, attribute).items() if "pretrain" in str(key)}
            for c in (one, eight)
        )
        assert all_ == {key: 8 * n for key, n in first.items()}


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "bytes_per_weight"), [(0, 12), (1, 4 + 12 / 4), (3, 20 / 4)])
def test_what_stays_in_fp32_is_counted_by_hand(stage, bytes_per_weight):
    """Weights, masters and two moments; stage 0 has no masters, stage 3 keeps gradients."""
    zero = {"stage3_param_persistence_threshold": 0}
    cycle = simulate(recipe(), config(stage, **zero), world_size=4)
    parts = cycle.at_rest.parts
    held = sum(parts.get(name, 0) for name in ("weights", "optimizer", "gradients"))
    buffers = 4 * (17 * 64 + 17 * 32)  # positions that are not trained
    weights = cycle.num_weights["pretrain"]
    assert held - buffers == pytest.approx(bytes_per_weight * weights, rel=0.01)


def test_offload_moves_the_optimizer_to_the_host():
    offload = {"offload_optimizer": {"device": "cpu"}}
    here, away = (
        simulate(recipe("mlo_mae"), config(2, **zero), world_size=2) for zero in ({}, offload)
    )
    parts = [name for name in here.at_rest.parts if name.startswith("optimizer")]
    assert parts and not set(parts) & set(away.at_rest.parts)
    assert {name: away.host[name] for name in parts} == {n: here.at_rest.parts[n] for n in parts}
    assert away.fullest.total < here.fullest.total


def test_less_is_held_without_kept_activations():
    kept, again = (
        simulate(recipe("mlo_mae", hypergradient={"keep_activations": flag}), config(1), 2)
        for flag in (True, False)
    )
    assert again.moments["mask step"].total < kept.moments["mask step"].total
    assert sum(again.flops.values()) > sum(kept.flops.values())


def test_kernels_that_need_a_gpu_are_planned_without_one():
    model = MODEL | {"attention": "flash_attn", "compile_blocks": True}
    plain, fused = (simulate(recipe("mlo_mae", model=m), config(1), 2) for m in (MODEL, model))
    assert (fused.moments, fused.flops) == (plain.moments, plain.flops)
    math = simulate(recipe(model=MODEL | {"attention": "math"}), config(1), 2)
    plain = simulate(recipe(), config(1), 2)
    assert math.fullest.total > plain.fullest.total


# --- time ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "passes"), [(0, 2), (1, 3), (2, 3), (3, 3)])
def test_a_step_moves_the_volumes_of_its_ring(stage, passes):
    """Of 4 bytes for each weight: all-reduce 2, gathering 1; stage 3 gathers once and scatters."""
    zero = {"stage3_param_persistence_threshold": 0}
    cycle = simulate(recipe(), config(stage, **zero), world_size=8)
    volume = 4 * cycle.num_weights["pretrain"] * 7 / 8
    volume *= {3: 2}.get(stage, passes)
    assert sum(moved_bytes(cycle, 8).values()) == pytest.approx(volume, rel=0.02)


def test_times_and_rates_follow_from_the_assumptions():
    coupled = recipe("mlo_mae", pretrain=LEVEL | {"steps_per_cycle": 2})
    cycle = simulate(coupled, config(1), world_size=4)
    cluster = Cluster(GPU, nodes=2, gpus_per_node=2, utilization=0.5, bandwidth=10 * GB)
    speed = expected_speed(coupled, cycle, cluster, torch.float32)
    assert speed.compute == pytest.approx(sum(cycle.flops.values()) / (0.5 * 19.5e12))
    assert speed.communication == pytest.approx(sum(speed.moved.values()) / (10 * GB))
    assert speed.images_per_second == pytest.approx(128 / (speed.compute + speed.communication))
    slower = max(speed.compute, speed.communication)
    assert speed.loader_rate == pytest.approx((2 * 64 + 64 + 64) / slower / 2)


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def request_of(tmp_path):
    """A request for a tiny recipe, with changes."""

    def make(method: str = "mae", stage: int = 1, **changes) -> PlanRequest:
        files = tmp_path / f"{method}.yaml", tmp_path / f"zero{stage}.json"
        files[0].write_text(json.dumps(recipe(method).model_dump(mode="json", exclude_none=True)))
        files[1].write_text(json.dumps(config(stage)))
        basis = PlanRequest(*map(str, files), 1, 2, "a100-80gb", 0.4, 25.0, None, ())
        return replace(basis, **changes)

    return make


def test_what_fits_ends_with_0_and_its_hours(request_of, capsys):
    assert main(request_of("mlo_mae", num_images=800)) == 0
    out = capsys.readouterr().out
    assert "It fits." in out and "GPU-hours" in out and "crops/s" in out
    assert "weights of the masking network" in out


def test_what_does_not_fit_ends_with_3_and_advice_that_holds(request_of, capsys, monkeypatch):
    small = Gpu(2 * GB + 4_000_000, 312e12, 19.5e12, 300 * GB)
    monkeypatch.setattr("mlomae.commands.plan.command.find_gpu", lambda name, dtype: small)
    request = request_of()
    assert main(request) == 3
    advised = [line.split() for line in capsys.readouterr().out.splitlines() if "steps=" in line]
    assert advised
    assert main(replace(request, overrides=(advised[-1][0],))) == 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"gpu": "a101"}, "--gpu a101 is not known: give one of v100-32gb"),
        ({"nodes": 0}, "--nodes is 0"),
        ({"utilization": 40.0}, "--utilization is 40.0"),
        ({"gpus_per_node": 3}, "pretrain.batch_size is 64"),
        ({"recipe": "finetune_vit_base_patch16_imagenet"}, "must be mlo_mae or mae"),
    ],
)
def test_bad_input_ends_with_2_and_a_sentence(request_of, capsys, changes, named):
    assert main(request_of(**changes)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error


def test_a_gpu_without_bf16_is_refused_for_it(request_of, capsys):
    request = request_of(gpu="v100-32gb")
    assert main(request) == 0
    Path(request.deepspeed_config).write_text(json.dumps(config(1) | {"bf16": {"enabled": True}}))
    assert main(request) == 2
    assert "has no bf16" in capsys.readouterr().err


def test_changes_of_a_plan_keep_the_rest():
    plan = Plan(recipe(), config(1), Cluster(GPU, 1, 2, 0.4, GB))
    changed = plan.with_recipe("pretrain.gradient_accumulation_steps", 4)
    assert changed.recipe.pretrain.gradient_accumulation_steps == 4
    assert changed.recipe.model == plan.recipe.model
    assert plan.with_zero("stage", 3).config["zero_optimization"]["reduce_bucket_size"] == 1000
    assert plan.config["zero_optimization"]["stage"] == 1


def test_a_model_with_weights_of_its_own_is_planned_at_stage_3():
    """Trained positions lie in no layer; they are freed after a forward pass, and come back."""
    zero = {
        "stage3_param_persistence_threshold": 10,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
    positions = {**MODEL, "trainable_positions": True}
    cycles = [
        simulate(recipe("mlo_mae", model=positions), config(3, **more), world_size=2)
        for more in (zero, {})
    ]
    assert cycles[0].flops == cycles[1].flops
    assert cycles[0].fullest.total < cycles[1].fullest.total
