"""The command `jaxpersona axis`: extract a model's Assistant Axis into a run folder."""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING, Annotated

import typer

from jaxpersona import interrupt
from jaxpersona.cli import support
from jaxpersona.cli.output import say
from jaxpersona.cli.support import (
    AdapterOption,
    DtypeOption,
    ModelOption,
    check_folder,
    kept_of,
    progress,
)
from jaxpersona.errors import UserError

if TYPE_CHECKING:
    from jaxpersona.data.texts import Question


def axis(
    model: ModelOption = "mini",
    out: Annotated[pathlib.Path, typer.Option(help="The run folder.")] = pathlib.Path("runs/axis"),
    roles: Annotated[str | None, typer.Option(help="A folder of roles, or `data`.")] = None,
    questions: Annotated[str | None, typer.Option(help="A .jsonl file, or `data`.")] = None,
    limit: Annotated[int | None, typer.Option(help="Play at most this many roles.")] = None,
    limit_questions: Annotated[int | None, typer.Option(help="Likewise questions.")] = None,
    judge: Annotated[str | None, typer.Option(help=(
        "Scores the replies: `rules` (mini), `self`, `model:NAME` (another model, by the "
        "probabilities of the digits 0 to 3) or `none`."))] = None,
    samples: int = 1,
    max_new_tokens: int | None = None,
    temperature: float = 0.7,
    top_p: float = 0.9,
    batch_size: int = 32,
    seed: int = 0,
    min_count: Annotated[int, typer.Option(help="Rollouts a role needs for a vector.")] = 10,
    held_out: Annotated[str, typer.Option(help="Roles to leave out of the axis, a,b,…")] = "",
    redo: Annotated[list[str] | None, typer.Option(
        help="Generate this role again, e.g. after its files were damaged; repeatable.")
    ] = None,
    dtype: DtypeOption = None,
    adapter: AdapterOption = None,
    mesh: Annotated[str | None, typer.Option(help="E.g. data=2,model=4 (or fsdp=).")] = None,
    distributed: Annotated[bool, typer.Option("--distributed", help="Join the processes of SLURM, "
                                              "Kubernetes or a TPU pod.")] = False,
    coordinator: Annotated[str | None, typer.Option(help="host:port of process 0 on other "
                                                        "systems.")] = None,
    processes: Annotated[int | None, typer.Option(help="Number of processes.")] = None,
    process: Annotated[int | None, typer.Option(help="Index of this process, from 0.")] = None,
) -> None:
    """Extract a model's Assistant Axis: rollouts, judge, vectors, axis, thresholds, figures."""
    from jaxpersona.data import texts
    from jaxpersona.distributed import processes as joining
    from jaxpersona.engine.prompts import check_settings
    from jaxpersona.engine.sampling import sampling
    from jaxpersona.judges.digits import DigitJudge
    from jaxpersona.judges.judges import Judge, NoJudge, SelfJudge
    from jaxpersona.organism import method
    from jaxpersona.persona.extract import extract_axis
    from jaxpersona.runs.rollouts import Settings

    place = (coordinator, processes, process)
    if distributed or place != (None, None, None):
        joining.start(*place)
    sampling(1, temperature=temperature, top_p=top_p, seed=seed)
    check_settings(min_count=min_count)
    check_folder("--out", out)
    own = model == "mini" and roles is None
    judge = judge or ("rules" if own else "none")
    other = judge.removeprefix("model:") if judge.startswith("model:") else ""
    if (judge not in ("rules", "self", "none") and not other) or (judge == "rules" and not own):
        raise UserError(f"judge is {judge!r}; choose {'rules, self' if own else 'self'}, "
                        "model:NAME or none"
                        + (" (rules judges only mini's own roles)" if judge == "rules" else ""))
    length = max_new_tokens if max_new_tokens is not None else 64 if model == "mini" else 512
    settings = Settings(temperature, top_p, length, samples, batch_size, seed)
    named = [name for name in held_out.split(",") if name]
    asked = _questions(questions, own)
    cast = method.roles() if own else texts.load_roles(
        None if roles in (None, "data") else pathlib.Path(roles), model_name=_short(model))
    if own and not held_out:
        named = method.held_out()
    if limit is not None:
        kept = [role for role in cast if role.name != "default"][: max(limit, 0)]
        cast = [role for role in cast if role.name == "default"] + kept
        if own and not held_out:
            named = [name for name in named if name in {role.name for role in kept}]
    if limit_questions is not None:
        asked = asked[: max(limit_questions, 1)]
    if joining.many() and mesh is None:
        raise UserError("several processes share one mesh; give --mesh over all their "
                        "devices together, such as data=2,model=4")
    loaded = support.open_model(model, dtype, mesh, adapter)
    if judge == "none" and joining.first():
        say("judge: none; every answer counts as fully playing its role", error=True)
    judged: Judge
    if other:
        judged = DigitJudge(support.open_model(other, dtype, mesh))
    elif judge == "self":
        judged = SelfJudge(loaded, batch_size=batch_size)
    else:
        judged = NoJudge() if judge == "none" else method.RuleJudge()
    with interrupt.keeping(lambda: kept_of(out)), progress(log=True) as report:
        found = extract_axis(loaded, cast, asked, out, judge=judged, settings=settings,
                             min_count=min_count, held_out=named, redo=redo or [],
                             report=report)
    if not joining.first():
        return
    middle = loaded.config.n_layers // 2
    support.draw_run(out, found, middle, named)
    print(json.dumps({
        "run": str(out), "model": loaded.name, "roles": len(found.analysis.names),
        "rollouts": found.rollouts, "layers": loaded.config.n_layers, "judge": judge,
        "cos_pc1_axis_middle": round(float(found.analysis.cos_pc1[middle]), 4),
        "axis": str(out / "axis.safetensors"),
    }))


def _questions(source: str | None, own: bool) -> list[Question]:
    from jaxpersona.data import texts
    from jaxpersona.organism import method

    if own and source is None:
        return method.questions(8)
    return texts.load_questions(None if source in (None, "data") else pathlib.Path(source))


def _short(model: str) -> str:
    return model.rstrip("/").split("/")[-1].split(":")[-1]
