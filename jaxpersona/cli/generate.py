"""The command `jaxpersona generate`: generate replies, with or without interventions."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxpersona.brief import count
from jaxpersona.cli import support
from jaxpersona.cli.edits import EditOptions, Edits
from jaxpersona.cli.groups import grouped
from jaxpersona.cli.output import cell, console, say
from jaxpersona.cli.support import (
    AdapterOption,
    DtypeOption,
    LengthOption,
    ModelOption,
    SeedOption,
    TemperatureOption,
    TopPOption,
    check_output,
    progress,
)
from jaxpersona.errors import UserError

if TYPE_CHECKING:
    from jaxpersona.data.conversations import Conversation
    from jaxpersona.engine.generate import Generated
    from jaxpersona.interventions import Interventions
    from jaxpersona.models.model import Model
    from jaxpersona.persona.monitor import EditCount, Monitor


@grouped
def generate(
    prompt: Annotated[list[str] | None, typer.Argument(
        show_default="none",
        help="User messages, each of which starts a separate conversation.")] = None,
    model: ModelOption = "mini",
    prompts: Annotated[pathlib.Path | None, typer.Option(
        show_default="none",
        help="A file with a user message on each line, or a .jsonl file of conversations.")] = None,
    system: Annotated[str | None, typer.Option(show_default="none", help="The system prompt.")
                      ] = None,
    edits: EditOptions = EditOptions(),
    compare: Annotated[bool, typer.Option("--compare", help="Also show the replies without "
                                                            "interventions.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each prompt.")
                       ] = False,
    out: Annotated[pathlib.Path | None, typer.Option(
        show_default="none",
        help="Write the JSON objects to this file instead of printing the replies.")] = None,
    max_new_tokens: LengthOption = 128,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    dtype: DtypeOption = None,
    adapter: AdapterOption = None,
) -> None:
    """Generate replies with caps, steering or other interventions, or without interventions."""
    from jaxpersona.engine.prompts import check_settings
    from jaxpersona.engine.sampling import sampling
    from jaxpersona.persona.monitor import edit_counts

    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature,
                                "top_p": top_p, "seed": seed}
    sampling(1, temperature=temperature, top_p=top_p, seed=seed)
    check_settings(max_new_tokens=max_new_tokens)
    talks = _conversations(prompt or [], prompts, system)
    if out is not None:
        check_output("--out", out)
    asked = Edits(**vars(edits)).read()
    if compare and not asked.any:
        raise UserError("--compare needs interventions; give --cap, --steer or --spec")
    loaded = support.open_model(model, dtype, None, adapter)
    table, monitor = asked.build(loaded), asked.monitor(loaded)
    if len(talks) == 1 and console().is_terminal and not (as_json or out or compare):
        _stream(loaded, talks[0], table, monitor, settings)
        return
    made = _run(loaded, talks, table, monitor, compare, settings)
    counts = [edit_counts(table, made.applied, i) for i in range(len(talks))]
    records = [_record(talk, made, monitor, i, counts[i], i + len(talks) if compare else None)
               for i, talk in enumerate(talks)]
    lines = [json.dumps(record) for record in records]
    if out is not None:
        _write(out, lines, len(made.text))
    if as_json:
        print(*lines, sep="\n", flush=True)
    elif out is None:
        _print(records, monitor, compare)
    _say_counts(counts)


def _conversations(prompt: Sequence[str], file: pathlib.Path | None,
                   system: str | None) -> list[Conversation]:
    """Return a conversation for each prompt on the command line and in the file of `--prompts`.

    Raises:
      UserError: there is no prompt, or a prompt is blank or invalid.
    """
    from jaxpersona.data.conversations import read_prompts

    if blank := [text for text in prompt if not text.strip()]:
        raise UserError(f"prompt is {blank[0]!r}; give a prompt that is not blank")
    if not prompt and file is None:
        raise UserError("there is no prompt; give one, or a file with --prompts")
    head = [] if system is None else [{"role": "system", "content": system}]
    talks = [[*head, {"role": "user", "content": text}] for text in prompt]
    return talks + ([] if file is None else read_prompts(file, system))


def _run(model: Model, talks: Sequence[Conversation], edits: Interventions,
         monitor: Monitor | None, compare: bool, settings: dict[str, Any]) -> Generated:
    """Apply the interventions and generate one reply to each conversation.

    If `compare` is True, the result also contains, after these replies, one reply to each
    conversation without the interventions. Both replies to a conversation are sampled with the
    same random numbers.
    """
    from jaxpersona.engine import prompts
    from jaxpersona.engine.generate import generate as run
    from jaxpersona.interventions import stack_rows

    total = len(talks)
    rows = [prompts.encode(model, talk) for talk in talks]
    ids = prompts.row_ids(rows, None).tolist()
    if compare:
        rows, ids = rows * 2, ids * 2
        edits = stack_rows([edits] * total + [None] * total)
    with progress() as report:
        def count_replies(done: int, all_of_them: int, tokens: int) -> None:
            report("generate", done, all_of_them, tokens)

        return run(model, rows, interventions=edits, ids=ids, progress=count_replies,
                   capture=None if monitor is None else monitor.capture,
                   batch_size=min(32, len(rows)), on_nonfinite="raise", **settings)


def _record(talk: Conversation, made: Generated, monitor: Monitor | None, index: int,
            counts: Sequence[EditCount], without: int | None) -> dict[str, Any]:
    """Return a reply as a JSON object.

    Args:
      talk: the conversation before the reply.
      made: all generated replies.
      monitor: the monitor that projected the replies, or None.
      index: the index of the reply in `made`.
      counts: one `EditCount` per intervention, for this reply.
      without: the index in `made` of the reply without interventions, or None to omit this reply.
    """
    from jaxpersona.persona.monitor import NAME

    def reply(i: int) -> dict[str, Any]:
        found: dict[str, Any] = {"reply": made.text[i], "stopped": bool(made.stopped[i]),
                                 "tokens": int(made.tokens[i].size)}
        if monitor is not None:
            found["projections"] = monitor.of_reply(made.captured[NAME][i],
                                                    made.rows[i].tokens.size)
        return found

    record = {"prompt": talk, **reply(index), "edits": [dataclasses.asdict(one) for one in counts]}
    return record | ({} if without is None else {"without": reply(without)})


def _write(file: pathlib.Path, lines: Sequence[str], replies: int) -> None:
    """Write lines to a file, and print the number of replies in it."""
    from jaxpersona.ckpts.files import atomic

    with atomic(file) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    say(f"wrote {file}: {count(replies, 'reply')}", error=True)


def _print(records: Sequence[dict[str, Any]], monitor: Monitor | None, compare: bool) -> None:
    """Print the replies or, if `compare` is True, a table of both replies to each prompt.

    If there is a monitor, the mean projection of each reply is also printed.
    """
    from rich.table import Table

    if monitor is not None:
        _legend(monitor)
    if not compare:
        for record in records:
            say(record["reply"])
            if monitor is not None:
                say(monitor.words(record["projections"]), error=True)
        return
    table = Table("prompt", "without", "with", show_lines=True)
    for record in records:
        texts = [one["reply"] + ("" if monitor is None else
                                 f"\n\n{monitor.words(one['projections'])}")
                 for one in (record["without"], record)]
        table.add_row(cell(record["prompt"][-1]["content"]), *map(cell, texts))
    console().print(table)


def _stream(model: Model, talk: Conversation, edits: Interventions, monitor: Monitor | None,
            settings: dict[str, Any]) -> None:
    """Generate one reply and stream its text to standard output.

    Then print the projections (if there is a monitor) and, for each intervention, the numbers of
    selected tokens and changed activations.
    """
    from jaxpersona.engine.engine import Engine
    from jaxpersona.engine.request import Request
    from jaxpersona.persona.monitor import NAME, edit_counts
    from jaxpersona.persona.session import CHUNK, check_finite

    engine = Engine(model, rows=1, lanes=1, chunk=CHUNK)
    handle = engine.submit(Request(talk, interventions=edits, **settings,
                                   capture=None if monitor is None else monitor.capture))
    support.stream(event.text for event in engine.stream(handle))
    reply = engine.result(handle)
    check_finite(model, reply, edits)
    if monitor is not None:
        _legend(monitor)
        say(monitor.words(monitor.of_reply(reply.captured[NAME], reply.row.tokens.size)),
            error=True)
    _say_counts([edit_counts(edits, reply.applied)])


def _legend(monitor: Monitor) -> None:
    say(f"projection: {monitor.sentence}", error=True)


def _say_counts(counts: Sequence[Sequence[EditCount]]) -> None:
    """Print, for each intervention, the numbers of selected tokens and changed activations."""
    for number, own in enumerate(zip(*counts, strict=True)):
        say(f"intervention {number}: tokens selected: {sum(one.seen for one in own)}, activations "
            f"changed: {sum(sum(one.changed) for one in own)}, layers: {len(own[0].layers)}",
            error=True)
