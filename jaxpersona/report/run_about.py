"""The texts of the page of a run (`run_page`): its state, facts, gaps, dialogues and provenance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from jaxpersona.brief import count
from jaxpersona.data.texts import DEFAULT
from jaxpersona.judges.protocol import Item
from jaxpersona.persona.bootstrap import PcaIntervals
from jaxpersona.persona.summary import UNREAD
from jaxpersona.report.run_halves import SPLITS
from jaxpersona.report.run_read import Contents
from jaxpersona.report.run_values import unplaced
from jaxpersona.runs.rollouts import place_of_key
from jaxpersona.runs.seal import digest
from jaxpersona.runs.status import describe

_ENDS = 5  # number of roles that the summary names at each end of the ranking
_NAMED = {"None": "undecided", "failed": "without a verdict"}
Rows = list[tuple[str, str]]


def context(found: Contents, data: dict[str, Any], notes: Sequence[str], version: str,
            bars: PcaIntervals | None = None) -> dict[str, Any]:
    """Return the variables for the HTML template of the page.

    Args:
      found: the content of the run folder.
      data: the numbers of the page (`run_values.values`).
      notes: lines that list values that are not finite.
      version: the version of plotly.js.
      bars: the bootstrap intervals of |cos(PC1, axis)| and the explained variance, or None.
    """
    last = found.manifest.get("last", {})
    curve = None if found.analysis is None else found.analysis.rounds
    return {
        "title": f"Assistant Axis of {last.get('model') or 'a model'}",
        "state": state(found), "facts": facts(found, data), "gaps": gaps(found, data, bars),
        "bars": "" if bars is None else (" Band: 95 % bootstrap interval over the replies. It "
                                         "corrects for noise, so it may not contain the curve."),
        "notes": list(notes), "layers": data["layers"], "middle": data["middle"],
        "shown": {key: data[key] is not None for key in (
            "pca", "order", "byLayer", "thresholds", "reliability", "rounds", "drift")},
        "scored": bool(found.counts) and found.judge != "none",
        "rounds": "" if curve is None else curve.caption(),
        "halves": halves(found), "drift": data["drift"], "intervals": _intervals(data),
        "dialogues": dialogues(found), "provenance": provenance(found, version),
        "many": len(data["roles"]) > 40,
    }


def state(found: Contents) -> dict[str, Any]:
    """Return a dict with "complete" (a bool), the "name" of the state, and "lines" of text."""
    total = len(found.roles) + 1
    closed = (f"{len(found.closed):,} of {total:,} roles (including the default persona) are "
              "complete")
    if found.status is None:
        lines = [f"The folder has no status.json, so the state of the run is unknown; {closed}."]
        return {"complete": False, "name": "unknown", "lines": lines}
    name = found.status["state"]
    lines = describe(found.status)[:-1]  # omit the last line, which names the machine
    complete = name == "complete" and len(found.closed) == total and found.axis is not None
    if not complete:
        lines.insert(0, {
            "running": "This run is in progress: the page shows what the folder contained when the "
                       "page was written.",
            "stopped": "This run was stopped before its end; the same `jaxpersona axis` command "
                       "resumes it.",
            "complete": "The last call of this run ended, but the folder does not contain all "
                        "results; the end of this page lists the missing parts.",
        }.get(name, f"The state of this run is {name!r:.40}."))
        lines.append(f"On this page: {closed}.")
        if found.axis is not None:
            lines.append("The axis, ranking and thresholds are those of the last completed call.")
    return {"complete": complete, "name": name, "lines": lines}


def facts(found: Contents, data: dict[str, Any]) -> Rows:
    """Return the main results as (name, value) pairs."""
    rows: Rows = []
    if found.analysis is not None:
        used = sum(role.in_axis for role in found.analysis.roles.values())
        held = sum(role.held_out for role in found.analysis.roles.values())
        rows.append(("roles in the axis", f"{used:,} of {len(found.analysis.roles) - 1:,}"
                     + (f"; {held:,} held out" if held else "")))
    rollouts = sum(found.rollouts.values()) or (found.status or {}).get("rollouts", 0)
    rows += [("rollouts", f"{rollouts:,}"), ("judge", found.judge or "unknown")]
    if found.analysis is not None and found.analysis.rounds is not None:
        rows += found.analysis.rounds.facts()
    middle = data["middle"]
    if data["byLayer"] is not None:
        one, bars = data["byLayer"], data["byLayer"]["bars"]
        rows += [(f"|cos(PC1, axis)| at layer {middle}", _number(one["cos"][middle]) + (
                     "" if bars is None else _ends(bars["cos"], middle, _number))),
                 (f"variance of PC1 at layer {middle}", _share(one["variance"]["1"][middle]) + (
                     "" if bars is None else _ends(bars["variance"]["1"], middle, _share)))]
    if data["reliability"] is not None:
        rows.append((f"split-half agreement at layer {middle}",
                     _number(data["reliability"]["mean"][middle])))
    if data["order"] is not None:
        ranked = [data["roles"][i]["name"].replace("_", " ") for i in data["order"][middle]]
        near, far = ranked[:_ENDS], ranked[:-_ENDS - 1:-1]
        rows += [(f"most like the Assistant at layer {middle}", _names(near)),
                 (f"least like the Assistant at layer {middle}", _names(far))]
    return rows


def gaps(found: Contents, data: dict[str, Any], bars: PcaIntervals | None = None) -> Rows:
    """Return the parts that are missing from the page, as (part, reason) pairs."""
    rows: Rows = []
    if found.analysis is None:
        done = found.status is not None and found.status["state"] == "complete"
        rows.append(("Components, ranking, values by layer and thresholds", (
            "the folder has no axis: the last call ended without one, for example because fewer "
            "than two roles have enough replies with score 3" if done
            else "the run has not computed its axis yet")))
    elif data["pca"] is None:
        rows.append(("Role vectors on two components",
                     f"vectors are missing or not finite: {_names(unplaced(found))}"))
    if found.analysis is not None and data["reliability"] is None:
        rows.append(("Split-half agreement of the axis", (
            "the run stores the response means of too few replies: at least two roles need two "
            "replies each with score 3, and the default persona needs two replies")))
    if bars is not None and bars.fixed:
        rows.append(("Roles with the same vector in all bootstrap samples, so that the "
                     "intervals of the values by layer are too narrow",
                     f"fewer than two stored replies with score 3: {_names(bars.fixed)}"))
    elif found.analysis is not None and bars is None and data["pca"] is not None:
        rows.append(("Intervals of the values by layer", "the run stores the response means of "
                     "fewer than two replies with score 3 for every role"))
    if found.judge == "none":
        rows.append(("Scores by role", UNREAD))
    elif not found.counts:
        rows.append(("Scores by role", "no role has all its verdicts yet"))
    waiting = [name for name in [DEFAULT, *found.roles] if name not in found.closed]
    if waiting:
        rows.append(("Roles that are not complete yet", _names(waiting)))
    if found.analysis is not None and (curve := found.analysis.rounds) is not None and curve.open:
        rows.append((f"Roles that are not settled at the precision {curve.target:g}",
                     f"all questions were asked: {_names(curve.open)}"))
    if found.analysis is not None:
        known = found.analysis.roles
        few = [name for name in found.roles if name in known and not known[name].in_axis
               and not known[name].held_out]
        if few:
            least = "" if found.axis is None else found.axis.notes.get("min_count", "")
            rows.append((f"Roles with fewer than {least} fully played replies, "
                         "which the axis leaves out", _names(few)))
        if found.halves is not None and found.halves.left_out and data["reliability"] is not None:
            rows.append(("Roles that are not used for the split-half agreement",
                         f"fewer than two stored replies with score 3: "
                         f"{_names(found.halves.left_out)}"))
    return rows


def halves(found: Contents) -> str:
    """Describe the replies used for the split-half agreement; return "" without an agreement."""
    agreement = None if found.halves is None else found.halves.agreement()
    if agreement is None:
        return ""
    low, high = agreement.replies
    replies = f"{low}" if low == high else f"{low} to {high}"
    return (f"Computed from the stored response means: for each of {agreement.roles:,} roles, "
            f"{replies} replies with score 3, and for the default persona, "
            f"{agreement.default:,} replies. These are split into two random halves, {SPLITS} "
            "times. The axis of the run uses all replies, so the agreement of two complete runs is "
            "expected to be higher.")


def dialogues(found: Contents) -> list[dict[str, Any]]:
    """Return the sample replies in groups, each with a title and a list of items."""
    groups: dict[str, list[dict[str, str]]] = {}
    for item, score in found.samples:
        title = ("Replies of roles, without a score" if found.judge == "none" else
                 "Undecided" if score is None else f"Score {score}")
        groups.setdefault(title, []).append(_dialogue(item))
    if found.plain:
        groups["Default persona (not judged)"] = [_dialogue(item) for item in found.plain]
    return [{"title": title, "items": items} for title, items in groups.items()]


def _dialogue(item: Item) -> dict[str, str]:
    question, prompt, sample = place_of_key(item.key)
    place = f"prompt {prompt}, question {question}" + (f", sample {sample}" if sample else "")
    return {"role": item.role.name, "place": place, "system": item.system_prompt,
            "question": item.question, "answer": item.answer}


def provenance(found: Contents, version: str) -> list[dict[str, Any]]:
    """Return the settings, software and device of the run, as groups with a title and rows."""
    manifest = found.manifest
    model, last, numerics = (manifest.get(key, {}) for key in ("model", "last", "numerics"))
    status = found.status or {}
    arguments = {name: value for name, value in manifest.get("arguments", {}).items()}
    of_axis = {name: last[name] for name in (
        "min_count", "held_out", "keep_means", "precision", "rounds") if name in last}
    # the last call may have other values, if it stopped before it computed an axis
    if found.axis is not None and found.analysis is not None:
        of_axis |= {k: v for k, v in found.axis.notes.items() if k == "min_count"}
        of_axis["held_out"] = sorted(n for n, role in found.analysis.roles.items() if role.held_out)
    texts = digest([manifest.get("roles"), manifest.get("questions")])
    flags = {name: value for name, value in numerics.get("jax", {}).items()
             if value not in (None, False)}
    environment = {name: value for name, value in numerics.get("environment", {}).items() if value}
    judges = ", ".join(sorted(manifest.get("judges", {}))) or "none yet"
    totals: Counter[str] = Counter()
    for counts in found.counts.values():
        totals.update(counts)
    groups: list[tuple[str, Rows]] = [
        ("Model", [("name", str(last.get("model", "unknown"))),
                   *[(name.replace("_", " "), _text(value)) for name, value in model.items()]]),
        ("Prompts", [
            ("roles", f"{len(found.roles):,} and the default persona"),
            ("questions", f"{len(manifest.get('questions', {})):,}"),
            ("digest of prompts, questions and their tokens", texts),
            ("chat template", "not stored; the digest above covers the tokens that it produced")]),
        ("Sampling", [(name.replace("_", " "), _text(value)) for name, value in arguments.items()]),
        ("Judge", [("judge of this page", found.judge or "unknown"), ("judges of the run", judges),
                   *([] if found.judge == "none" else [
                       (f"replies with score {score}" if score.isdigit() else
                        f"replies {_NAMED.get(score, score)}", f"{number:,}")
                       for score, number in sorted(totals.items())]),
                   ("cost of the last call's verdicts", f"${status['cost']:,.4f}"
                    if "cost" in status else "unknown")]),
        ("Axis", [(name.replace("_", " "), _text(value)) for name, value in of_axis.items()]),
        ("Device", [(name, _text(numerics.get(name))) for name in (
            "platform", "device", "devices", "mesh", "processes", "prng") if name in numerics]
         + [("JAX settings", _text(flags or "default")),
            ("environment", _text(environment or "nothing that changes results"))]),
        ("Versions", [*((name, _text(value)) for name, value in last.get("versions", {}).items()),
                      ("plotly.js (this page)", version)]),
        ("Time", [("last call started", _text(status.get("started", "unknown"))),
                  ("last written", _text(status.get("updated", "unknown"))),
                  ("wall time of the last call", f"{status['seconds']:,.1f} s"
                   if "seconds" in status else "unknown"),
                  ("tokens that the last call generated", f"{status['tokens']:,}"
                   if "tokens" in status else "unknown")]),
    ]
    return [{"title": title, "rows": rows} for title, rows in groups if rows]


def _intervals(data: dict[str, Any]) -> bool:
    return any("low" in value for table in (data["thresholds"] or {}).values()
               for value in table.values())


def _text(value: Any) -> str:
    """Return a JSON value as text."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(held)}" for name, held in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return "none" if value is None else str(value)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "not finite" if value is None else f"{100 * value:.0f} %"


def _ends(values: dict[str, Any], layer: int, text: Callable[[float | None], str]) -> str:
    """Return the ends of an interval at a layer as text."""
    return f" (95 % interval {text(values['low'][layer])} to {text(values['high'][layer])})"


def _names(names: Sequence[str]) -> str:
    """Join up to twelve names, and state the number of the others."""
    shown = [name if len(name) <= 60 else name[:59] + "…" for name in names[:12]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {count(more, 'more role')}" if more else "")
