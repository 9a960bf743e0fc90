"""Recipes: a YAML file of flags, named method-teacher-student-data.

A recipe may hold any flag of the command line (`learning_rate` for --learning-rate), `options` for the method's
keywords, and `published`: the accuracy it aims at, with its source, or "not verified". A flag that is given on the
command line replaces the recipe's.
"""

import difflib
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "recipes"


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(name: str) -> dict[str, Any]:
    """A recipe by its name, or from a file. Raises ValueError with what is wrong."""
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
        if path.suffix not in (".yaml", ".yml"):
            near = difflib.get_close_matches(name, names(), 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(
                f"got {name!r}, takes the name of a recipe or a .yaml file; --list has the names{hint}"
            )
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"got '{path}', which cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"got '{path}', which is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"got '{path}', takes a file of names and values")
    return content
