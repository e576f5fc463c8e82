"""Environment variables: switches that are on or off, old names and misspelled ones."""

import difflib
import os
from collections.abc import Iterable

from llmtuner.aliases import VARIABLES
from llmtuner.console import exit_with_error

ON = ("1", "true", "yes", "on")
OFF = ("", "0", "false", "no", "off")
# How alike two names must be: CORPUSDIR and BASE_MODEL are reported, AWS_PROFILE and WORKSPACE_DIR are not.
SIMILARITY = 0.85


def env_flag(name: str) -> bool:
    """Reads a switch such as OVERWRITE; unset and empty are off. A value that is neither on nor off ends the program."""
    name = next((old for old, present in deprecated_variables() if present == name), name)
    value = os.environ.get(name, "").strip().lower()
    if value not in ON + OFF:
        exit_with_error(f"{name}={os.environ[name]} is neither on nor off. Set {name}=1, or leave it out.")
    return value in ON


def deprecated_variables() -> list[tuple[str, str]]:
    """Finds variables that are set under an earlier name only: (that name, the present one)."""
    return [(old, present) for old, present in VARIABLES.items() if os.environ.get(old) and present not in os.environ]


def misspelled_variables(names: Iterable[str]) -> list[tuple[str, str]]:
    """Finds environment variables that nobody reads but whose names are close to one of `names`.

    Returns:
        (name in the environment, name that was probably meant), unless the latter is set as well.
    """
    plain = {name.replace("_", ""): name for name in names}
    found = []
    for name in sorted(os.environ):
        spelled = name.upper().replace("_", "").replace("-", "")
        for near in difflib.get_close_matches(spelled, plain, n=1, cutoff=SIMILARITY):
            if name not in plain.values() and plain[near] not in os.environ:
                found.append((name, plain[near]))
    return found
