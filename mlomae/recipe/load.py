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
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from mlomae.errors import UserError
from mlomae.recipe.model import PRESET_SIZES
from mlomae.recipe.run import RunRecipe
from mlomae.recipe.section import Refusal, Section, flatten, nearest
from mlomae.recipe.yaml_text import dump_yaml, parse_yaml

RESULT_NEUTRAL_KEYS = ("output_dir", "data.num_workers", "checkpoint", "monitor")
"""Keys, or whole sections, which must not change results."""

_SHIPPED = Path(__file__).resolve().parents[2] / "launch" / "recipes"


R = TypeVar("R", bound=RunRecipe)


def load_recipe(path: str | Path, schema: type[R], overrides: Sequence[str] = ()) -> R:
    """Read and check a recipe.

    Args:
        path: A YAML file, or the name of a shipped recipe such as
            `mlo_mae_vit_base_patch16_imagenet`.
        schema: The kind of run.
        overrides: Texts `key.subkey=value`, the value in YAML; the last one wins.

    Raises:
        UserError: The file or an override cannot be read, or a key or value is wrong.
    """
    file = find_recipe(path)
    values = read_values(file, overrides)
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


def read_values(file: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The keys and values of a recipe of any kind, unchecked.

    Args:
        overrides: as `load_recipe` has them.

    Raises:
        UserError: the file or an override cannot be read, or is no recipe.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {file} cannot be read ({error}): give a YAML file") from None
    values = parse_yaml(text, str(file))
    if not isinstance(values, dict):
        raise UserError(f"{file}: a recipe is a list of `key: value` lines, this file is not")
    for override in overrides:
        _apply_override(values, override)
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


def find_recipe(path: str | Path) -> Path:
    """Return the file of a path or of a shipped recipe's name.

    Raises:
        UserError: there is none.
    """
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
