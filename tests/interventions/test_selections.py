"""Unions and intersections of token tests, and what cannot be one test."""

from __future__ import annotations

import numpy as np
import pytest

import jaxpersona as jp
from jaxpersona.interventions.where import Where, decoded, encoded
from jaxpersona.models.batch import ASSISTANT, CODE, GENERATED, SYSTEM, USER, VALID


@pytest.mark.parametrize(("found", "wanted"), [
    (jp.user | jp.system, Where(VALID, USER | SYSTEM)),
    (jp.user | jp.system | jp.assistant, Where(VALID, USER | SYSTEM | ASSISTANT)),
    (jp.assistant | (jp.user | jp.system), Where(VALID, USER | SYSTEM | ASSISTANT)),
    (jp.user | jp.user, jp.user), (jp.everywhere | jp.user, jp.everywhere),
    (jp.user | jp.everywhere, jp.everywhere),
    (jp.user.within(1, 3) | jp.system.within(1, 3), Where(VALID, USER | SYSTEM, 0, 1, 3)),
    (jp.user.without("code") | jp.system.without("code"), Where(VALID, USER | SYSTEM, CODE)),
    (jp.user & jp.generated, Where(VALID | USER | GENERATED)),
    (jp.user.without("code") & jp.prompt, Where(VALID | USER, 0, CODE | GENERATED)),
    (jp.user.within(1, 5) & jp.everywhere.within(3, 9), Where(VALID | USER, 0, 0, 3, 5)),
], ids=str)
def test_two_tests_give_one(found, wanted):
    """The encoding of the result is that of the expected test."""
    assert found == wanted and decoded(encoded(found)) == wanted


@pytest.mark.parametrize(("one", "other"), [
    (jp.prompt, jp.generated), (jp.user.within(1, 3), jp.system.within(1, 4)),
    (jp.user.within(1, 3), jp.system.within(0, 3)), (jp.user.without("code"), jp.system),
    (jp.user & jp.generated, jp.system), (jp.user.within(0, 1), jp.user.within(1, 2)),
], ids=str)
def test_a_union_that_no_single_test_selects_is_refused(one, other):
    """In either order."""
    for first, second in ((one, other), (other, one)):
        with pytest.raises(ValueError, match="is not a single test; chain one intervention per"):
            first | second


@pytest.mark.parametrize(("one", "other"), [
    (jp.user, jp.system), (jp.assistant, jp.user), (jp.generated, jp.prompt),
    (jp.user, jp.everywhere.without("user")),
], ids=str)
def test_an_intersection_without_tokens_is_refused(one, other):
    """Two roles, or a kind that is both required and excluded."""
    for first, second in ((one, other), (other, one)):
        with pytest.raises(ValueError, match="selects no token; combine tests of different roles"):
            first & second


def test_a_test_is_joined_only_with_a_test():
    """A name is a test only as an argument."""
    with pytest.raises(TypeError):
        jp.user | "system"
    with pytest.raises(ValueError, match="where is None; give a test such as"):
        encoded(None)
    assert np.array_equal(encoded("user"), jp.user.encode()) and encoded("user").dtype == np.int32


def test_the_kinds_that_a_test_excludes_add_up():
    """Exclusions of a named test stay."""
    test = jp.everywhere.without("code").without("user", "code")
    assert test.none == CODE | USER and jp.response.without("code").none == jp.response.none | CODE
