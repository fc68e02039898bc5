"""Select roles by name, from the beginning of a list, or as a pseudorandom sample."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence

from jaxpersona.brief import escaped
from jaxpersona.data.texts import DEFAULT, Role
from jaxpersona.errors import UserError


def roles_named(roles: Sequence[Role], names: Sequence[str]) -> list[Role]:
    """Return the default persona, and then the roles with these names in the order of `roles`.

    Raises:
      UserError: a name is unknown.
    """
    known = {role.name for role in roles}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), 3)
            raise UserError(f"{name!r} is not the name of a role" + (
                f"; similar names: {', '.join(map(escaped, near))}" if near else
                "; `jaxpersona data show role` lists the roles of the package"))
    return _default_first(roles, names)


def some_roles(roles: Sequence[Role], count: int) -> list[Role]:
    """Return the default persona, and then a pseudorandom sample of at most `count` other roles.

    Roles are selected in the order of a hash of their names, and returned in the order of `roles`.
    A larger sample therefore contains every smaller sample, and a run can be extended with more
    roles.

    Examples:
      >>> from jaxpersona.data.choosing import some_roles
      >>> from jaxpersona.data.texts import load_roles
      >>> [role.name for role in some_roles(load_roles(), 3)]
      ['default', 'mirror', 'trickster_god', 'werewolf']
    """
    others = sorted((role.name for role in roles if role.name != DEFAULT),
                    key=lambda name: hashlib.sha256(
                        name.encode("utf-8", "surrogateescape")).digest())[:count]
    return _default_first(roles, others)


def first_roles(roles: Sequence[Role], count: int) -> list[Role]:
    """Return the default persona, and then the first `count` other roles, or all if fewer."""
    return _default_first(roles, [role.name for role in roles if role.name != DEFAULT][:count])


def _default_first(roles: Sequence[Role], names: Sequence[str]) -> list[Role]:
    chosen = [role for role in roles if role.name in names and role.name != DEFAULT]
    return [role for role in roles if role.name == DEFAULT] + chosen
