"""Selection of roles whose names are not plain text."""

from __future__ import annotations

import pytest

from jaxpersona.brief import escaped, named
from jaxpersona.data.choosing import first_roles, roles_named, some_roles
from jaxpersona.data.texts import Role
from jaxpersona.errors import UserError

NAMES = ("default", "a\udcff", "pirate\n\x1b[31mX", "c")  # "\udcff": a file name that is no UTF-8
ROLES = [Role(name, ("Be one.",), "") for name in NAMES]


def test_a_role_with_a_name_that_is_no_utf_8_can_be_in_a_sample():
    assert len(some_roles(ROLES, 2)) == 3 and len(some_roles(ROLES, 9)) == 4
    few = {role.name for role in some_roles(ROLES, 1)}
    assert few <= {role.name for role in some_roles(ROLES, 2)}


def test_messages_escape_control_characters_of_names():
    with pytest.raises(UserError) as error:
        roles_named(ROLES, ["pirate"])
    assert "similar names: pirate\\n\\x1b[31mX" in str(error.value)
    assert str(error.value).isprintable()
    assert named(NAMES, "role").isprintable() and escaped("é") == "é"


PLAIN = [Role(name, ("Be one.",), "") for name in ("a", "b", "default", "c", "d")]


def names(roles):
    return [role.name for role in roles]


def test_the_default_persona_comes_first_in_every_choice():
    """The others keep the order of the list, not that of the names asked for."""
    assert names(roles_named(PLAIN, ["d", "a", "d"])) == ["default", "a", "d"]
    assert names(roles_named(PLAIN, ["default"])) == ["default"]
    assert names(first_roles(PLAIN, 3)) == ["default", "a", "b", "c"]
    assert names(first_roles(PLAIN, 0)) == ["default"] and len(first_roles(PLAIN, 99)) == 5
    # SHA-256 of c, a, d and b begin with 2e, ca, 18 and 3e
    assert names(some_roles(PLAIN, 1)) == ["default", "d"]
    assert names(some_roles(PLAIN, 2)) == ["default", "c", "d"]
    assert names(some_roles(PLAIN, 3)) == ["default", "b", "c", "d"]


def test_an_unknown_role_without_a_similar_name_is_explained():
    """With the command that lists the names."""
    with pytest.raises(UserError, match="^'zzzz' is not the name of a role; `jaxpersona data"):
        roles_named(PLAIN, ["a", "zzzz"])
