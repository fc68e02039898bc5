"""Name a role's files after the role, whatever its name holds."""

from __future__ import annotations

import string
from collections.abc import Iterable

_SAFE = frozenset(string.ascii_letters + string.digits + "_-.")
_LONGEST = 200  # bytes: leaves room for the suffix and for a temporary name within 255


def file_stem(role: str) -> str:
    """Return the name of a role's files without suffix.

    Letters and digits of ASCII, `_`, `-` and `.` (but for a first one) stand for themselves, every
    other byte of the UTF-8 name becomes `%XX`; so no name leads out of its folder, and different
    names have different files.
    """
    out = [chr(byte) if chr(byte) in _SAFE else f"%{byte:02X}" for byte in role.encode()]
    return "".join(["%2E" if out[:1] == ["."] else "".join(out[:1]), *out[1:]])


def check_names(roles: Iterable[str]) -> None:
    """Refuse role names that cannot name files.

    Raises:
      ValueError: a name that is empty, no text, too long, or that another role has too (or has in
        other letters' case, which some file systems do not tell apart).
    """
    seen: set[str] = set()
    for role in roles:
        if not isinstance(role, str) or not role:
            raise ValueError(f"a role's name is {role!r}; it must be a text that is not empty")
        try:
            stem = file_stem(role)
        except UnicodeEncodeError:
            raise ValueError(f"the role name {role[:40]!r} holds half a surrogate pair, which is "
                             "not valid UTF-8; rename the role") from None
        if len(stem) > _LONGEST:
            raise ValueError(f"the role name {role[:40]!r}… takes {len(stem)} bytes as a file "
                             f"name; it may take {_LONGEST}: shorten it")
        if stem.casefold() in seen:
            raise ValueError(f"two roles are named {role!r}, or alike but for upper and lower "
                             "case; rename one of them")
        seen.add(stem.casefold())
