"""Selection of roles whose names are not plain text."""

from __future__ import annotations

import pytest

from jaxpersona.brief import escaped, named
from jaxpersona.data.choosing import roles_named, some_roles
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
