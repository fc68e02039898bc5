"""Options of `jaxpersona axis` that set the number of rollouts: a target precision, or counts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any

import typer

from jaxpersona.brief import shown
from jaxpersona.errors import UserError

# option → (value of Lu et al. 2026, arXiv 2601.10387; value if the option is not given)
PAPER: Mapping[str, tuple[Any, Any]] = {
    "roles": ("data", None), "questions": ("data", None), "roles_named": (None, None),
    "limit_roles": (None, None), "limit_questions": (None, None), "samples": (1, 1),
    "max_new_tokens": (512, None), "temperature": (0.7, 0.7), "top_p": (0.9, 0.9),
    "min_count": (50, 10), "precision": (None, None)}


@dataclasses.dataclass(frozen=True)
class QuotaOptions:
    """The options `--precision`, `--rounds` and `--paper`, which set the number of rollouts."""

    precision: Annotated[float | None, typer.Option(
        "--precision", show_default="all questions", help=(
            "Generate in rounds over the questions, and stop as soon as the axis and the role "
            "vectors have this split-half reliability, e.g. 0.99: the lower end of its 95 % "
            "interval must reach it."))] = None
    rounds: Annotated[str | None, typer.Option(
        "--rounds", show_default="4,6,8,12,16,24,…", help=(
            "Numbers of questions after each round of --precision, ascending, e.g. 8,16,32. The "
            "last round has all questions."))] = None
    paper: Annotated[bool, typer.Option("--paper", help=(
        "Use the settings of Lu et al. 2026: the 275 roles and 240 questions of the package, one "
        "reply of up to 512 tokens for each prompt and question, and --min-count 50."))] = False

    def sizes(self) -> list[int] | None:
        """Return the value of `--rounds` as a list of integers, or None if it is not given.

        Raises:
          UserError: an item is not a nonnegative integer of at most nine digits.

        Examples:
          >>> from jaxpersona.cli.quota import QuotaOptions
          >>> QuotaOptions(0.99, "8,16").sizes()
          [8, 16]
        """
        if self.rounds is None:
            return None
        parts = [part.strip() for part in self.rounds.split(",")]
        if not all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
            raise UserError(f"--rounds is {shown(self.rounds, 60)}; give numbers of questions, "
                            "such as 8,16,32")
        return [int(part) for part in parts]


def of_paper(given: Mapping[str, Any], typed: Collection[str] = ()) -> dict[str, Any]:
    """Return a dict from each option in `PAPER` to the value that `--paper` sets.

    Args:
      given: the current value of each option in `PAPER`, by name.
      typed: the names of the options that the user gave, even with their default values.

    Raises:
      UserError: an option is given with a value that differs from the paper's.

    Examples:
      >>> from jaxpersona.cli.quota import PAPER, of_paper
      >>> of_paper({name: default for name, (_, default) in PAPER.items()})["min_count"]
      50
    """
    for name, (value, default) in PAPER.items():
        if given[name] != value and (given[name] != default or name in typed):
            option = f"--{name.replace('_', '-')}"
            means = "omits it" if value is None else f"sets it to {value}"
            raise UserError(f"{option} is {given[name]}, but --paper {means}; omit one of the two")
    return {name: value for name, (value, _) in PAPER.items()}
