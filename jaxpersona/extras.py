"""Lazy import of packages that only some functions need.

`require` imports a package on first use instead of on `import jaxpersona`. If the package is
missing, the error contains the `pip` command that installs it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

from jaxpersona.errors import UserError

# import name → argument of `pip install`: an extra of jaxpersona, or the name of a dependency
REQUIREMENTS = (
    ("torch", "'jaxpersona[torch]'"), ("gguf", "'jaxpersona[gguf]'"),
    ("libtpu", "'jaxpersona[tpu]'"), ("matplotlib", "'jaxpersona[figures]'"),
    ("openai", "'jaxpersona[http]'"), ("plotly", "'jaxpersona[report]'"),
    ("pandas", "'jaxpersona[frames]'"), ("sklearn", "scikit-learn"), ("scipy", "scipy"),
    ("orbax", "orbax-checkpoint"), ("transformers", "transformers"),
    ("huggingface_hub", "huggingface_hub"),
)
_NO_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


class MissingPackage(UserError):
    """Raised if a package cannot be imported; the message contains the command to install it."""


def pip_line(package: str) -> str:
    """Return the command that installs a package listed in `REQUIREMENTS`.

    Examples:
      >>> from jaxpersona.extras import pip_line
      >>> pip_line("sklearn")
      'pip install scikit-learn'
    """
    return f"pip install {dict(REQUIREMENTS)[package]}"


def installed(package: str) -> bool:
    """Return whether a package can be found, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # the module in sys.modules has no spec
        return False


def require(module: str, purpose: str, otherwise: str = "") -> Any:
    """Import and return a module of a package listed in `REQUIREMENTS`.

    Args:
      module: the module's full name, such as "orbax.checkpoint".
      purpose: the beginning of the error message, such as "figures need matplotlib".
      otherwise: the end of the error message, an alternative to installing the package.

    Raises:
      MissingPackage: the package is not installed, or its import fails.

    Examples:
      >>> from jaxpersona.extras import require
      >>> require("matplotlib.figure", "figures need matplotlib").Figure.__name__
      'Figure'
    """
    package = module.split(".")[0]
    line = pip_line(package) + (f", {otherwise}" if otherwise else "")
    try:
        with _without_advice():
            return importlib.import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in (
            package, "")
        why = "" if missing else f" ({package} cannot be imported: {' '.join(str(error).split())})"
        raise MissingPackage(f"{purpose}{why}: {line}") from None


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Suppress the advice to install PyTorch that transformers prints when it is imported."""
    before = os.environ.get(_NO_ADVICE)
    os.environ.setdefault(_NO_ADVICE, "1")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_NO_ADVICE, None)
