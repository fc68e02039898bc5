"""Convert an extraction, a run folder or arrays by role to the data of the figures of roles."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxpersona.brief import brief, shown
from jaxpersona.calls import is_integer
from jaxpersona.ckpts.vectors import load_axis
from jaxpersona.errors import UserError
from jaxpersona.inputs import read_json
from jaxpersona.interventions.bank import numbers
from jaxpersona.persona import axis as science
from jaxpersona.persona.extraction import Extraction
from jaxpersona.runs.run import Run
from jaxpersona.vectors.vector import Axis

_GIVE = ("give the result of extract_axis, the folder of a run of `jaxpersona axis`, or a dict of "
         "arrays by role")


@dataclasses.dataclass(frozen=True)
class Places:
    """The projections of R roles at one layer, in ascending order of the mean projection.

    Attributes:
      names: the R roles, without the default persona.
      means: the mean projection of each role [R].
      quartiles: the 25th and 75th percentiles of each role's projections [R, 2]; None if unknown.
      default: the mean and the 25th and 75th percentiles of the default persona's projections; None
        if unknown.
      held_out: the roles that were held out of the axis.
      layer: the layer.
    """

    __repr__ = brief

    names: list[str]
    means: np.ndarray
    quartiles: np.ndarray | None
    default: tuple[float, float, float] | None
    held_out: frozenset[str]
    layer: int


@dataclasses.dataclass(frozen=True)
class Parts:
    """The principal components of R role vectors at one layer.

    Attributes:
      names: the R roles.
      components: the principal components of the role vectors.
      default: the default persona's coordinates on the first min(2, C) of the C components; None
        if unknown.
      cosine: |cos(PC1, axis)|.
      layer: the layer.
    """

    __repr__ = brief

    names: list[str]
    components: science.Components
    default: np.ndarray | None
    cosine: float
    layer: int


def layer_of(layer: int | None, total: int) -> int:
    """Check and return a layer index for `total` layers; None selects the middle layer.

    Raises:
      UserError: the model has no such layer.
    """
    if layer is None:
        return total // 2
    if not is_integer(layer) or not 0 <= layer < total:
        raise UserError(f"layer is {shown(layer)}; the layers are 0…{total - 1}")
    return int(layer)


def places(found: Any, layer: int | None) -> Places:
    """Return the projections of every role at a layer.

    Args:
      found: an `Extraction`; the folder of a run; or role → projections [n, L] of n answers (or
        their mean [L]), with the default persona as "default".
      layer: the layer; default: the middle one.

    Raises:
      UserError: `found` has an unsupported type or no finite projection of a role at the layer, its
        run is incomplete or damaged, or the layer does not exist.
    """
    if isinstance(found, (str, os.PathLike)):
        return _of_folder(pathlib.Path(found), layer)
    if isinstance(found, Extraction):
        return _of_answers(found.projections, layer, frozenset(
            set(found.projections) - set(found.analysis.names) - {"default"})
            & frozenset(found.role_means), found.mean_projection)
    if not isinstance(found, Mapping):
        raise UserError(f"found is {shown(found, 60)}; {_GIVE}")
    return _of_answers(found, layer, frozenset())


def _of_answers(given: Mapping[str, Any], layer: int | None, held_out: frozenset[str],
                mean: Callable[[str], np.ndarray] | None = None) -> Places:
    """Return `Places` for arrays by role.

    Args:
      given: role → projections [n, L], or their mean [L].
      layer: the layer; default: the middle one.
      held_out: the roles that were held out of the axis.
      mean: a function that returns a role's mean projection [L]; default: the mean of its array.

    Raises:
      UserError: there is no role with a finite projection, the shapes differ, or the layer does not
        exist.
    """
    arrays = {str(name): numbers(f"found[{name!r}]", value) for name, value in given.items()}
    if not set(arrays) - {"default"}:
        raise UserError("found has no role; give projections of at least one role")
    shapes = {(value.ndim, value.shape[-1] if value.ndim else 0) for value in arrays.values()}
    if len(shapes) != 1 or not {dims for dims, _ in shapes} <= {1, 2}:
        raise UserError("found must have one array [n, L] per role or one array [L] per role, with "
                        "equal L; its arrays have shapes "
                        f"{sorted({v.shape for v in arrays.values()})[:4]}")
    dims, total = shapes.pop()
    at = layer_of(layer, total)
    answers = {name: value[..., at].reshape(-1) for name, value in arrays.items()}
    finite = {name: value[np.isfinite(value)] for name, value in answers.items()}
    answers = {name: value for name, value in finite.items() if value.size}
    if not set(answers) - {"default"}:
        raise UserError(f"found has no finite projection of a role at layer {at}; give another "
                        "layer")
    own = {name: (value.mean() if mean is None else float(mean(name)[at]),
                  *np.percentile(value, [25, 75])) for name, value in answers.items()}
    names = sorted((name for name in own if name != "default"), key=lambda name: own[name][0])
    table = np.array([own[name] for name in names])
    return Places(names, table[:, 0], table[:, 1:] if dims == 2 else None,
                  own.get("default") if dims == 2 else None, held_out, at)


def _of_folder(folder: pathlib.Path, layer: int | None) -> Places:
    """Return `Places` from the `analysis.json` of a run and the percentiles of its axis.

    Raises:
      UserError: the folder contains no complete run, a file is damaged, the layer does not exist,
        or no role has a finite projection at the layer.
    """
    about = _analysis(folder)
    axis = load_axis(folder / "axis.safetensors")
    at = layer_of(layer, axis.n_layers)
    try:
        means = {name: float(entry["mean_projection"][at])
                 for name, entry in about["roles"].items()}
        held = frozenset(name for name, entry in about["roles"].items() if entry["held_out"])
        quartiles = {name: [float(row[at]) for row in entry["quartiles"]]
                     for name, entry in about["roles"].items() if "quartiles" in entry}
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError,
            ValueError) as error:
        raise _damaged(folder, f" ({type(error).__name__}: {error})") from None
    means = {name: mean for name, mean in means.items() if np.isfinite(mean)}
    names = sorted((name for name in means if name != "default"), key=means.__getitem__)
    if not names:
        raise UserError(f"{folder}: no role has a finite projection at layer {at}; give another "
                        "layer")
    own = axis.percentiles.get("default", {})
    default = None
    if "default" in means and {"p25", "p75"} <= set(own):
        default = means["default"], float(own["p25"][at]), float(own["p75"][at])
    known = set(names) <= set(quartiles)
    return Places(names, np.array([means[name] for name in names]),
                  np.array([quartiles[name] for name in names]) if known else None, default,
                  held, at)


def parts(found: Any, layer: int | None, default: Any = None) -> Parts:
    """Return the role vectors' principal components at a layer, with |cos(PC1, axis)|.

    Args:
      found: an `Extraction` or `Analysis`; the folder of a run; or role → vector [L, D], with the
        default persona as "default".
      layer: the layer; default: the middle one.
      default: the default persona's mean activation [L, D], if `found` does not contain it.

    Raises:
      UserError: `found` has an unsupported type, its run is incomplete or damaged, there are fewer
        than two roles or no default persona, the vectors are not [L, D] of one shape, or the layer
        does not exist.
    """
    if isinstance(found, Axis):
        raise UserError(f"found is the axis {found.name!r}, a direction without role vectors; "
                        f"{_GIVE}")
    analysis = found.analysis if isinstance(found, Extraction) else found
    if isinstance(found, Extraction) and default is None:
        default = found.default
    if isinstance(analysis, science.Analysis):
        at = layer_of(layer, len(analysis.axis))
        names, vectors, axis = analysis.names, analysis.vectors[:, at], analysis.axis[at]
        components, cosine = analysis.components[at], float(analysis.cos_pc1[at])
    else:
        if isinstance(found, (str, os.PathLike)):
            by_role = _vectors(pathlib.Path(found))
        elif isinstance(found, Mapping):
            by_role = {str(name): numbers(f"found[{name!r}]", value)
                       for name, value in found.items()}
        else:
            raise UserError(f"found is {shown(found, 60)}; {_GIVE}")
        default = by_role.pop("default", default)
        if default is None or len(by_role) < 2 or len(
                {v.shape for v in by_role.values()} | {np.shape(default)}) > 1 or (
                np.ndim(default) != 2):
            raise UserError("found must have vectors [L, D] of one shape for at least two roles "
                            "and for 'default' (or default=)")
        at = layer_of(layer, len(default))
        names = sorted(by_role)
        vectors = np.stack([by_role[name][at] for name in names])
        axis = np.asarray(default)[at] - vectors.mean(0, dtype=np.float64)
        components = science.principal_components(vectors, axis)
        cosine = abs(science.cosine(components.directions[0], axis))
    point = None
    if default is not None:
        point = components.directions[:2] @ (
            np.asarray(default)[at] - vectors.mean(0, dtype=np.float64))
    return Parts(list(names), components, point, cosine, at)


def ratios(found: Any, layer: int | None) -> tuple[np.ndarray, int]:
    """Return the explained variance ratios of the C components at a layer, and the layer.

    Args:
      found: as for `parts`, or an array [C] of the ratios.
      layer: the layer; default: the middle one, or −1 (unknown) if `found` is an array of ratios.

    Raises:
      UserError: as for `parts`, the ratios are not an array [C > 0] of nonnegative numbers with a
        sum of at most 1, or `layer` is not an integer of at least 0.
    """
    if isinstance(found, (str, os.PathLike)):
        about = _analysis(pathlib.Path(found))
        kept = about.get("variance_ratio")
        table = kept if isinstance(kept, list) else []
        at = layer_of(layer, len(table))
        given = table[at]
    elif isinstance(found, (np.ndarray, list, tuple)):
        if layer is not None and (not is_integer(layer) or layer < 0):
            raise UserError(f"layer is {shown(layer)}; give an integer, at least 0")
        at, given = -1 if layer is None else int(layer), found
    else:
        read = parts(found, layer)
        return read.components.ratio, read.layer
    values = numbers("found", given)
    if values.ndim != 1 or not values.size or not (values >= 0).all() or values.sum() > 1.001:
        raise UserError(f"found is {shown(given, 60)}; give explained variance ratios [C], "
                        "nonnegative numbers with a sum of at most 1")
    return values, at


def _analysis(folder: pathlib.Path) -> dict[str, Any]:
    """Return the content of a run's `analysis.json`.

    Raises:
      UserError: the folder contains no run, or the file is missing or damaged.
    """
    Run.read(folder)  # raises an error if the folder contains no run
    path = folder / "analysis.json"
    if not path.exists():
        raise UserError(f"{folder}: the run is not complete; finish it with `jaxpersona axis "
                        f"--out {folder}` and the same settings")
    about = read_json(path)
    if not isinstance(about, dict):
        raise _damaged(folder)
    return about


def _damaged(folder: pathlib.Path, why: str = "") -> UserError:
    """Return the error for an invalid `analysis.json`."""
    return UserError(f"{folder / 'analysis.json'} is damaged{why}; run `jaxpersona axis` again to "
                     "rewrite it")


def _vectors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Return the role vectors that a run used for its axis, and the default persona's vector.

    Raises:
      UserError: the folder contains no complete run, or a file is damaged.
    """
    run, about = Run.read(folder), _analysis(folder)
    try:
        wanted = {name: "pos_3" for name, entry in about["roles"].items() if entry["in_axis"]}
        return {name: run.vectors(name)[kind]
                for name, kind in {"default": "mean", **wanted}.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise _damaged(folder, f" ({type(error).__name__}: {error})") from None
