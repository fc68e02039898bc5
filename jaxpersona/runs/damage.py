"""The exception for damaged files of a run, and the fix that its message proposes."""

from __future__ import annotations

import pathlib
import shlex
from collections.abc import Sequence

from jaxpersona.errors import UserError


class Damaged(UserError):
    """Error for a file of a role that is missing, unreadable, changed or from another role or run.

    Attributes:
      role: the name of the role.
      fault: the path of the file and a description of the damage.
    """

    def __init__(self, role: str, path: pathlib.Path, why: str) -> None:
        self.role, self.fault = role, f"{path}: damaged ({why})"
        super().__init__(f"{self.fault}; {remedy([role])}")


def remedy(roles: Sequence[str]) -> str:
    """Return the end of an error message: how to replace the damaged files of the given roles."""
    options = " ".join(f"--redo {shlex.quote(role)}" for role in roles)
    return f"restore the damaged data, or regenerate it with redo={list(roles)!r} ({options})"
