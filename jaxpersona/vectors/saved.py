"""The method `save` of directions and caps.

The module `ckpts.vectors`, which reads and writes files, imports the classes of this package, so
this package cannot import `ckpts.vectors`. Instead, `ckpts.vectors` assigns its function
`save_vector` to `Saved.write` when it is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, ClassVar


class Saved:
    """The base class of directions and caps, with a method that writes the object to a file."""

    write: ClassVar[Callable[[Any, Any], list[str]]]

    def save(self, path: str | os.PathLike[str]) -> list[str]:
        """Write the values and metadata to a file (see `save_vector`).

        Returns:
          Descriptions of the parts that the file's format cannot store.

        Raises:
          UserError: as for `save_vector`.
        """
        return type(self).write(path, self)
