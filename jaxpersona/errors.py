"""The exception that is raised for invalid user input."""

from __future__ import annotations


class UserError(ValueError):
    """Raised for an invalid argument, file or setting; the message states the value and the fix.

    The command `jaxpersona` prints the message as one line and exits with code 2. Other
    exceptions usually indicate a bug in this library, and their traceback is shown.

    Examples:
      >>> import jaxpersona as jp
      >>> try:
      ...     jp.load("mini", dtype="int4")
      ... except jp.UserError as error:
      ...     print(error)
      dtype is 'int4'; it must be one of float32, bfloat16, float16, int8
    """
