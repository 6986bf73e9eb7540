"""Recipes: read, overridden, printed, compared, and refused in one sentence."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from mlomae.errors import UserError
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.recipe import RESULT_NEUTRAL_KEYS, differing_keys, dump_recipe, load_recipe, read_values
from mlomae.recipe.hypergradient import build_estimator

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
# those of pretraining; other kinds of runs have other schemas
SHIPPED = sorted(
    path.stem
    for path in RECIPES.glob("*.yaml")
    if read_values(path).get("method") in ("mae", "mlo_mae")
)
QUICKSTART = "quickstart_mlo_mae"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: str | Path, *overrides: str) -> str:
    """Return the one sentence with which a recipe is refused."""
    with pytest.raises(UserError) as caught:
        load_recipe(path, PretrainingRecipe, overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_survives_a_round_trip(name, tmp_path):
    recipe = load_recipe(name, PretrainingRecipe)
    assert load_recipe(RECIPES / f"{name}.yaml", PretrainingRecipe) == recipe
    assert load_recipe(write(tmp_path, dump_recipe(recipe)), PretrainingRecipe) == recipe


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("pretrain.batch_size=64", 64),
        ("pretrain.weight_decay=1e-2", 0.01),  # plain YAML 1.1 reads text here
        ("pretrain.weight_decay=0", 0.0),
        ("data.mean=[0.1, 0.2, 0.3]", (0.1, 0.2, 0.3)),
        ("data.train=/data/a b=c.beton", Path("/data/a b=c.beton")),
        ("output_dir='1e5'", Path("1e5")),
        ("checkpoint.interval_epochs=null", None),
        ("model.norm_pix_loss=false", False),
        ("model.image_size=35", (35, 35)),
        ("model.image_size=[35, 14]", (35, 14)),
        ("init_from=weights.pth", (Path("weights.pth"),)),
        ("init_from=[encoder.th, decoder.th]", (Path("encoder.th"), Path("decoder.th"))),
    ],
)
def test_override_is_applied_and_printed(text, value, tmp_path):
    recipe = load_recipe(QUICKSTART, PretrainingRecipe, [text])
    value_read = recipe
    for name in text.partition("=")[0].split("."):
        value_read = getattr(value_read, name)
    assert value_read == value and type(value_read) is type(value)
    assert load_recipe(write(tmp_path, dump_recipe(recipe)), PretrainingRecipe) == recipe


def test_last_override_wins():
    assert load_recipe(QUICKSTART, PretrainingRecipe, ["seed=1", "seed=2"]).seed == 2


def test_explicit_sizes_win_over_the_preset_of_the_same_file(tmp_path):
    text = (RECIPES / "mae_vit_base_patch16_imagenet.yaml").read_text(encoding="utf-8")
    path = write(tmp_path, text.replace("preset: vit_base", "preset: vit_tiny\n  depth: 3"))
    model = load_recipe(path, PretrainingRecipe).model
    assert (model.embed_dim, model.depth, model.num_heads) == (192, 3, 3)


def test_preset_of_an_override_wins_over_the_sizes_of_the_file():
    model = load_recipe(
        QUICKSTART, PretrainingRecipe, ["model.preset=vit_small", "model.depth=2"]
    ).model
    assert (model.embed_dim, model.depth, model.num_heads) == (384, 2, 6)


@pytest.mark.parametrize(
    ("name", "overrides", "network", "hidden_dim"),
    [
        (QUICKSTART, ["masking.hidden_dim=null"], "mlp", 512),
        (QUICKSTART, ["masking.network=light", "masking.hidden_dim=null"], "light", 128),
        (QUICKSTART, ["masking.network=light", "masking.hidden_dim=64"], "light", 64),
        (QUICKSTART, ["masking=null"], "mlp", 512),
        ("quickstart_mae", [], "random", 512),
        ("quickstart_mae", ["masking.network=block"], "block", 512),
    ],
)
def test_masking_is_filled_in_by_method_and_network(name, overrides, network, hidden_dim):
    masking = load_recipe(name, PretrainingRecipe, overrides).masking
    assert (masking.network, masking.hidden_dim) == (network, hidden_dim)


@pytest.mark.parametrize(
    "key", ["selection=gumbel_top_k", "weighting=normalized", "scores=coupled"]
)
def test_masks_that_are_not_learned_have_no_such_key(key):
    name, value = key.split("=")
    sentence = refusal("quickstart_mae", f"masking.{key}")
    assert f"masking.{name} is {value}, but network random has no scores" in sentence


def test_base_lr_fills_lr():
    level = load_recipe(
        QUICKSTART, PretrainingRecipe, ["mask.lr=null", "mask.base_lr=1e-3", "mask.batch_size=64"]
    ).mask
    assert level is not None and level.lr == pytest.approx(2.5e-4)


def test_base_lr_counts_views():
    overrides = ["pretrain.lr=null", "pretrain.base_lr=1e-3", "pretrain.batch_size=64"]
    level = load_recipe(
        "quickstart_mae", PretrainingRecipe, [*overrides, "pretrain.num_views=2"]
    ).pretrain
    assert level.lr == pytest.approx(1e-3 * 2 * 64 / 256)


def test_labels_are_those_of_the_images_unless_there_is_a_section_downstream():
    recipe = load_recipe(QUICKSTART, PretrainingRecipe)
    labelled = recipe.labelled
    assert (labelled.task, labelled.train, labelled.num_classes) == (
        "classification",
        recipe.data.train,
        10,
    )
    section = "downstream={task: segmentation, train: scenes.beton, num_classes: 3}"
    other = load_recipe(QUICKSTART, PretrainingRecipe, ["data.num_classes=null", section])
    assert other.labelled == other.downstream and other.labelled.task == "segmentation"
    assert sorted(differing_keys(recipe, other)) == [
        "data.num_classes",
        *(f"downstream.{key}" for key in ("num_classes", "task", "train")),
    ]


# overrides -> what the sentence must hold: key, value, fix
REFUSED = {
    "typo": (["pretrain.batchsize=3"], "pretrain.batchsize", "pretrain.batch_size"),
    "wrong section": (["pretrain.dropout=0"], "pretrain.dropout", "classifier.dropout"),
    "no section": (["mask_ratio=0.5"], "mask_ratio", "masking.mask_ratio"),
    "below a value": (["seed.x=1"], "seed.x", "nearest valid key is seed"),
    "preset": (["model.preset=vit_bsae"], "model.preset", "vit_bsae", "vit_base"),
    "no number": (["pretrain.lr=fast"], "pretrain.lr", '"fast"', "valid number"),
    "truth as number": (["pretrain.batch_size=true"], "pretrain.batch_size", "true", "integer"),
    "half a batch": (["mask.batch_size=1.5"], "mask.batch_size", "1.5", "integer"),
    "kept of what": (
        ["checkpoint.interval_epochs=null", "checkpoint.keep_every=3"],
        *("checkpoint.keep_every is given without interval_epochs", "add or remove one"),
    ),
    "no epochs": (["epochs=0"], "epochs is 0", "greater than 0", "Passes over the training images"),
    "endless": (["epochs=.inf"], "epochs", "finite"),
    "choice": (["pretrain.optimizer=lion"], "pretrain.optimizer", '"lion"', "'adamw' or 'sgd'"),
    "kind": (["data.augmentation.kind=x"], "data.augmentation.kind", '"x"', "pad_crop"),
    "two channels": (["data.mean=[0, 0]"], "data.mean.2", "missing", "Mean of each channel"),
    "zero std": (["data.std=[1, 0, 1]"], "data.std.1", "0", "greater than 0"),
    "scale": (["data.augmentation.scale=[1, 0.2]"], "augmentation.scale", "[1.0, 0.2]", "rising"),
    "section as value": (["model=vit_base"], "model", '"vit_base"', "section"),
    "patches": (["model.image_size=30"], "model.image_size", "30", "use 28 or 35"),
    "patches of one side": (["model.image_size=[28, 30]"], "model.image_size", "30", "28 or 35"),
    "size": (["model.image_size=wide"], "model.image_size", '"wide"', "one number for a square"),
    "attention": (["model.attention=fast"], "model.attention", "'fast'", "flash_attn, sdpa"),
    "network of mae": (["masking.network=block"], "masking.network", "mlo_mae", "mlp and light"),
    "network": (["masking.network=cnn"], "masking.network", '"cnn"', "'light'"),
    "heads of light": (
        ["masking.network=light", "masking.hidden_dim=30"],
        "masking.hidden_dim",
        "30",
        "of 4",
    ),
    "compiled anew": (
        ["model.compile_blocks=true", "model.drop_path_rate=0.1"],
        "model.compile_blocks",
        "drop",
    ),
    "checkpointing": (
        ["model.activation_checkpointing=true", "hypergradient.estimator=neumann"],
        "model.activation_checkpointing",
        "neumann",
        "truncated",
    ),
    "checkpointing of two steps": (
        ["model.activation_checkpointing=true", "hypergradient.pretrain_steps=2"],
        "model.activation_checkpointing",
        "unroll one pretrain step",
    ),
    "last ratio": (["masking.mask_ratio_end=0.99"], "masking.mask_ratio_end", "0 of 16"),
    "cold": (["masking.temperature=2"], "masking.temperature", "top_k draws nothing", "remove"),
    "expected of nothing": (["init_from_expected=[norm.*]"], "init_from_expected", "without"),
    "weights": (["init_from=3"], "init_from is 3", "Hugging Face"),
    "heads": (["model.num_heads=5"], "model.embed_dim", "128", "num_heads 5", "multiple of 20"),
    "positions": (["model.embed_dim=6", "model.num_heads=2"], "model.embed_dim", "by 4"),
    "decoder": (["model.decoder_num_heads=7"], "model.decoder_embed_dim", "64", "multiple of 28"),
    "mask ratio": (["masking.mask_ratio=1"], "masking.mask_ratio", "less than 1"),
    "all hidden": (["masking.mask_ratio=0.99"], "masking.mask_ratio", "0 of 16", "at least one"),
    "none hidden": (["masking.mask_ratio=1e-20"], "masking.mask_ratio", "16 of 16"),
    "no mask level": (["mask=null"], "mask is missing", "mlo_mae", "add it"),
    "no classifier level": (["classifier=null"], "classifier is missing", "mlo_mae", "add it"),
    "levels of mae": (["method=mae"], "classifier", "mae", "remove the section"),
    "no classes": (["data.num_classes=null"], "data.num_classes", "missing", "add it"),
    "one class": (["data.num_classes=1"], "data.num_classes", "1", "greater than or equal to 2"),
    "task": (
        ["downstream={task: boxes, train: a.beton, num_classes: 3}", "data.num_classes=null"],
        "downstream.task",
        '"boxes"',
        "'classification' or 'segmentation'",
    ),
    "half a section": (
        ["downstream={task: classification, num_classes: 3}", "data.num_classes=null"],
        "downstream.train",
        "missing",
    ),
    "views of mlo_mae": (["pretrain.num_views=2"], "pretrain.num_views", "2", "method mae"),
    "k3": (["mask.steps_per_cycle=2"], "mask.steps_per_cycle", "2", "use 1"),
    "accumulation": (
        ["classifier.gradient_accumulation_steps=4"],
        "classifier.gradient_accumulation_steps",
        "4",
        "use 1",
    ),
    "warm-up": (
        ["mask.warmup_epochs=99", "epochs=9"],
        "mask.warmup_epochs",
        "99",
        "below epochs 9",
    ),
    "two rates": (["mask.lr=2", "mask.base_lr=1"], "mask.lr", "2", "base_lr 1", "remove one"),
    "no rate": (["mask.lr=null"], "mask.lr", "missing", "give lr or base_lr"),
    "bad base_lr": (["mask.lr=null", "mask.base_lr=x"], "mask.base_lr", '"x"', "valid number"),
    "min_lr": (["mask.min_lr=1"], "mask.min_lr", "1", "lower it"),
    "unroll beyond the cycle": (
        ["hypergradient.pretrain_steps=9"],
        "hypergradient.pretrain_steps is 9",
        "pretrain.steps_per_cycle is 2",
        "lower the one",
    ),
    "estimator": (["hypergradient.estimator=exact"], "estimator", '"exact"', "'unrolled'"),
    "terms without Neumann": (["hypergradient.terms=5"], "terms is set", "choose neumann"),
    "steps without unrolling": (
        ["hypergradient.estimator=identity", "hypergradient.pretrain_steps=2"],
        "pretrain_steps is set",
        "identity has no such key",
    ),
    "two differences": (
        ["hypergradient.radius=0.01", "hypergradient.relative_step=1e-4"],
        "radius",
        "remove one of the two",
    ),
    "no value": (["seed"], "seed", "key.subkey=value"),
    "no YAML": (["data.mean=[1"], "data.mean=[1", "fix"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_value_is_refused_in_one_sentence(case):
    overrides, *parts = REFUSED[case]
    sentence = refusal(QUICKSTART, *overrides)
    for part in parts:
        assert part in sentence
    # names the override to blame, and the file when it takes both to be wrong
    assert overrides[0] in sentence
    assert QUICKSTART in sentence or "override" in sentence


def test_mistake_of_the_file_names_the_file(tmp_path):
    text = (RECIPES / "quickstart_mae.yaml").read_text(encoding="utf-8")
    path = write(tmp_path, text.replace("weight_decay:", "weight_decya:"))
    sentence = refusal(path, "seed=3")
    assert sentence.startswith(f"{path}: pretrain.weight_decya")
    assert "pretrain.weight_decay" in sentence


def test_missing_key_is_named_with_its_meaning(tmp_path):
    text = (RECIPES / "quickstart_mae.yaml").read_text(encoding="utf-8")
    sentence = refusal(write(tmp_path, text.replace("output_dir: runs/quickstart/mae", "")))
    assert "output_dir is missing: add it (Folder of checkpoints" in sentence


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("method: mae\n  seed: 1\n", "line 2"),
        ("method: mae\nseed: 1\nseed: 2\n", "line 3, column 1: the key seed stands twice"),
        ("model:\n  depth: 1\n  depth: 2\n", "line 3, column 3: the key depth stands twice"),
        ("a\0b", "unreadable characters"),
        ("", "this file is not"),
        ("- method\n", "this file is not"),
    ],
)
def test_broken_file_is_refused(text, part, tmp_path):
    path = write(tmp_path, text)
    sentence = refusal(path)
    assert str(path) in sentence and part in sentence


def test_unreadable_file_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert str(path) in refusal(path)


def test_unknown_recipe_names_the_nearest_shipped_one(tmp_path):
    sentence = refusal("mlo_mae_vit_bse_patch16_imagenet")
    assert "mlo_mae_vit_base_patch16_imagenet is the nearest" in sentence
    missing = tmp_path / "quickstart_mea.yaml"
    sentence = refusal(missing)
    assert str(missing) in sentence and "quickstart_mae is the nearest" in sentence


def test_recipe_is_frozen():
    recipe = load_recipe(QUICKSTART, PretrainingRecipe)
    with pytest.raises(ValidationError):
        recipe.pretrain.lr = 1.0  # type: ignore[misc]


def test_every_key_of_the_schema_is_explained():
    def keys(section, prefix=""):
        for name, field in section.model_fields.items():
            sections = [
                kind
                for kind in (field.annotation, *getattr(field.annotation, "__args__", ()))
                if hasattr(kind, "model_fields")
            ]
            if sections:
                assert sections[0].__doc__
                yield from keys(sections[0], f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", field.description

    assert [key for key, text in keys(PretrainingRecipe) if not text] == []


def test_differing_keys_skips_what_must_not_change_results():
    recipe = load_recipe(QUICKSTART, PretrainingRecipe)
    neutral = [
        "output_dir=elsewhere",
        "data.num_workers=7",
        "checkpoint.keep=9",
        "checkpoint.interval_epochs=1",
        "monitor.log_interval=3",
    ]
    assert differing_keys(recipe, load_recipe(QUICKSTART, PretrainingRecipe, neutral)) == []
    changed = ["seed=1", "mask.lr=0.5", "data.augmentation.flip=false", "data.train=b.beton"]
    keys = differing_keys(recipe, load_recipe(QUICKSTART, PretrainingRecipe, changed))
    assert sorted(keys) == sorted(text.partition("=")[0] for text in changed)
    assert all(hasattr(recipe, key.split(".")[0]) for key in RESULT_NEUTRAL_KEYS)


ESTIMATORS = {
    "Unrolled(steps={'pretrain': 2, 'classifier': 1})": ["hypergradient.pretrain_steps=2"],
    "Truncated(steps={'pretrain': 1, 'classifier': 1})": ["hypergradient.estimator=truncated"],
    "Sama()": ["hypergradient.estimator=sama"],
    "Neumann(terms=5, step_size=0.1)": ["hypergradient.estimator=neumann", "hypergradient.terms=5"],
    "ConjugateGradient(iterations=5, tolerance=1e-06, damping=0.5)": [
        "hypergradient.estimator=conjugate_gradient",
        "hypergradient.damping=0.5",
    ],
    "FiniteDifference(estimator=Identity(), radius=0.01)": [
        "hypergradient.estimator=identity",
        "hypergradient.radius=0.01",
    ],
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_estimator_is_what_the_recipe_asks_for(name):
    recipe = load_recipe(QUICKSTART, PretrainingRecipe, ESTIMATORS[name])
    assert str(build_estimator(recipe.hypergradient)) == name


def test_mae_has_no_hypergradient():
    sentence = refusal("quickstart_mae", "hypergradient.estimator=sama")
    assert "hypergradient" in sentence and "remove the section" in sentence
