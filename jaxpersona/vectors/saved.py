"""The method `save` of directions and caps."""

from __future__ import annotations

import os
from typing import Any


class Saved:
    """A direction or caps, which can be written to a file."""

    def save(self, path: str | os.PathLike[str]) -> list[str]:
        """Write the values and metadata to a file (`save_vector`).

        Returns:
          Descriptions of the parts that the file's format cannot store.

        Raises:
          UserError: as for `save_vector`.
        """
        from jaxpersona.ckpts.vectors import save_vector  # which imports the subclasses

        held: Any = self
        return save_vector(path, held)
