"""Recipes of commands: YAML files whose keys are the command's flags."""

import argparse
from pathlib import Path
from typing import Any

from mlomae.errors import UserError
from mlomae.recipe import read_values
from mlomae.recipe.section import nearest

_SHIPPED = Path(__file__).resolve().parents[2] / "launch" / "recipes"


def parse_with_recipe(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse a command line whose `--recipe` comes first: flags beside it win.

    Raises:
        UserError: the recipe is not there, or a key or value of it is wrong.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--recipe")
    recipe = finder.parse_known_args(argv)[0].recipe
    if recipe is None:
        return parser.parse_args(argv)
    file = _find(recipe, Path(parser.prog).stem)
    return parser.parse_args([*_to_flags(parser, read_values(file), file), *argv])


def _find(recipe: str, command: str) -> Path:
    """The file of a path, or of the name of a recipe that is shipped for the command."""
    file, shipped = Path(recipe), _SHIPPED / f"{recipe}.yaml"
    if file.is_file():
        return file
    if file.name == recipe and shipped.is_file():
        return shipped
    names = sorted(path.stem for path in _SHIPPED.glob(f"{command}*.yaml"))
    hint = f", of which {nearest(file.stem, names)} is the nearest" if names else ""
    raise UserError(f"--recipe {recipe} is no file: give a YAML file or a shipped name{hint}")


def _to_flags(parser: argparse.ArgumentParser, values: dict[str, Any], file: Path) -> list[str]:
    actions = {a.dest: a for a in parser._actions if a.option_strings and a.dest != "recipe"}
    flags = []
    for key, value in values.items():
        if key not in actions:
            near = nearest(str(key), sorted(actions))
            raise UserError(f"{file}: {key} is no flag of {parser.prog}: {near} is the nearest")
        flags += _to_flag(actions[key], value, file)
    return flags


def _to_flag(action: argparse.Action, value: Any, file: Path) -> list[str]:
    """A value as the texts that would stand on the command line."""
    positive, *negative = action.option_strings
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{file}: {action.dest} is {value}: write true or false")
        return [positive] if value else negative
    texts = [str(one) for one in (value if isinstance(value, list) else [value])]
    for text in texts:
        _check(action, text, file)
    return [positive, *texts]


def _check(action: argparse.Action, text: str, file: Path) -> None:
    """Refuse what argparse would, with the name of the file."""
    try:
        value = action.type(text) if callable(action.type) else text
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise UserError(f"{file}: {action.dest}: {error}") from None
    if action.choices is not None and value not in action.choices:
        raise UserError(f"{file}: {action.dest} is {text}: choose {' or '.join(action.choices)}")
