"""Safe file names for the names of roles and judges."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterable

from jaxpersona.brief import shown
from jaxpersona.errors import UserError

_SAFE = frozenset(string.ascii_letters + string.digits + "_-.")
_LONGEST = 200  # maximum bytes of a file stem; file systems allow 255, and suffixes need the rest


def file_stem(role: str) -> str:
    """Return the file name for a role, without its suffix.

    ASCII letters, digits, `_`, `-` and `.` are kept. A leading `.` and every other UTF-8 byte are
    written as `%XX`. File names therefore contain no path separators, and different roles have
    different file names.
    """
    out = [chr(byte) if chr(byte) in _SAFE else f"%{byte:02X}" for byte in role.encode()]
    return "".join(["%2E" if out[:1] == ["."] else "".join(out[:1]), *out[1:]])


def judge_folder(judge: str) -> str:
    """Return a judge's `file_stem` as a folder name; over 100 bytes, a digest replaces its end."""
    stem = file_stem(judge)
    if len(stem) <= 100:
        return stem
    return f"{stem[:83]}-{hashlib.sha256(judge.encode()).hexdigest()[:16]}"


def check_names(roles: Iterable[str]) -> None:
    """Check that every role name can be used as a file name, and that no two names collide.

    Raises:
      UserError: `roles` is not iterable; a name is empty, not a string, not valid UTF-8 or too
        long; or two names are equal or differ only in case (some file systems ignore case).
    """
    seen: set[str] = set()
    if not isinstance(roles, Iterable):
        raise UserError(f"roles is {shown(roles, 60)}; give a list of role names")
    for role in roles:
        if not isinstance(role, str) or not role:
            raise UserError(f"a role name is {role!r}; it must be a non-empty string")
        try:
            stem = file_stem(role)
        except UnicodeEncodeError:
            raise UserError(f"the role name {role[:40]!r} contains a lone surrogate, which is not "
                            "valid UTF-8; rename the role") from None
        if len(stem) > _LONGEST:
            raise UserError(f"the role name {role[:40]!r}… takes {len(stem)} bytes as a file "
                            f"name; the limit is {_LONGEST}: shorten it")
        if stem.casefold() in seen:
            raise UserError(f"two roles are named {role!r}, or their names differ only in "
                            "upper and lower case; rename one of them")
        seen.add(stem.casefold())
