"""Checks of the fields of directions and caps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpersona.brief import shown
from jaxpersona.errors import UserError
from jaxpersona.interventions.bank import plain
from jaxpersona.models.params import SCHEME

# maximum number of bits of an integer in the notes; 1,024 bits are about 308 decimal digits, well
# below Python's default limit of 4,300 digits for converting an integer to text
_BITS = 1024


def float32(values: Any, field: str) -> np.ndarray:
    values = plain(values)
    if np.iscomplexobj(values):
        raise UserError(f"{field} is complex; give real numbers")
    try:
        # an overflow results in infinity, which the caller rejects
        with np.errstate(over="ignore"):
            return np.asarray(values, np.float32)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:  # e.g. 10**400, {}, "a"
        raise UserError(f"{field} cannot be converted to float32 ({error}); give numbers") from None


def check_names(found: Any) -> None:
    """Check the metadata of a direction or of caps, and convert the notes to Python values.

    Raises:
      UserError: a field is invalid.
    """
    for field in ("name", "model", "fingerprint"):
        value = getattr(found, field)
        if not isinstance(value, str):
            raise UserError(f"{field} is {value!r}; it must be a string")
    if not re.fullmatch(r"([0-9a-f]{16})?", found.fingerprint):
        raise UserError(f"fingerprint is {found.fingerprint!r}; it must be sixteen hexadecimal "
                        "digits in lower case, or empty")
    scheme = found.fingerprint_scheme
    if type(scheme) is not int or scheme < 1:
        raise UserError(f"fingerprint_scheme is {shown(scheme)}; it must be a positive integer "
                        f"({SCHEME} for a fingerprint that this version computes)")
    object.__setattr__(found, "notes", _plain(found.notes))


def _plain(notes: Any) -> dict[str, Any]:
    """Convert NumPy and JAX scalars in notes to Python scalars, which all file formats support.

    Raises:
      UserError: the notes are not a dict from strings to strings or numbers, or an integer has more
        than 1,024 bits.
    """
    if not isinstance(notes, Mapping):
        raise UserError(f"notes is of type {type(notes).__name__}; it must be a dict")
    plain = {}
    for name, value in notes.items():
        value = value.item() if getattr(value, "ndim", None) == 0 else value
        if isinstance(value, int) and value.bit_length() > _BITS:
            raise UserError(f"notes[{name!r:.40}] has {value.bit_length():,} bits; an integer may "
                            f"have up to {_BITS:,}")
        if not isinstance(name, str) or not isinstance(value, (str, int, float)):
            raise UserError(f"notes[{str(name)[:40]!r}] is of type {type(value).__name__}; keys "
                            "must be strings, and values must be strings or numbers")
        plain[name] = value
    return plain


def finite(value: Any, what: str) -> float:
    """Convert a factor or a divisor to a finite Python float.

    Args:
      value: the factor or divisor.
      what: the start of the error message, such as "vector 'a' was multiplied by".

    Raises:
      UserError: the value is complex, not finite, or too large for float64.
    """
    if np.isrealobj(value):
        try:
            number = float(value)
        except OverflowError:
            number = np.inf
        if np.isfinite(number):
            return number
    raise UserError(f"{what} {shown(value)}; use a finite real number")
