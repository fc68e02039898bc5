"""The page of a run: one HTML file with all results, which needs no network.

The page contains plotly.js, its own script and all data. Its content security policy lists the
digests of these two scripts and forbids all other scripts and all requests. Code in a model's reply
therefore could not run even if the reply were not escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

from jaxpersona.calls import checked_call
from jaxpersona.ckpts.files import write_text
from jaxpersona.errors import UserError
from jaxpersona.extras import require
from jaxpersona.inputs import printable, read_bytes
from jaxpersona.progress import shows, steps
from jaxpersona.report import run_about
from jaxpersona.report.run_bars import intervals
from jaxpersona.report.run_drift import read_drift
from jaxpersona.report.run_read import check_run, read
from jaxpersona.report.run_values import Notes, values
from jaxpersona.runs.files import PAGE

HERE = pathlib.Path(__file__).parent
Progress = Callable[[str, int, int, int], None]


@checked_call
@shows(steps, "report")
def page(run: str | os.PathLike[str], *, report: Progress | bool | None = None) -> str:
    """Return one HTML document about a run of `jaxpersona axis`.

    The page shows the role vectors on two principal components, the ranking of the roles by their
    projections onto the axis, values by layer (|cos(PC1, axis)|, explained variance, split-half
    agreement of the axis), the thresholds with their bootstrap intervals, scores by role, persona
    drift (if the folder has drift.json), sample dialogues, and the provenance of the run. Parts for
    which the run has no results, such as the axis of an unfinished run, are omitted, and the page
    states the reason.

    Args:
      run: the run folder; it is not changed.
      report: by default, a call of more than three seconds shows its progress; False shows
        nothing. A function is called with (step, done, total, 0) instead.

    Raises:
      UserError: plotly is missing, the folder contains no run, one of its files is damaged, or the
        run changed while the page was being written.

    Examples:
      >>> import jaxpersona as jp
      >>> try:
      ...     jp.report.page("no-such-run")
      ... except jp.UserError as error:
      ...     print(error)
      no-such-run: contains no run; give the folder that `jaxpersona axis` wrote with --out
    """
    _check_path("run", run)
    folder = check_run(run)
    library, version = plotly_js()
    tell = report if callable(report) else None
    found, notes = read(folder, report=tell), Notes()
    drift = read_drift(folder, int(found.manifest.get("model", {}).get("layers", 1)))
    bars = intervals(found, tell)
    data = values(found, notes, drift, tell, bars)
    return _document(run_about.context(found, data, notes.lines, version, bars), data, library)


@checked_call
@shows(steps, "report")
def write_page(run: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, *,
               report: Progress | bool | None = None) -> pathlib.Path:
    """Write the page of a run (`page`) to a file, and return its path.

    Args:
      run: the run folder.
      out: the file, which is replaced if it exists; default: report.html in the run folder.
      report: by default, a call of more than three seconds shows its progress; False shows
        nothing. A function is called with (step, done, total, 0) instead.

    Raises:
      UserError: as for `page`, or the file cannot be written.

    Examples:
      >>> import jaxpersona as jp
      >>> try:
      ...     jp.report.write_page("no-such-run", "page.html")
      ... except jp.UserError as error:
      ...     print(error)
      no-such-run: contains no run; give the folder that `jaxpersona axis` wrote with --out
    """
    _check_path("run", run)
    if out is not None:
        _check_path("out", out)
    path = pathlib.Path(run) / PAGE if out is None else pathlib.Path(out)
    write_text(path, page(run, report=report))
    return path


def _check_path(name: str, value: Any) -> None:
    """Check that an argument is a path.

    Raises:
      UserError: the argument is neither a string nor a path.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise UserError(f"{name} is {value!r:.60}; give a path")


def plotly_js() -> tuple[str, str]:
    """Return the source of plotly.js and its version.

    Raises:
      UserError: plotly is not installed, or its script cannot be embedded in a page.
    """
    offline = require("plotly.offline", "the page of a run needs plotly")
    return _script(offline.get_plotlyjs()), str(offline.get_plotlyjs_version())


def clean(text: str) -> str:
    """Escape control characters and lone surrogates, which UTF-8 cannot encode."""
    return printable(text).encode("utf-8", "backslashreplace").decode()


def embedded(data: Any) -> str:
    """Return data as JSON that is safe inside a `script` element.

    The JSON contains only ASCII characters, without <, > and &, so that no text can end the
    element.
    """
    text = json.dumps(_cleaned(data), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {clean(key): _cleaned(held) for key, held in value.items()}
    return [_cleaned(held) for held in value] if isinstance(value, list) else value


def _document(context: dict[str, Any], data: dict[str, Any], library: str) -> str:
    """Render the template and return the HTML page.

    Everything except the scripts, the embedded data, the style sheet and the
    Content-Security-Policy is HTML-escaped.
    """
    import jinja2
    from markupsafe import Markup

    def finalize(value: Any) -> Any:
        return clean(value) if type(value) is str else value  # `Markup` is unchanged

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined,
                                     finalize=finalize, trim_blocks=True, lstrip_blocks=True)
    script = _script(_own("run_page.js"))
    policy = ("default-src 'none'; script-src " + " ".join(map(_digest, (library, script)))
              + "; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
                "base-uri 'none'; form-action 'none'")
    template = environment.from_string(_own("run_page.html"))
    return template.render(
        **context, policy=Markup(policy), style=Markup(_own("run_page.css")),
        library=Markup(library), script=Markup(script), data=Markup(embedded(data)))


def _own(name: str) -> str:
    """Return the text of one of this package's files."""
    return read_bytes(HERE / name).decode()


def _script(source: str) -> str:
    """Normalize line endings as an HTML parser does, so that browsers compute the same digest.

    Raises:
      UserError: the script contains text that would end or change its `script` element.
    """
    source = source.replace("\r\n", "\n").replace("\r", "\n")
    if "</script" in source.lower() or "<!--" in source:
        raise UserError("the script of plotly cannot be embedded in a page, because it contains "
                        "</script or <!--; install another version of plotly")
    return source


def _digest(source: str) -> str:
    """Return the source expression of a Content-Security-Policy that allows a script."""
    digest = hashlib.sha256(source.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
