"""The command `jaxpersona`: one command, sub-commands, no logic of its own."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Annotated, Any, NoReturn

import typer

from jaxpersona import cli_output as output
from jaxpersona import cli_support as support
from jaxpersona import interrupt
from jaxpersona.cli_data import app as data_app
from jaxpersona.cli_plan import plan
from jaxpersona.cli_vectors import app as vectors_app

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None,
                  pretty_exceptions_enable=False,
                  help="Read and hold a language model's persona.")
app.add_typer(vectors_app, name="vectors")
app.add_typer(data_app, name="data")
app.command()(plan)

ModelOption = Annotated[str, typer.Option("--model", help="A folder, `mini`, `random:<preset>` or "
                                                          "a hub name.")]
DtypeOption = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]


@app.command()
def axis(
    model: ModelOption = "mini",
    out: Annotated[pathlib.Path, typer.Option(help="The run folder.")] = pathlib.Path("runs/axis"),
    roles: Annotated[str | None, typer.Option(help="A folder of roles, or `data`.")] = None,
    questions: Annotated[str | None, typer.Option(help="A .jsonl file, or `data`.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many roles.")] = None,
    limit_questions: Annotated[int | None, typer.Option(help="At most this many.")] = None,
    judge: Annotated[str | None, typer.Option(help="`rules` (mini), `self` or `none`.")] = None,
    samples: int = 1,
    max_new_tokens: int | None = None,
    temperature: float = 0.7,
    top_p: float = 0.9,
    batch_size: int = 32,
    seed: int = 0,
    min_count: Annotated[int, typer.Option(help="Rollouts that a role's vector needs.")] = 10,
    held_out: Annotated[str, typer.Option(help="Roles to keep out, with commas.")] = "",
    redo: Annotated[list[str] | None, typer.Option(
        help="Generate this role again, as one whose files are damaged; may be repeated.")
    ] = None,
    dtype: DtypeOption = None,
    mesh: Annotated[str | None, typer.Option(help="Devices to spread over, as data=2,model=4 (or "
                                                  "fsdp=).")] = None,
    distributed: Annotated[bool, typer.Option("--distributed", help="Join the processes of SLURM, "
                                              "Kubernetes or a TPU pod.")] = False,
    coordinator: Annotated[str | None, typer.Option(help="host:port of process 0, elsewhere.")
                           ] = None,
    processes: Annotated[int | None, typer.Option(help="How many there are.")] = None,
    process: Annotated[int | None, typer.Option(help="Which one this is, from 0.")] = None,
) -> None:
    """Extract a model's Assistant Axis: rollouts, judge, vectors, axis, thresholds, figures."""
    place = (coordinator, processes, process)
    join = place if distributed or place != (None, None, None) else None
    support.extract(model=model, out=out, roles=roles, questions=questions, limit=limit,
                    limit_questions=limit_questions, judge=judge, samples=samples,
                    max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
                    batch_size=batch_size, seed=seed, min_count=min_count, held_out=held_out,
                    redo=redo or [], dtype=dtype, mesh=mesh, join=join)


