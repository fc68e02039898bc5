"""What the sub-commands do: read arguments, call the library, show what came of it."""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxpersona import interrupt
from jaxpersona.cli_output import cell, console, heading, say


def open_model(source: str, dtype: str | None, mesh: str | None = None) -> Any:
    """Load a model with a progress bar in bytes."""
    from jaxpersona import sharding
    from jaxpersona.load import load

    spread = None if mesh is None else sharding.make_mesh(
        **sharding.parse_mesh(mesh))  # pyright: ignore[reportArgumentType]
    with progress() as report:
        return load(source, dtype=dtype, mesh=spread,
                    progress=lambda done, total: report("load", done, total, 0))


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int, int], None]]:
    """Show steps with their rate and time left; gives report(step, done, total, tokens)."""
    from jaxpersona import processes

    if not processes.first():  # one of several speaks for all
        yield lambda step, done, total, tokens: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(),
                   TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TimeRemainingColumn(),
                   console=console(error=True), transient=not console(error=True).is_terminal)
    tasks: dict[str, Any] = {}
    begun: dict[str, float] = {}
    with bar:
        def report(step: str, done: int, total: int, tokens: int) -> None:
            if step not in tasks:
                tasks[step] = bar.add_task(step, total=total, rate="")
                begun[step] = time.perf_counter()
            spent = max(time.perf_counter() - begun[step], 1e-9)
            rate = f"{tokens / spent:,.0f} tok/s" if tokens else ""
            if step == "load":
                rate = f"{done / spent / 1e9:.2f} GB/s"
            bar.update(tasks[step], completed=done, total=total, rate=rate)

        yield report


