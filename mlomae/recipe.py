"""The typed recipe of a training run: read from YAML, checked, printed.

Two kinds of keys:

* `output_dir`, `data.num_workers`, `checkpoint.*` and `monitor.*` must not change results;
  a resumed run may give them other values (`RESULT_NEUTRAL_KEYS`).
* Every other key changes results; a resumed run must repeat it (`differing_keys`).

`load_recipe` reads the YAML which `dump_recipe` writes. What a preset or `base_lr` implies is
filled in while reading, so a dumped recipe is complete.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, overload

from pydantic import NonNegativeInt, PositiveFloat, ValidationError, model_validator
from typing_extensions import Self

from mlomae._recipe_data import (
    AugmentationRecipe,
    DataRecipe,
    DownstreamRecipe,
    ImagesRecipe,
    LabelledRecipe,
)
from mlomae._recipe_levels import (
    CheckpointRecipe,
    ClassifierRecipe,
    HypergradientRecipe,
    LevelRecipe,
    MonitorRecipe,
)
from mlomae._recipe_model import (
    NETWORKS,
    PRESET_SIZES,
    EncoderRecipe,
    MaskingRecipe,
    ModelRecipe,
)
from mlomae._recipe_section import FilePath, FilePaths, Names, Refusal, Section, flatten, nearest
from mlomae._yaml import dump_yaml, parse_yaml
from mlomae.errors import UserError

__all__ = [
    "RESULT_NEUTRAL_KEYS",
    "AugmentationRecipe",
    "CheckpointRecipe",
    "ClassifierRecipe",
    "DataRecipe",
    "DownstreamRecipe",
    "EncoderRecipe",
    "HypergradientRecipe",
    "ImagesRecipe",
    "LabelledRecipe",
    "LevelRecipe",
    "MaskingRecipe",
    "ModelRecipe",
    "MonitorRecipe",
    "Recipe",
    "RunRecipe",
    "differing_keys",
    "dump_recipe",
    "load_recipe",
    "read_values",
]

RESULT_NEUTRAL_KEYS = ("output_dir", "data.num_workers", "checkpoint", "monitor")
"""Keys, or whole sections, which must not change results."""

_SHIPPED = Path(__file__).resolve().parents[1] / "launch" / "recipes"


class RunRecipe(Section):
    """What every training run has; each kind of run adds its levels."""

    method: str
    """What is trained."""
    seed: NonNegativeInt = 0
    """Seed of every random draw: weights, split, data order, crops, masks, dropout."""
    output_dir: FilePath
    """Folder of checkpoints, metrics and pictures."""
    # The literature counts cycles: with k1 = 2, the "50 epochs" of the MLO-MAE paper are
    # 100 passes of the encoder over its images, so they are written `epochs: 100` here.
    epochs: PositiveFloat
    """Passes over the training images of the first level, whatever steps_per_cycle is."""
    init_from: FilePaths = ()
    """Weights to start from: a file or folder, or several that make one model: published MAE and
    MAE-CT files, timm, Hugging Face, a run of this project."""
    init_from_expected: Names = ()
    """Names which may be missing from init_from or left over, with * for any text."""
    model: EncoderRecipe
    data: ImagesRecipe
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    monitor: MonitorRecipe = MonitorRecipe()

    @property
    def levels(self) -> dict[str, LevelRecipe]:
        """The levels which the run trains, by name, lowest first."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        for name, level in self.levels.items():
            if level.warmup_epochs >= self.epochs:
                problem = f"is {level.warmup_epochs:g}, but must be below epochs {self.epochs:g}"
                raise Refusal(f"{name}.warmup_epochs", problem)
        return self

    @model_validator(mode="after")
    def _check_init_from(self) -> Self:
        if self.init_from_expected and not self.init_from:
            raise Refusal("init_from_expected", "is given without init_from: add or remove one")
        return self


