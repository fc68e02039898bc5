"""The command `jaxpersona judge RUN`: judge the replies of an existing run."""

from __future__ import annotations

import json
import pathlib
import shlex
from collections import Counter
from typing import Annotated, Any

import typer

from jaxpersona import interrupt
from jaxpersona.brief import named
from jaxpersona.cli import support
from jaxpersona.cli.groups import grouped
from jaxpersona.cli.judges import (
    JUDGES,
    JudgeOptions,
    check_cache,
    choose,
    closed,
    of_model,
    opened,
    rubric_of,
)
from jaxpersona.cli.output import say
from jaxpersona.cli.support import DtypeOption, kept_of, progress
from jaxpersona.errors import UserError


@grouped
def run(
    folder: Annotated[pathlib.Path, typer.Argument(metavar="RUN", help="A run folder.")],
    judge: Annotated[str | None, typer.Option(show_default="required", help=JUDGES)] = None,
    judging: JudgeOptions = JudgeOptions(),
    roles: Annotated[str | None, typer.Option(
        show_default="the built-in ones for mini, otherwise `data`", help=(
            "The folder of roles that the run used, or `data` for the roles of the package."))
    ] = None,
    model: Annotated[str | None, typer.Option(
        show_default="the name in the run's files",
        help="The model of the run; the judge `self` loads it."),
    ] = None,
    batch_size: Annotated[int, typer.Option(
        help="Number of replies that the judge `self` scores in one batch.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
    dtype: DtypeOption = None,
) -> None:
    """Judge the replies of a run; existing verdicts, including those of other judges, are kept."""
    from jaxpersona.data import texts
    from jaxpersona.organism import method
    from jaxpersona.persona.rejudge import judge_run
    from jaxpersona.runs.run import Run

    if judge is None:
        raise UserError("--judge is missing; give a judge, such as --judge http:MODEL")
    manifest = Run.read(folder).manifest
    name = str(model or manifest.get("last", {}).get("model", ""))
    own = name == "mini" and roles is None
    choice = choose(judge, judging, own=own)
    cast = method.roles() if own else texts.load_roles(
        None if roles in (None, "data") else pathlib.Path(roles))
    bare = [role.name for role in cast if role.name in manifest["roles"] and not role.eval_prompt
            and role.name != texts.DEFAULT]
    if choice.reads_eval_prompt and bare:
        raise UserError(f"the judge needs an eval_prompt, missing for {named(bare, 'role')}; add "
                        "one to each, or give one rubric for all roles with --judge-rubric")
    chosen: Any = None
    with progress(log=True, note=lambda: getattr(chosen, "note", str)()) as report:
        chosen = opened(choice, folder)
        check_cache(chosen)
        if chosen is None and choice.kind == "self":
            from jaxpersona.judges.judges import SelfJudge

            loaded = support.open_model(name, dtype)
            if loaded.fingerprint != manifest["model"]["fingerprint"]:
                raise UserError(f"the judge 'self' loads {name}, which is not the model of "
                                f"{folder}; with --model, give the model that generated the "
                                "replies, or use the judge 'model:NAME'")
            chosen = SelfJudge(loaded, batch_size=batch_size, rubric=rubric_of(choice))
        if chosen is None:
            other = support.open_model(choice.argument, dtype)
            chosen = of_model(choice, lambda: other, lambda: other)
        with interrupt.keeping(lambda: kept_of(folder)), closed(chosen):
            counts, cost = judge_run(folder, cast, chosen, report=report)
    total: Counter[str] = Counter()
    for by_score in counts.values():
        total.update(by_score)
    if as_json:
        print(json.dumps({"run": str(folder), "judge": chosen.name, "scores": dict(total),
                          "roles": counts, "cost": cost}))
        return
    kinds = {"None": "undecided", "failed": "without a verdict"}
    shown = ", ".join(f"{n:,} {kinds.get(score, f'with score {score}')}"
                      for score, n in total.items() if n)
    say(f"judge {chosen.name}: {shown}", *([f"cost: ${cost:,.4f}"] if cost else []),
        "to compute the axis from these verdicts, run jaxpersona axis with the options of the run, "
        f"--judge {shlex.quote(judge)} and --out {shlex.quote(str(folder))}")
