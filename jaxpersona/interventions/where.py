"""Token tests, which select tokens for interventions and captures by kind and turn.

A token test is encoded as five integers. The integers are data, so batch rows may have different
tests, and changing a test does not trigger recompilation.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.calls import checked_call, is_integer
from jaxpersona.errors import UserError
from jaxpersona.models.batch import (
    ASSISTANT,
    GENERATED,
    KINDS,
    LAST,
    MARK,
    SYSTEM,
    TEMPLATE,
    THINKING,
    USER,
    VALID,
    Batch,
)

FOREVER = 2**31 - 1
WIDTH = 5  # the number of integers in an encoded test
NOWHERE = (-1, 0, 0, 0, 0)  # a test that no token passes, because it requires all kinds

_ROLES = SYSTEM | USER | ASSISTANT  # a token has at most one of these kinds


@dataclasses.dataclass(frozen=True)
class Where:
    """A test on a token's kind and turn.

    A token passes if its kind has all bits of `need`, at least one bit of `any` (unless `any` is 0)
    and no bit of `none`, and if lo ≤ turn < hi, where `turn` is the index of the token's message. A
    token passes `a & b` if it passes both tests; a `UserError` is raised if a single test cannot
    express this, or if no token can pass. `a.without("first", …)` excludes tokens of the named
    kinds.

    Examples:
      >>> import jaxpersona as jp
      >>> jp.response.without("code").within(2, 4)
      response.without('code').within(2, 4)
      >>> jp.user & jp.everywhere.without("first")
      user.without('first')
    """

    need: int = VALID
    any: int = 0
    none: int = 0
    lo: int = 0
    hi: int = FOREVER

    def __and__(self, other: Where) -> Where:
        if not isinstance(other, Where):
            return NotImplemented
        if self.any and other.any and self.any != other.any:
            raise UserError(f"{self} & {other} is not a single test, because both require one of "
                            "several kinds; combine at most one such test with other tests")
        both = Where(self.need | other.need, self.any | other.any, self.none | other.none,
                     max(self.lo, other.lo), min(self.hi, other.hi))
        if both.need & both.none or (both.need & _ROLES).bit_count() > 1:
            raise UserError(f"{self} & {other} selects no token; combine tests of different roles "
                            "with |")
        return both

    def __or__(self, other: Where) -> Where:
        """Return the test that selects the tokens of either test, such as `user | system`.

        Raises:
          UserError: a single test cannot express the union.
        """
        if not isinstance(other, Where):
            return NotImplemented
        common = self.need & other.need
        own, theirs = self.need & ~common, other.need & ~common
        if (self.none, self.lo, self.hi) == (other.none, other.lo, other.hi):
            for test, alone in ((self, own), (other, theirs)):
                if not alone and not test.any:  # `test` selects all tokens of the other
                    return test
            kinds = [test.any or alone for test, alone in ((self, own), (other, theirs))
                     if alone.bit_count() == (not test.any)]
            if len(kinds) == 2:
                return Where(common, kinds[0] | kinds[1], self.none, self.lo, self.hi)
        raise UserError(f"{self} | {other} is not a single test; chain one intervention per test, "
                        "or join one capture per test")

    def without(self, *kinds: str) -> Where:
        """Return a test that also excludes tokens of the given kinds, such as "first" or "code".

        Raises:
          UserError: a kind is not in `batch.KINDS`.
        """
        return dataclasses.replace(self, none=self.none | _bits(kinds))

    def within(self, lo: int, hi: int = FOREVER) -> Where:
        """Return a test that also requires lo ≤ turn < hi for the index `turn` of the message.

        Raises:
          UserError: a bound is not an integer, or the range is empty.
        """
        if not all(is_integer(bound) and bound >= 0 for bound in (lo, hi)):
            raise UserError(f"within({lo!r}, {hi!r}) needs nonnegative integers, the indices of "
                            "messages")
        restricted = self & Where(lo=lo, hi=hi)
        if restricted.lo >= restricted.hi:
            raise UserError(f"within({lo}, {hi}) contains no message; lo must be less than hi, and "
                            "chained ranges must overlap")
        return restricted

    def encode(self) -> np.ndarray:
        """Return the encoded test, [5] int32."""
        return np.array([self.need, self.any, self.none, self.lo, self.hi], np.int32)

    def __repr__(self) -> str:
        """Return the test as an expression, such as `everywhere.without('first')`."""
        excluded = {name: self.none & ~test.none for name, test in NAMED.items()
                    if (test.need, test.any) == (self.need, self.any)
                    and not test.none & ~self.none}
        if excluded:  # use the named test that requires the fewest exclusions
            name = min(excluded, key=lambda name: excluded[name].bit_count())
            kinds = [repr(kind) for kind, bit in KINDS.items() if excluded[name] & bit]
            text = name + (f".without({', '.join(kinds)})" if kinds else "")
        else:
            text = f"Where(need={self.need}, any={self.any}, none={self.none})"
        if (self.lo, self.hi) == (0, FOREVER):
            return text
        return text + f".within({self.lo}{'' if self.hi == FOREVER else f', {self.hi}'})"


def _bits(kinds: tuple[str, ...]) -> int:
    bits = 0
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"kind {kind!r} is unknown; choose from {', '.join(KINDS)}")
        bits |= KINDS[kind]
    return bits


everywhere = Where()
prompt = Where(none=GENERATED)
generated = Where(need=VALID | GENERATED)
last = Where(need=VALID | LAST)
from_last = Where(any=LAST | GENERATED)
system = Where(need=VALID | SYSTEM)
user = Where(need=VALID | USER)
assistant = Where(need=VALID | ASSISTANT)
response = Where(need=VALID | ASSISTANT, none=THINKING | TEMPLATE)
marked = Where(need=VALID | MARK)

NAMED = {
    "everywhere": everywhere, "prompt": prompt, "generated": generated, "last": last,
    "from_last": from_last, "system": system, "user": user, "assistant": assistant,
    "response": response, "marked": marked,
}


def as_where(where: Where | str) -> Where:
    """Convert a `where` argument (a token test or a name in `NAMED`) to a token test.

    Raises:
      UserError: the name is unknown, or the argument has the wrong type.
    """
    if isinstance(where, str) and where in NAMED:
        return NAMED[where]
    if not isinstance(where, Where):
        raise UserError(f"where is {where!r}; give a test such as jaxpersona.generated or "
                        f"jaxpersona.turns('user'), or one of the names {', '.join(NAMED)}")
    return where


def encoded(where: Where | str) -> np.ndarray:
    """Encode a `where` argument (a token test or a name in `NAMED`) as [5] int32.

    Raises:
      UserError: the name is unknown, or the argument has the wrong type.
    """
    return as_where(where).encode()


def decoded(code: np.ndarray) -> Where:
    """Return the token test with the given encoding [5] (inverse of `Where.encode`)."""
    return Where(*(int(number) for number in code))


@checked_call
def turns(role: str) -> Where:
    """Return the test that selects the content of a role's messages.

    Args:
      role: "system", "user" or "assistant".

    Raises:
      UserError: the role is not one of these.

    Examples:
      >>> import jaxpersona as jp
      >>> jp.turns("user") == jp.user
      True
    """
    if role not in ("system", "user", "assistant"):
        raise UserError(f"role is {role!r}; it must be 'system', 'user' or 'assistant'")
    return NAMED[role]


def holds(code: jax.Array, batch: Batch) -> jax.Array:
    """Evaluate encoded token tests on a batch.

    Args:
      code: the encoded tests, int32: [5] or [1, 5], one for all rows, or [B, 5], one per row.
      batch: a batch of B rows of T tokens.

    Returns:
      [B, T] bool, True for tokens that pass the test.
    """
    code = code.reshape(-1, WIDTH)  # [1, 5] or [B, 5]
    need, any_of, none, lo, hi = (code[:, i, None] for i in range(WIDTH))
    kind = batch.kind.astype(jnp.int32)
    ok = ((kind & need) == need) & ((kind & none) == 0)
    ok &= (any_of == 0) | ((kind & any_of) != 0)
    return ok & (batch.turn >= lo) & (batch.turn < hi)
