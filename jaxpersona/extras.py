"""Packages that only some functions need; the error for a missing one names its `pip` line.

`require` imports a package on first use, so `import jaxpersona` loads none of them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

from jaxpersona.errors import UserError

# package → what pip installs: an extra of this package, or a dependency that was removed
REQUIREMENTS = (
    ("torch", "'jaxpersona[torch]'"), ("gguf", "'jaxpersona[gguf]'"),
    ("libtpu", "'jaxpersona[tpu]'"), ("matplotlib", "'jaxpersona[figures]'"),
    ("openai", "'jaxpersona[http]'"),
    ("pandas", "'jaxpersona[frames]'"), ("sklearn", "scikit-learn"), ("scipy", "scipy"),
    ("orbax", "orbax-checkpoint"), ("transformers", "transformers"),
    ("huggingface_hub", "huggingface_hub"),
)
_NO_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


class MissingPackage(UserError):
    """Error for a package that is not installed; the message names the line that installs it."""


def pip_line(package: str) -> str:
    """Return the command that installs a package of `REQUIREMENTS`.

    Example:
      >>> from jaxpersona.extras import pip_line
      >>> pip_line("sklearn")
      'pip install scikit-learn'
    """
    return f"pip install {dict(REQUIREMENTS)[package]}"


def installed(package: str) -> bool:
    """Return whether a package can be found, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module without a specification, or None, was put into sys.modules
        return False


def require(module: str, purpose: str, otherwise: str = "") -> Any:
    """Import a module of a package of `REQUIREMENTS`, and return it.

    Args:
      module: such as "orbax.checkpoint".
      purpose: what needs the package, for the error message.
      otherwise: another remedy, which follows the `pip install` line.

    Raises:
      MissingPackage: the package is not installed, or its import fails.

    Example:
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
    """Suppress the advice to install PyTorch that transformers prints while it is imported."""
    before = os.environ.get(_NO_ADVICE)
    os.environ.setdefault(_NO_ADVICE, "1")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_NO_ADVICE, None)