class Recipe(RunRecipe):
    """Pretraining of a masked autoencoder."""

    method: Literal["mlo_mae", "mae"]
    """Learned masks (three levels) or random masks (pretrain alone)."""
    model: ModelRecipe
    masking: MaskingRecipe
    data: DataRecipe
    downstream: DownstreamRecipe | None = None
    pretrain: LevelRecipe
    classifier: ClassifierRecipe | None = None
    mask: LevelRecipe | None = None
    hypergradient: HypergradientRecipe = HypergradientRecipe()

    @property
    def levels(self) -> dict[str, LevelRecipe]:
        """The levels which the method trains, by name, lowest first."""
        levels = {"pretrain": self.pretrain, "classifier": self.classifier, "mask": self.mask}
        return {name: level for name, level in levels.items() if level is not None}

    @property
    def labelled(self) -> DownstreamRecipe:
        """What classifier and mask learn from; the recipe must be one of `mlo_mae`."""
        if self.downstream is not None:
            return self.downstream
        assert self.data.num_classes is not None
        return DownstreamRecipe(
            task="classification", train=self.data.train, num_classes=self.data.num_classes
        )

    @model_validator(mode="before")
    @classmethod
    def _fill_network(cls, values: Any) -> Any:
        """Give the masking section the default network of the method."""
        if not isinstance(values, dict) or values.get("method") not in NETWORKS:
            return values
        masking = values.get("masking") or {}
        if not isinstance(masking, dict) or masking.get("network") is not None:
            return values
        return {**values, "masking": {**masking, "network": NETWORKS[values["method"]][0]}}

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        for name in ("classifier", "mask"):
            given = getattr(self, name) is not None
            if self.method == "mlo_mae" and not given:
                raise Refusal(name, "is missing: method mlo_mae needs this section, add it")
            if self.method == "mae" and given:
                problem = "is given, but method mae trains no such level: remove the section"
                raise Refusal(name, problem)
        return self

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        is_given = self.data.num_classes is not None
        if self.downstream is not None and self.method != "mlo_mae":
            problem = (
                f"is given, but method {self.method} learns from no labels: remove the section"
            )
            raise Refusal("downstream", problem)
        if self.downstream is not None and is_given:
            problem = "is given, but the labels are those of downstream: remove it"
            raise Refusal("data.num_classes", problem)
        if self.method == "mlo_mae" and self.downstream is None and not is_given:
            problem = "is missing: method mlo_mae needs the number of classes, add it"
            raise Refusal("data.num_classes", problem)
        return self

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        for name, level in self.levels.items():
            accumulation = level.gradient_accumulation_steps
            if name != "pretrain" and accumulation > 1:
                key = f"{name}.gradient_accumulation_steps"
                problem = f"is {accumulation}, but this level steps on one micro-batch: use 1"
                raise Refusal(key, problem)
            if name == "mask" and level.steps_per_cycle > 1:
                problem = f"is {level.steps_per_cycle}, but the mask steps once per cycle: use 1"
                raise Refusal("mask.steps_per_cycle", problem)
            if level.num_views > 1 and self.method != "mae":
                problem = f"is {level.num_views}, but several views are for method mae: use 1"
                raise Refusal(f"{name}.num_views", problem)
        return self

    @model_validator(mode="after")
    def _check_hypergradient(self) -> Self:
        if self.method != "mlo_mae":
            if self.hypergradient != HypergradientRecipe():
                problem = f"is given, but method {self.method} has none: remove the section"
                raise Refusal("hypergradient", problem)
            return self
        for name in ("pretrain", "classifier"):
            unrolled = getattr(self.hypergradient, f"{name}_steps")
            taken = self.levels[name].steps_per_cycle
            if unrolled > taken:
                problem = (
                    f"is {unrolled}, but {name}.steps_per_cycle is {taken}: lower the one or "
                    "raise the other"
                )
                raise Refusal(f"hypergradient.{name}_steps", problem)
        return self

    @model_validator(mode="after")
    def _check_checkpointing(self) -> Self:
        own = self.hypergradient
        has_tangents = own.relative_step is None and own.radius is None
        needs_hessian = own.estimator in ("neumann", "conjugate_gradient") or (
            own.estimator == "unrolled" and own.pretrain_steps > 1
        )
        if self.model.activation_checkpointing and needs_hessian and has_tangents:
            problem = (
                f"is true, but estimator {own.estimator} differentiates the encoder's blocks "
                "twice here: set it to false, unroll one pretrain step, or use truncated"
            )
            raise Refusal("model.activation_checkpointing", problem)
        return self

    @model_validator(mode="after")
    def _check_masking(self) -> Self:
        network, known = self.masking.network, NETWORKS[self.method]
        if network not in known:
            problem = f"is {network}, but method {self.method} has {' and '.join(known)}: use one"
            raise Refusal("masking.network", problem)
        try:
            self.masking.check_ratios(self.model.num_patches)
        except Refusal as refusal:
            raise Refusal(f"masking.{refusal.key}", refusal.problem) from None
        return self


R = TypeVar("R", bound=RunRecipe)


@overload
def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe: ...
@overload
def load_recipe(path: str | Path, overrides: Sequence[str], schema: type[R]) -> R: ...
def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), schema: type[RunRecipe] = Recipe
) -> RunRecipe:
    """Read and check a recipe.

    Args:
        path: A YAML file, or the name of a shipped recipe such as
            `mlo_mae_vit_base_patch16_imagenet`.
        overrides: Texts `key.subkey=value`, the value in YAML; the last one wins.
        schema: The kind of run.

    Raises:
        UserError: The file or an override cannot be read, or a key or value is wrong.
    """
    file = _find(path)
    values = read_values(file)
    for override in overrides:
        _apply_override(values, override)
    try:
        _refuse_other_method(values, schema)
        _refuse_unknown_keys(values, schema)
        return schema.model_validate(values)
    except Refusal as refusal:
        key, problem = refusal.key, refusal.problem
    except ValidationError as error:
        key, problem = _describe(error, schema)
    # the mistake may stand in an override of this section, or in one which bears on all levels
    section = re.escape(key.split(".")[0])
    suspects = [text for text in overrides if re.match(rf"({section}[.=]|(method|epochs)=)", text)]
    raise UserError(f"{' with '.join([str(file), *suspects])}: {key} {problem}")