def extract(*, model: str, out: pathlib.Path, roles: str | None, questions: str | None,
            limit: int | None, limit_questions: int | None, judge: str | None, samples: int,
            max_new_tokens: int | None, temperature: float, top_p: float, batch_size: int,
            seed: int, min_count: int, held_out: str, redo: list[str], dtype: str | None,
            mesh: str | None,
            join: tuple[str | None, int | None, int | None] | None) -> None:
    """Run `jaxpersona axis`."""
    from jaxpersona import processes
    from jaxpersona.organism import method
    from jaxpersona.persona import texts
    from jaxpersona.persona.extract import extract_axis
    from jaxpersona.persona.judges import NoJudge, SelfJudge
    from jaxpersona.persona.rollouts import Settings
    from jaxpersona.sampling import sampling

    if join is not None:
        processes.start(*join)
    sampling(1, temperature=temperature, top_p=top_p, seed=seed)
    own = model == "mini" and roles is None
    judge = judge or ("rules" if own else "none")
    if judge not in ("rules", "self", "none") or (judge == "rules" and not own):
        raise ValueError(f"judge is {judge!r}; choose self or none"
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
    if processes.many() and mesh is None:
        raise ValueError("several processes share one mesh; say which with --mesh, as "
                         "data=2,model=4 of all their devices together")
    loaded = open_model(model, dtype, mesh)
    if judge == "none" and processes.first():
        say("judge: none; every answer is taken for one that fully plays its role", error=True)
    chosen = {"none": NoJudge, "rules": method.RuleJudge}.get(judge)
    judged = chosen() if chosen else SelfJudge(loaded, batch_size=batch_size)
    with interrupt.keeping(lambda: kept_of(out)), progress() as report:
        found = extract_axis(loaded, cast, asked, out, judge=judged, settings=settings,
                             min_count=min_count, held_out=named, redo=redo,
                             report=report)
    if not processes.first():
        return
    middle = loaded.config.n_layers // 2
    draw_run(out, found, middle, named)
    print(json.dumps({
        "run": str(out), "model": loaded.name, "roles": len(found.analysis.names),
        "rollouts": found.rollouts, "layers": loaded.config.n_layers, "judge": judge,
        "cos_pc1_axis_middle": round(float(found.analysis.cos_pc1[middle]), 4),
        "axis": str(out / "axis.safetensors"),
    }))


def _questions(source: str | None, own: bool) -> list[Any]:
    from jaxpersona.organism import method
    from jaxpersona.persona import texts

    if own and source is None:
        return method.questions(8)
    return texts.load_questions(None if source in (None, "data") else pathlib.Path(source))


def _short(model: str) -> str:
    return model.rstrip("/").split("/")[-1].split(":")[-1]


def kept_of(folder: pathlib.Path) -> str:
    """Say what a run folder holds, for whoever stopped the run."""
    if not (folder / "run.json").exists():
        return "nothing was written"
    steps = {"rollouts": "*.jsonl", "scores": "*.json", "vectors": "*.safetensors"}
    counts = {step: len([p for p in (folder / step).glob(form) if p.name[0] != "."])
              for step, form in steps.items()}
    held = ", ".join(f"{step} of {n} roles" for step, n in counts.items() if n)
    axis = " and the axis" if (folder / "axis.safetensors").exists() else ""
    return f"{folder} keeps {held or 'its settings'}{axis}; the same command goes on from here"


def draw_run(folder: pathlib.Path, found: Any, middle: int, held_out: Any) -> None:
    """Draw the figures of an extraction into its folder."""
    from jaxpersona.report import figures

    figures.roles_on_axis(folder / "roles.png", found.projections, middle, held_out)
    figures.components(folder / "pca.png", found.analysis, middle)
    figures.variance(folder / "variance.png", found.analysis, middle)


def reply(prompts: list[str], *, model: str, system: str | None, cap_file: pathlib.Path | None,
          cap_layers: str | None, percentile: str | None, of: str | None, experiment: str | None,
          check: bool, steer_file: pathlib.Path | None, steer_layers: str | None, scale: float,
          spec_file: pathlib.Path | None, compare: bool, dtype: str | None,
          **settings: Any) -> None:
    """Run `jaxpersona generate`."""
    from rich.table import Table

    from jaxpersona import cli_caps as caps
    from jaxpersona.ckpts.vectors import load_vector
    from jaxpersona.generate import generate
    from jaxpersona.interventions import chain, resolve_layers, steer
    from jaxpersona.sampling import sampling
    from jaxpersona.vectors import fitted

    sampling(1, temperature=settings["temperature"], top_p=settings["top_p"],
             seed=settings["seed"])
    given = {"--cap-layers": cap_layers, "--percentile": percentile, "--of": of,
             "--experiment": experiment}
    idle = [name for name, value in given.items() if value is not None]
    if (idle and cap_file is None) or (steer_layers and steer_file is None):
        raise ValueError(f"{', '.join(idle) or '--cap-layers'} needs --cap, and --steer-layers "
                         "needs --steer")
    held = caps.open_caps(cap_file, given) if cap_file else None
    vector = load_vector(steer_file) if steer_file else None
    spec = read_spec(spec_file) if spec_file else None
    if compare and held is None and vector is None and spec is None:
        raise ValueError("--compare needs something to compare: give --cap, --steer or --spec")
    loaded = open_model(model, dtype)
    total = loaded.config.n_layers
    if vector is not None:
        vector = fitted(vector, loaded.config, loaded.name, loaded.fingerprint)
    at = total // 2 if steer_layers is None else resolve_layers(steer_layers, total)
    edits = chain(
        None if vector is None else steer(vector, layers=at, scale=scale),
        None if held is None else caps.cap_edits(loaded, held, cap_layers, percentile, of, check),
        None if spec is None or spec_file is None else caps.spec_edits(
            loaded, spec, spec_file, check),
    )
    head = [] if system is None else [{"role": "system", "content": system}]
    talks = [[*head, {"role": "user", "content": prompt}] for prompt in prompts]
    with progress() as report:
        def tell(done: int, count: int, tokens: int) -> None:
            report("generate", done, count, tokens)

        size = min(32, len(talks))
        settings = {**settings, "batch_size": size, "on_nonfinite": "raise"}
        out = generate(loaded, talks, interventions=edits, progress=tell, **settings)
        plain = generate(loaded, talks, **settings) if compare else None
    if plain is None:
        say(*out.text)
    else:
        table = Table("prompt", "without", "with", show_lines=True)
        for prompt, before, after in zip(prompts, plain.text, out.text, strict=True):
            table.add_row(cell(prompt), cell(before), cell(after))
        console().print(table)
    for table, applied in enumerate(out.applied):
        say(f"intervention {table}: {int(applied.seen.sum())} tokens seen, "
            f"{int(applied.changed.sum())} changes over {applied.changed.shape[0]} layers",
            error=True)


def read_spec(file: pathlib.Path) -> Any:
    """Read a JSON file of interventions.

    Raises:
      ValueError: no such file, not JSON, or null.
    """
    from jaxpersona.persona.reading import Faults, parse, read_text

    faults = Faults()
    text = read_text(file, faults)
    found = None if text is None else parse(text, str(file), faults)
    faults.raise_if_any(file)
    if found is None:  # which a caller would take for no file
        raise ValueError(f"{file}: holds null, not interventions; give at least one")
    return found


def project(conversation: pathlib.Path, files: list[pathlib.Path], *, model: str,
            layer: int | None, png: pathlib.Path | None, as_json: bool, dtype: str | None) -> None:
    """Run `jaxpersona project`."""
    import numpy as np
    from rich.table import Table

    from jaxpersona import chat
    from jaxpersona.ckpts.vectors import load_vector
    from jaxpersona.inputs import read_json
    from jaxpersona.persona.check import fit
    from jaxpersona.persona.talk import project_conversation
    from jaxpersona.report import figures

    if png is not None and png.is_dir():
        raise ValueError(f"--png is {png}, a folder; give the name of the picture's file")
    talk = read_json(conversation)
    if isinstance(talk, dict):
        talk = talk.get("conversation", talk.get("messages"))
    if not isinstance(talk, list):
        raise ValueError(f"{conversation}: must hold a list of messages with role and content")
    vectors = [load_vector(file) for file in files]
    loaded = open_model(model, dtype)
    vectors = [fit(loaded, vector) for vector in vectors]
    total = loaded.config.n_layers
    at = total // 2 if layer is None else layer
    if not 0 <= at < total:
        raise ValueError(f"layer is {layer}; the model has layers 0…{total - 1}")
    empty = [vector.name for vector in vectors if not vector.values[at].any()]
    if empty:
        raise ValueError(f"{empty[0]!r} is zero at layer {at}; choose another with --layer")
    try:
        chat.check_conversation(talk, reply=False)
        found = project_conversation(loaded, talk, vectors)
    except ValueError as error:
        raise ValueError(f"{conversation}: {error}") from None
    names = [vector.name for vector in vectors]
    if len(set(names)) < len(names):  # every axis is called "assistant"
        names = [f"{vector.name} ({file})" for vector, file in zip(vectors, files, strict=True)]
    if as_json:
        print(json.dumps([{"turn": t.turn, "tokens": t.tokens, "layer": at,
                           **dict(zip(names, t.values[at].tolist(), strict=True))}
                          for t in found]))
    else:
        table = Table("message", "tokens", *[heading(f"{name} (layer {at})") for name in names])
        for t in found:
            table.add_row(str(t.turn), str(t.tokens), *[f"{v:.3f}" for v in t.values[at]])
        console().print(table)
    if png is not None:
        figures.conversation(png, [t.turn for t in found],
                             np.stack([t.values[at] for t in found]), names, at)


def demo(out: pathlib.Path, model: str, seed: int) -> dict[str, Any]:
    """Run `jaxpersona demo` and return its figures."""
    from jaxpersona.organism.demo import run_demo
    from jaxpersona.organism.method import held_out
    from jaxpersona.report import figures

    started = time.perf_counter()
    if model != "mini":
        raise ValueError(f"model is {model!r}; the demo knows the truth only about mini: "
                         "for other models use `jaxpersona axis`")
    loaded = open_model(model, None)
    with interrupt.keeping(lambda: kept_of(out)), progress() as report:
        done = run_demo(loaded, out, seed=seed, report=report)
    middle = loaded.config.n_layers // 2
    draw_run(out, done.extraction, middle, held_out())
    turns = done.figures["drift_turns"]
    floor = float(done.extraction.axis.thresholds("p25", of="default")[middle])
    figures.drift(out / "drift.png",
                  {name: talk.projections[:turns, :, middle] for name, talk in done.talks.items()},
                  floor, middle, done.figures["drift_n"])
    say(f"axis, vectors and figures: {out}", error=True)
    head = {"run": str(out), "model": loaded.name,
            "seconds": round(time.perf_counter() - started, 1)}
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in done.figures.items()}
    return head | rounded


