"""Groups of options: one parameter of a command contains the values of several options."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each dataclass parameter of a command with one option per field.

    Typer creates the options from the signature of the returned function, which passes an instance
    of the dataclass to the command. The fields need types and defaults as for a Typer command, with
    explicit option names; fields with `init=False` are not options.

    Examples:
      >>> import dataclasses, inspect
      >>> from typing import Annotated
      >>> import typer
      >>> from jaxpersona.cli.groups import grouped
      >>> @dataclasses.dataclass
      ... class Size:
      ...     rows: Annotated[int, typer.Option("--rows")] = 2
      ...     columns: Annotated[int, typer.Option("--columns")] = 3
      >>> @grouped
      ... def area(size: Size = Size()):
      ...     print(size.rows * size.columns)
      >>> list(inspect.signature(area).parameters)
      ['size_rows', 'size_columns']
      >>> area(size_rows=4)
      12
    """
    hints = typing.get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[type, dict[str, str]]] = {}
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if not dataclasses.is_dataclass(kind):
            parameters.append(parameter.replace(annotation=kind))
            continue
        options = typing.get_type_hints(kind, include_extras=True)
        names = {f"{parameter.name}_{field.name}": field.name for field in dataclasses.fields(kind)
                 if field.init}
        groups[parameter.name] = typing.cast(type, kind), names
        parameters += [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD,
                                         default=getattr(kind, field), annotation=options[field])
                       for name, field in names.items()]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, (kind, names) in groups.items():
            given[name] = kind(**{field: given.pop(option) for option, field in names.items()
                                  if option in given})
        command(**given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