def read_values(file: Path) -> dict[str, Any]:
    """The keys and values of a recipe of any kind, unchecked.

    Raises:
        UserError: the file cannot be read, or is no recipe.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {file} cannot be read ({error}): give a YAML file") from None
    values = parse_yaml(text, str(file))
    if not isinstance(values, dict):
        raise UserError(f"{file}: a recipe is a list of `key: value` lines, this file is not")
    return values


def dump_recipe(recipe: RunRecipe) -> str:
    """Return the complete recipe as YAML, which `load_recipe` turns into an equal one."""
    return dump_yaml(recipe.model_dump(mode="json", exclude_none=True))


def differing_keys(a: RunRecipe, b: RunRecipe) -> list[str]:
    """Return the dotted keys which change results and differ between two recipes."""
    values_a, values_b = (dict(flatten(recipe.model_dump())) for recipe in (a, b))
    keys = dict.fromkeys([*values_a, *values_b])
    return [
        key
        for key in keys
        if values_a.get(key) != values_b.get(key)
        and not any(f"{key}.".startswith(f"{neutral}.") for neutral in RESULT_NEUTRAL_KEYS)
    ]


def _find(path: str | Path) -> Path:
    """Return the file of a path or of a shipped recipe's name."""
    file = Path(path)
    shipped = _SHIPPED / f"{path}.yaml"
    if file.is_file():
        return file
    if file.name == str(path) and shipped.is_file():
        return shipped
    names = sorted(recipe.stem for recipe in _SHIPPED.glob("*.yaml"))
    hint = f", of which {nearest(file.stem, names)} is the nearest" if names else ""
    raise UserError(f"recipe {path} is no file: give a YAML file or a shipped recipe's name{hint}")


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `key.subkey=value` in nested values."""
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"override {override} has no value: write it as key.subkey=value")
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values = values[section]
    if key == "model.preset":
        # sizes which the file spells out would silently win over the preset asked for here
        for size in PRESET_SIZES:
            values.pop(size, None)
    values[name] = parse_yaml(text, f"override {override}")


def _refuse_other_method(values: dict[str, Any], schema: type[RunRecipe]) -> None:
    """Refuse a recipe of another kind of run, before its keys are all called unknown."""
    known = get_args(schema.model_fields["method"].annotation)
    method = values.get("method")
    if isinstance(method, str) and known and method not in known:
        kind = " or ".join(known)
        raise Refusal("method", f"is {method}, but must be {kind} here: give such a recipe or run")


def _refuse_unknown_keys(values: dict[str, Any], schema: type[RunRecipe]) -> None:
    """Refuse a key which no recipe has, with the nearest one which it has.

    Runs before the types are checked, since a misspelt key often makes another one missing.
    """
    valid = list(_help_texts(schema))
    for key, _ in flatten(values):
        if key not in valid:
            # the right key in the wrong section is likelier than a misspelt one
            same_name = [known for known in valid if known.split(".")[-1] == key.split(".")[-1]]
            hint = nearest(key, same_name or valid)
            raise Refusal(key, f"is no key of a recipe: the nearest valid key is {hint}")


def _help_texts(section: type[Section], prefix: str = "") -> dict[str, str]:
    """Return every dotted key of a section, those of sections in it included, with its help."""
    texts = {}
    for name, field in section.model_fields.items():
        texts[f"{prefix}{name}"] = field.description or ""
        # `X | None` holds the section X in its arguments
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                texts |= _help_texts(kind, f"{prefix}{name}.")
    return texts


def _describe(error: ValidationError, schema: type[RunRecipe]) -> tuple[str, str]:
    """Return the dotted key of the first mistake and what is wrong with it."""
    first = error.errors()[0]
    names = [str(part) for part in first["loc"]]
    refusal = first.get("ctx", {}).get("error")
    if isinstance(refusal, Refusal):
        return ".".join([*names, refusal.key]), refusal.problem
    key, value = ".".join(names), json.dumps(first["input"], default=str)
    text = _help_texts(schema).get(re.sub(r"\.\d+$", "", key))
    meaning = f" ({' '.join(text.rstrip('.').split())})" if text else ""
    if first["type"] == "missing":
        return key, f"is missing: add it{meaning}"
    if first["type"] == "model_type":
        return key, f"is {value}, but must be a section with keys of its own"
    must = re.sub("^Input (should be|is not)| for <class.*", "", first["msg"]).strip()
    return key, f"is {value}, but must be {must}{meaning}"
