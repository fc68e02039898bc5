"""The error of a damaged file of a run, and what helps."""

from __future__ import annotations

import pathlib
import shlex
from collections.abc import Sequence


class Damaged(ValueError):
    """A file of a role that is not what the run wrote.

    Attributes:
      role: whose file it is.
      fault: the file and what is wrong with it.
    """

    def __init__(self, role: str, path: pathlib.Path, why: str) -> None:
        self.role, self.fault = role, f"{path}: damaged ({why})"
        super().__init__(f"{self.fault}; {remedy([role])}")


def remedy(roles: Sequence[str]) -> str:
    """Say how to make damaged roles anew."""
    options = " ".join(f"--redo {shlex.quote(role)}" for role in roles)
    return f"restore the file, or make the role anew with redo={list(roles)!r} ({options})"
