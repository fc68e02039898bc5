"""The interventions of `--cap` and `--spec` in `generate` and `chat`, and the self-test of caps."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxpersona.cli.output import say
from jaxpersona.cli.support import progress
from jaxpersona.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from jaxpersona.interventions import Interventions
    from jaxpersona.models.model import Model
    from jaxpersona.vectors.caps import Caps
    from jaxpersona.vectors.vector import Axis


def open_caps(file: pathlib.Path, given: Mapping[str, str | None],
              suffix: str = "") -> Axis | Caps:
    """Load an axis, or the caps of one experiment, from a file.

    Args:
      file: the file of `--cap`, or the argument of `vectors check`.
      given: the values of the options `--cap-layers`, `--percentile`, `--of` and `--experiment`,
        by name; None for an option that was not given.
      suffix: the part `:FROM:TO[:pNN]` after the file name in the value of `--cap`, or "". `given`
        already contains its values; the suffix is used only in an error message.

    Raises:
      UserError: the file cannot be read or contains neither an axis nor caps, an option does not
        apply to the file, the axis lacks the percentile, or `--experiment` is unknown or, for
        a file with several experiments, missing.
    """
    from jaxpersona.ckpts.vectors import load_any, load_axis

    found = load_any(file)
    if not isinstance(found, dict):
        if given["--experiment"] is not None:
            raise UserError(f"--experiment applies only to files of caps; {file} contains "
                            f"a direction (kind: {found.kind})")
        axis = load_axis(file)
        if given["--percentile"] is not None or given["--of"] is not None:
            # report an unknown percentile before the model is loaded
            _floor(axis, given["--percentile"], given["--of"])
        return axis
    own = [name for name, value in given.items() if name != "--experiment" and value is not None]
    if own:
        raise UserError(f"{file}: the caps define their layers and floors; omit "
                        + (f"{suffix} from the value of --cap" if suffix else own[0]))
    name = given["--experiment"] or (next(iter(found)) if len(found) == 1 else None)
    if name is None or name not in found:
        raise UserError(f"{file}: choose an experiment with --experiment: {', '.join(found)}")
    return found[name]


def read_spec(file: pathlib.Path) -> Any:
    """Read the JSON file of `--spec` and return its content.

    Raises:
      UserError: the file cannot be read, is not JSON, or contains null.
    """
    from jaxpersona.data.reading import Faults, parse, read_text

    faults = Faults()
    text = read_text(file, faults)
    found = None if text is None else parse(text, str(file), faults)
    faults.raise_if_any(file)
    if found is None:  # JSON null; `Edits.asked` is None only if `--spec` was not given
        raise UserError(f"{file}: contains null; give at least one intervention")
    return found


def cap_edits(model: Model, held: Axis | Caps, layers: str | None, percentile: str | None,
              of: str | None, check: bool, where: str = "everywhere") -> Interventions:
    """Return the interventions of `--cap`, after a self-test if `check` is True.

    Args:
      model: the model.
      held: the axis or caps of `--cap`.
      layers, percentile, of: the values of `--cap-layers`, `--percentile` and `--of`.
      check: whether to run the self-test.
      where: the tokens to cap, as a value of `--where`.

    Raises:
      UserError: the axis or caps belong to another model or fail the self-test, or the layers or
        the percentile are invalid.
    """
    from jaxpersona.interventions import cap, resolve_layers
    from jaxpersona.vectors.caps import Caps, fitted

    held = fitted(held, model.config, model.name, model.fingerprint)
    if isinstance(held, Caps):
        if check:
            _test(model, held)
        return held.interventions(where=where)
    total = model.config.n_layers
    chosen = resolve_layers(slice(total // 2, total) if layers is None else layers, total)
    floor = _floor(held, percentile, of)
    if check:
        _test(model, held, layers=chosen, floor=floor)
    return cap(held, layers=chosen, floor=floor, where=where)


def _floor(axis: Axis, percentile: str | None, of: str | None) -> np.ndarray:
    """Return an axis's thresholds [L]; by default, percentile "p25" of the population "default"."""
    return axis.thresholds(percentile or "p25", of=of or "default")


def spec_edits(model: Model, spec: Any, file: pathlib.Path, check: bool) -> Interventions:
    """Return the interventions of `--spec`, after a self-test of the caps if `check` is True.

    Args:
      model: the model.
      spec: the content of the file (see `read_spec`).
      file: the file, for messages and for the paths in it, which are relative to its folder.
      check: whether to run the self-test on the caps that it supports (see `_test_operator`).

    Raises:
      UserError: the file contains invalid interventions, or a cap fails the self-test.
    """
    from jaxpersona.interventions import specs

    folder = file.parent
    try:
        edits = specs.interventions(spec, model, folder=folder)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    if check:
        many = isinstance(spec, list)
        for i, item in enumerate(spec if many else [spec]):
            if item.get("operator") == "cap":
                _test_operator(model, item, folder, f"interventions[{i}]: " if many else "")
    return edits


def _test_operator(model: Model, item: dict[str, Any], folder: pathlib.Path, at: str) -> None:
    """Run the self-test on a cap of `--spec` if its `vector` names an axis file.

    If the axis was not measured in the residual stream, print that the cap is not tested.

    Args:
      model: the model.
      item: the JSON object of the cap.
      folder: the folder of the `--spec` file.
      at: the position of the cap in the file, as a prefix of messages.
    """
    from jaxpersona.ckpts.vectors import load_vector
    from jaxpersona.vectors.vector import Axis

    if not isinstance(item["vector"], str):
        return
    axis, floor = load_vector(folder / item["vector"]), item.get("floor")
    if not isinstance(axis, Axis):
        return
    if axis.site != "residual":
        _say(f"{at}not tested, because the self-test supports only axes of the residual stream, "
             f"and this axis was measured at site {axis.site}")
        return
    if isinstance(floor, str):
        floor = axis.thresholds(floor, of=item["of"])
    if floor is None:  # the cap has only a ceiling, so there are no floors to test
        axis = dataclasses.replace(axis, percentiles={})
    _test(model, axis, at, layers=item["layers"], floor=floor)


def _test(model: Model, held: Axis | Caps, at: str = "", **options: Any) -> None:
    """Run the self-test with a progress display, and print its result.

    Raises:
      UserError: the cap fails the self-test, or the self-test cannot be run.
    """
    from jaxpersona.persona.check import check

    with progress() as report:
        def count_replies(done: int, count: int, tokens: int) -> None:
            report("check", done, count, tokens)

        try:
            found = check(model, held, **options, progress=count_replies)
        except UserError as error:
            raise UserError(f"{at}{error} (--no-check skips the self-test)") from None
    if not found.ok:
        raise UserError(f"{at}the cap fails the self-test: "
                        f"{'; '.join(found.faults)} (--no-check skips the self-test)")
    _say(f"{at}{'; '.join(found.sentences)}")


def _say(what: str) -> None:
    """Print a line about the self-test to standard error."""
    say(f"check: {what}", error=True)
