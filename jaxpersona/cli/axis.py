"""The command `jaxpersona axis`: extract a model's Assistant Axis into a run folder."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxpersona import interrupt
from jaxpersona.cli import support
from jaxpersona.cli.groups import grouped
from jaxpersona.cli.judges import (
    JUDGES,
    AfterOption,
    JudgeOptions,
    check_cache,
    choose,
    closed,
    of_model,
    opened,
    rubric_of,
)
from jaxpersona.cli.output import say
from jaxpersona.cli.quota import QuotaOptions, of_paper
from jaxpersona.cli.support import (
    AdapterOption,
    DtypeOption,
    MinCountOption,
    ModelOption,
    SeedOption,
    TemperatureOption,
    TopPOption,
    check_folder,
    kept_of,
    progress,
)
from jaxpersona.errors import UserError

if TYPE_CHECKING:
    from jaxpersona.data.texts import Question, Role
    from jaxpersona.persona.extraction import Extraction
    from jaxpersona.persona.forecast import Forecast

_OWN = "the built-in ones for mini, otherwise `data`"
_OWN_QUESTIONS = "the built-in ones for mini without --roles, otherwise `data`"


@grouped
def axis(
    context: typer.Context,
    model: ModelOption = "mini",
    out: Annotated[pathlib.Path, typer.Option(help="The run folder.")] = pathlib.Path("runs/axis"),
    roles: Annotated[str | None, typer.Option(show_default=_OWN, help=(
        "A folder of roles (format: `jaxpersona data format`), or `data` for the 275 roles of the "
        "package."))] = None,
    questions: Annotated[str | None, typer.Option(show_default=_OWN_QUESTIONS, help=(
        "A .jsonl file of questions (format: `jaxpersona data format`), or `data` for the 240 "
        "questions of the package."))] = None,
    roles_named: Annotated[str | None, typer.Option(show_default="all", help=(
        "Comma-separated names of the roles to use, besides the default persona."))] = None,
    limit_roles: Annotated[int | None, typer.Option(
        "--limit-roles", "--limit", show_default="all", help=(
            "Maximum number of roles besides the default persona. The roles are a "
            "pseudorandom sample, and a larger number adds roles to the same run."))] = None,
    model_name: Annotated[str | None, typer.Option(
        show_default="the last part of --model", help=(
            "The model's name in prompts such as \"You are Llama.\""))] = None,
    limit_questions: Annotated[int | None, typer.Option(
        show_default="all", help="Maximum number of questions.")] = None,
    samples: Annotated[int, typer.Option(
        help="Number of replies to each question under each system prompt.")] = 1,
    max_new_tokens: Annotated[int | None, typer.Option(
        show_default="64 for mini, otherwise 512",
        help="Maximum length of a reply in tokens.")] = None,
    temperature: TemperatureOption = 0.7,
    top_p: TopPOption = 0.9,
    batch_size: Annotated[int, typer.Option(
        help="Batch size: the number of replies that are generated in parallel.")] = 32,
    seed: SeedOption = 0,
    min_count: MinCountOption = 10,
    quota: QuotaOptions = QuotaOptions(),
    held_out: Annotated[str, typer.Option(
        show_default="nine for the built-in roles of mini, otherwise none",
        help="Comma-separated names of roles to exclude from the axis.")] = "",
    keep_means: Annotated[str, typer.Option(help=(
        "Number of replies per role whose mean activations are stored to compute thresholds, or "
        "`all`. The means of all replies of the default persona are always stored."))] = "16",
    share_prefix: Annotated[bool, typer.Option("--share-prefix", help=(
        "Compute the KV cache of each system prompt once for all questions."))] = False,
    redo: Annotated[list[str] | None, typer.Option(
        show_default="none",
        help="Generate the replies of this role again, e.g. if its files are damaged. The option "
             "may be repeated.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=(
        "Delete the run in the folder of --out, but no other files, and start a new run."))
    ] = False,
    take_from: Annotated[pathlib.Path | None, typer.Option(show_default="none", help=(
        "A run folder that an older version of jaxpersona wrote with the same model, settings and "
        "device. Its replies are copied into the new run instead of being generated again."
    ))] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=(
        "Check all inputs, time a sample of the generation and print the estimated cost, without "
        "writing any file."))
    ] = False,
    sample_seconds: Annotated[float, typer.Option(
        help="Duration in seconds of the generation that --dry-run times; 0 skips it.")] = 30.0,
    judge_cost: Annotated[float | None, typer.Option(
        show_default="not printed",
        help="Cost in USD of judging one reply, for --dry-run.")] = None,
    judge: Annotated[str | None, typer.Option(
        show_default="rules for the built-in roles of mini, otherwise none", help=JUDGES)] = None,
    judging: JudgeOptions = JudgeOptions(),
    judge_after: AfterOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of a "
                                                         "summary.")] = False,
    dtype: DtypeOption = None,
    adapter: AdapterOption = None,
    mesh: Annotated[str | None, typer.Option(
        show_default="one device",
        help="The device mesh, e.g. data=2,model=4 or fsdp=8.")] = None,
    distributed: Annotated[bool, typer.Option("--distributed", help=(
        "Initialize jax.distributed with the settings that JAX detects on SLURM, Open MPI, "
        "Kubernetes or a TPU pod."))
    ] = False,
    coordinator: Annotated[str | None, typer.Option(
        show_default="none",
        help="Address host:port of process 0, if JAX cannot detect the processes; requires "
             "--processes and --process.")
    ] = None,
    processes: Annotated[int | None, typer.Option(
        show_default="one", help="Number of processes.")] = None,
    process: Annotated[int | None, typer.Option(
        show_default="0", help="Zero-based index of this process.")] = None,
) -> None:
    """Extract a model's Assistant Axis: generate and judge rollouts, and compute the axis.

    The run folder contains the rollouts, verdicts, axis and figures. If the command is interrupted,
    the same command resumes the run.
    """
    from jaxpersona.distributed import processes as joining
    from jaxpersona.engine.prompts import check_settings
    from jaxpersona.engine.sampling import sampling
    from jaxpersona.judges.judges import SelfJudge
    from jaxpersona.persona import forecast, prepare, summary
    from jaxpersona.persona.extract import extract_axis
    from jaxpersona.persona.rounds import rounds_and_quota
    from jaxpersona.runs.rollouts import Settings

    place = (coordinator, processes, process)
    if distributed or place != (None, None, None):
        joining.start(*place)
    sampling(1, temperature=temperature, top_p=top_p, seed=seed)
    check_settings(min_count=min_count)
    check_folder("--out", out)
    if judge_cost is not None and not (dry_run and 0 <= judge_cost < math.inf):
        raise UserError(f"--judge-cost is {judge_cost}; give the cost in USD of judging one reply "
                        "(finite and at least 0), together with --dry-run")
    if quota.paper:
        given = {"roles": roles, "questions": questions, "roles_named": roles_named,
                 "limit_roles": limit_roles, "limit_questions": limit_questions, "samples": samples,
                 "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p,
                 "min_count": min_count, "precision": quota.precision}
        fixed = of_paper(given, support.typed(context))
        roles, questions, max_new_tokens, min_count = (
            fixed[name] for name in ("roles", "questions", "max_new_tokens", "min_count"))
    own = model == "mini" and roles is None
    choice = choose(judge or ("rules" if own else "none"), judging, own=own, after=judge_after)
    length = max_new_tokens if max_new_tokens is not None else 64 if model == "mini" else 512
    settings = Settings(temperature, top_p, length, samples, batch_size, seed, share_prefix)
    kept = support.kept_means(keep_means)
    cast, asked, named = _texts(model, roles, questions, limit_roles, limit_questions, held_out,
                                own, roles_named, model_name)
    sizes = quota.sizes()
    rounds_and_quota(quota.precision, sizes, asked, choice.after)
    prepare.check_texts(cast, asked, settings, min_count=min_count, held_out=named, judge=choice)
    if joining.many() and mesh is None:
        raise UserError("several processes need one mesh; give --mesh for the devices of all "
                        "processes, such as data=2,model=4")
    if choice.kind == "none" and joining.first():
        say(f"warning: {summary.UNREAD}", error=True)
    judged: Any = None
    cost: Forecast | None = None
    found: Extraction | None = None
    with progress(log=True, note=lambda: getattr(judged, "note", str)()) as report:
        judged = opened(choice, out)
        if not dry_run:
            check_cache(judged)
        if choice.kind == "model" and choice.after:
            judged = of_model(choice, lambda: support.open_model(choice.argument, dtype, mesh),
                              lambda: loaded)
        loaded = support.open_model(model, dtype, mesh, adapter)
        base = prepare.base_notice(loaded)
        if base and joining.first():
            say(f"warning: {base}", error=True)
        if judged is None and choice.kind == "self":
            judged = SelfJudge(loaded, batch_size=batch_size, rubric=rubric_of(choice))
        if judged is None:
            judged = of_model(choice, lambda: support.open_model(choice.argument, dtype, mesh),
                              lambda: loaded)
        common: dict[str, Any] = {
            "judge": judged, "settings": settings, "min_count": min_count, "held_out": named,
            "keep_means": kept, "redo": redo or [], "overwrite": overwrite,
            "precision": quota.precision, "rounds": sizes}
        if dry_run:
            if sample_seconds and not as_json:
                say(f"timing a sample of the generation for about {sample_seconds:g} s", error=True)
            cost = forecast.forecast(loaded, cast, asked, out, sample_seconds=sample_seconds,
                                     **common)
        else:
            with interrupt.keeping(lambda: kept_of(out)), closed(judged):
                found = extract_axis(loaded, cast, asked, out, take_from=take_from, report=report,
                                     notice=lambda line: say(line, error=True), **common)
                if joining.first():
                    support.draw_run(out, found, loaded.config.n_layers // 2, named)
    if cost is not None:
        _show_forecast(cost, choice.judge, judge_cost, out, as_json)
        return
    if found is None or not joining.first():
        return
    middle = loaded.config.n_layers // 2
    if as_json:
        print(json.dumps({
            "run": str(out), "model": loaded.name, "roles": len(found.analysis.names),
            "rollouts": found.rollouts, "layers": loaded.config.n_layers, "judge": choice.judge,
            "cos_pc1_axis_middle": round(float(found.analysis.cos_pc1[middle]), 4),
            "distances": {k: round(v, 4) for k, v in summary.distances(found, middle).items()},
            "axis": str(out / "axis.safetensors"),
            **({} if found.rounds is None else {"precision": found.rounds.brief_value()}),
        }))
        return
    shown = {"--model": None if model == "mini" else model, "--adapter": adapter, "--dtype": dtype}
    options = [str(part) for pair in shown.items() if pair[1] is not None for part in pair]
    say(*summary.summary(found, out, middle, held_out=named, options=options))


def _texts(model: str, roles: str | None, questions: str | None, limit_roles: int | None,
           limit_questions: int | None, held_out: str, own: bool, roles_named: str | None = None,
           model_name: str | None = None) -> tuple[list[Role], list[Question], list[str]]:
    """Load the roles and questions that the options select.

    Args:
      model: the value of `--model`.
      roles, questions: the values of `--roles` and `--questions`.
      limit_roles, limit_questions: the maximum numbers of roles (besides the default persona) and
        of questions, or None for all.
      held_out: the value of `--held-out`; if it is empty and `own` is True, the standard held-out
        roles of `mini` are used.
      own: whether the roles are the built-in roles of `mini`.
      roles_named, model_name: the values of `--roles-named` and `--model-name`.

    Returns:
      (roles, questions, names of the held-out roles).

    Raises:
      UserError: `roles_named` contains an unknown name, or a file cannot be read or contains an
        invalid text.
    """
    from jaxpersona.data import choosing, texts
    from jaxpersona.organism import method

    if own and questions is None:
        asked = method.questions(8)
    else:
        asked = texts.load_questions(None if questions in (None, "data")
                                     else pathlib.Path(questions))
    cast = method.roles() if own else texts.load_roles(
        None if roles in (None, "data") else pathlib.Path(roles),
        model_name=model_name or model.rstrip("/").split("/")[-1].split(":")[-1])
    named = [name for name in held_out.split(",") if name]
    if own and not held_out:
        named = method.held_out()
    if roles_named is not None:
        cast = choosing.roles_named(cast, [name.strip() for name in roles_named.split(",")])
    for option, limit, least in (("roles", limit_roles, 0), ("questions", limit_questions, 1)):
        if limit is not None and limit < least:
            raise UserError(f"--limit-{option} is {limit}; give an integer, at least {least}")
    if limit_roles is not None:
        choose_some = choosing.first_roles if own else choosing.some_roles
        cast = choose_some(cast, limit_roles)
    if own and not held_out:
        named = [name for name in named if name in {role.name for role in cast}]
    return cast, asked if limit_questions is None else asked[:limit_questions], named


def _show_forecast(cost: Forecast, judge: str, judge_cost: float | None, out: pathlib.Path,
                   as_json: bool) -> None:
    """Print the estimated cost of a run.

    Raises:
      UserError: the run does not fit on its disk.
    """
    from jaxpersona.persona import forecast

    if as_json:
        print(json.dumps(_of_forecast(cost, judge_cost)))
    else:
        say(*forecast.describe(cost, judge=judge, cost=judge_cost))
    if cost.disk_bytes + cost.live_bytes > cost.free_bytes:
        raise UserError(f"--out is {out}; its disk has too little free space for the run, so "
                        "free some space or choose another folder")


def _of_forecast(found: Forecast, judge_cost: float | None) -> dict[str, Any]:
    """Return a forecast as a JSON object, with the cost of judging if `judge_cost` is given."""
    value = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    pace = value.pop("pace")
    if value["seconds"] is not None and not math.isfinite(value["seconds"]):
        value["seconds"] = None  # JSON has no infinity
    if pace is not None:
        value["sample"] = {"finished": int(pace.finished.size), "tokens": pace.tokens,
                           "unfinished": int(pace.unfinished.size),
                           "seconds": pace.seconds, "compile_seconds": pace.compile_seconds}
    if judge_cost is not None:
        value["judge_cost"] = found.to_pay * judge_cost
    return value