@app.command()
def generate(
    prompt: Annotated[list[str], typer.Argument(help="One or more user messages.")],
    model: ModelOption = "mini",
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    cap: Annotated[pathlib.Path | None, typer.Option(help="An axis, or caps, to cap on.")] = None,
    cap_layers: Annotated[str | None, typer.Option(help="Half-open, as 46:54; default: the upper "
                                                        "half.")] = None,
    percentile: Annotated[str | None, typer.Option(help="Default: p25.")] = None,
    of: Annotated[str | None, typer.Option(help="The population of the percentile; default: "
                                                "default.")] = None,
    experiment: Annotated[str | None, typer.Option(help="Which caps of a capping_config.pt.")
                          ] = None,
    check: Annotated[bool, typer.Option(help="Test the cap on short replies first.")] = True,
    steer: Annotated[pathlib.Path | None, typer.Option(help="A vector file to add.")] = None,
    steer_layers: Annotated[str | None, typer.Option(help="As 16 or 14:18; default: the middle.")
                            ] = None,
    scale: float = 1.0,
    spec: Annotated[pathlib.Path | None, typer.Option(
        help="A JSON file of interventions, applied last.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show the reply without beside it.")
                       ] = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: DtypeOption = None,
) -> None:
    """Generate replies, capped, steered or plain."""
    support.reply(prompt, model=model, system=system, cap_file=cap, cap_layers=cap_layers,
                  percentile=percentile, of=of, experiment=experiment, check=check,
                  steer_file=steer, steer_layers=steer_layers, scale=scale, spec_file=spec,
                  compare=compare, dtype=dtype, max_new_tokens=max_new_tokens,
                  temperature=temperature, top_p=top_p, seed=seed)


@app.command()
def project(
    conversation: Annotated[pathlib.Path, typer.Argument(help="A JSON list of messages.")],
    vector: Annotated[list[pathlib.Path], typer.Option("--on", help="Axis or vector files.")],
    model: ModelOption = "mini",
    layer: Annotated[int | None, typer.Option(help="Default: the middle.")] = None,
    png: Annotated[pathlib.Path | None, typer.Option(help="Where to draw it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dtype: DtypeOption = None,
) -> None:
    """Project a conversation's assistant messages on directions, turn by turn."""
    support.project(conversation, vector, model=model, layer=layer, png=png, as_json=as_json,
                    dtype=dtype)


@app.command()
def demo(
    out: Annotated[pathlib.Path, typer.Option(help="The run folder.")] = pathlib.Path("runs/demo"),
    model: ModelOption = "mini",
    seed: int = 0,
) -> None:
    """Run the whole method on the embedded model; the last line is one JSON object."""
    figures: dict[str, Any] = support.demo(out, model, seed)
    print(json.dumps(figures), flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the command.

    A user's mistake, or a file that the system refuses, is one line on standard error and exit
    code 2. A signal (SIGINT, SIGTERM) ends it with a line that says what is kept, and 128 and the
    signal's number.
    """
    with output.prepared(), interrupt.raised():
        _run(arguments)


def _run(arguments: list[str] | None) -> None:
    from jaxpersona import processes

    try:
        app(arguments)
    except (ValueError, OSError) as error:
        said = str(error)
        if isinstance(error, OSError) and error.filename:
            said = f"{error.filename}: {error.strerror}"
        _fail(said)
    except MemoryError as error:
        _fail(f"the memory does not suffice ({error or 'no more is known'}); make the batch, the "
              "replies or the model smaller")
    except (interrupt.Stopped, KeyboardInterrupt) as stop:
        kept = getattr(stop, "kept", "nothing is known of its files")
        output.say(f"stopped; {kept}", error=True)
        code = getattr(stop, "code", 130)
        if processes.joined():  # the others may wait for this one, and it must not wait for them
            processes.leave(code)
        sys.exit(code)
    except Exception as error:
        if not processes.joined():
            raise
        import traceback

        import jax

        if not isinstance(error, jax.errors.JaxRuntimeError):
            traceback.print_exc()
            processes.leave(1)
        reason = " ".join(str(error).split())[:200]
        output.say(f"error: another process of this run ended or cannot be reached ({reason}); "
                   "start all of them again with the same command: what is written is kept",
                   error=True)
        processes.leave(3)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of the tokenizers library, in Rust
            raise
        _fail(f"the tokenizer failed on a text ({error}); its tokenizer.json is damaged or its "
              "regular expression cannot be run")


def _fail(said: str) -> NoReturn:
    """Print a user's mistake in one line and end with code 2."""
    from jaxpersona import processes

    output.say(f"error: {' '.join(said.split())}", error=True)
    if processes.joined():
        processes.leave(2)
    sys.exit(2)


if __name__ == "__main__":
    main()
