"""The options that select and configure a judge, and functions that create the judge."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from jaxpersona.cli import support
from jaxpersona.errors import UserError

if TYPE_CHECKING:
    from jaxpersona.judges.digits import DigitJudge
    from jaxpersona.judges.protocol import Judge
    from jaxpersona.judges.rubric import Rubric
    from jaxpersona.models.model import Model

JUDGES = ("The judge that scores the replies: `rules` (for mini only), `self` (the model itself), "
          "`model:NAME` (another model, whose next-token probabilities of the digits determine the "
          "score), `http:MODEL` (a model at an OpenAI-compatible endpoint), `human:FILE.csv` (a "
          "file in which a person enters scores) or `none` (every reply has score 3).")
RubricOption = Annotated[pathlib.Path | None, typer.Option(
    "--judge-rubric", show_default="each role's eval_prompt", help=(
        "A text file with the judge's prompt, which contains {question} and {answer}, and may "
        "contain {role} and {description}."))]
AfterOption = Annotated[bool, typer.Option("--judge-after", help=(
    "Load the model of `model:NAME` only after all replies are generated and the evaluated model "
    "is released. Before generation, the judging model is loaded once for a check."))]
UrlOption = Annotated[str | None, typer.Option(
    "--judge-url", show_default="OPENAI_BASE_URL, otherwise the OpenAI API",
    help="Base URL of the endpoint for `http:MODEL`, e.g. http://localhost:8000/v1.")]
KeyOption = Annotated[str, typer.Option(
    "--judge-key-env", help="Environment variable that contains the API key for `http:MODEL`.")]
BudgetOption = Annotated[str | None, typer.Option("--budget", show_default="no limit", help=(
    "Limit on the number or the cost of requests to the endpoint of `http:MODEL`, e.g. 500calls or "
    "5usd. Every request in the file of --judge-cache counts, including earlier ones."))]
PriceOption = Annotated[str | None, typer.Option(
    "--judge-price", show_default="unknown",
    help="Prices in USD per million prompt tokens and per million answer tokens, e.g. 0.4,1.6.")]
ConcurrencyOption = Annotated[int, typer.Option(
    "--judge-concurrency", help="Maximum number of concurrent requests of each process to the "
                                "endpoint of `http:MODEL`.")]
RpmOption = Annotated[float | None, typer.Option(
    "--judge-rpm", show_default="no limit",
    help="Maximum number of requests per minute to the endpoint of `http:MODEL`.")]
TpmOption = Annotated[float | None, typer.Option(
    "--judge-tpm", show_default="no limit",
    help="Maximum number of prompt and answer tokens per minute for the endpoint of "
         "`http:MODEL`.")]
TimeoutOption = Annotated[float, typer.Option(
    "--judge-timeout", help="Timeout in seconds of a request to the endpoint of `http:MODEL`.")]
TemperatureOption = Annotated[float, typer.Option(
    "--judge-temperature", help="Sampling temperature for the answers of `http:MODEL`.")]
TokensOption = Annotated[int, typer.Option(
    "--judge-max-tokens", help="Maximum length in tokens of an answer of `http:MODEL`.")]
CacheOption = Annotated[pathlib.Path | None, typer.Option(
    "--judge-cache", show_default="verdicts.jsonl in the run folder",
    help="File that records all requests to the endpoint of `http:MODEL` and its answers; recorded "
         "answers are reused.")]
BatchOption = Annotated[bool, typer.Option("--judge-batch", help=(
    "Send the requests to the endpoint of `http:MODEL` in batches, which take up to 24 hours and "
    "may cost less. If the command is interrupted, the same command waits for the same batches."))]
BatchSizeOption = Annotated[int, typer.Option(
    "--judge-batch-size", help="Maximum number of requests in a batch (--judge-batch).")]
BatchPriceOption = Annotated[str | None, typer.Option(
    "--judge-batch-price", show_default="the value of --judge-price",
    help="Prices in batches, in USD per million prompt tokens and per million answer tokens.")]

KINDS = ("rules", "none", "self")
WITH_ARGUMENT = ("model", "http", "human")


@dataclasses.dataclass(frozen=True)
class JudgeOptions:
    """The values of `--budget` and of the options `--judge-…` that configure a judge."""

    rubric: RubricOption = None
    url: UrlOption = None
    key_env: KeyOption = "OPENAI_API_KEY"
    budget: BudgetOption = None
    price: PriceOption = None
    concurrency: ConcurrencyOption = 8
    rpm: RpmOption = None
    tpm: TpmOption = None
    timeout: TimeoutOption = 60.0
    temperature: TemperatureOption = 0.0
    max_tokens: TokensOption = 10
    cache: CacheOption = None
    batch: BatchOption = False
    batch_size: BatchSizeOption = 50_000
    batch_price: BatchPriceOption = None


@dataclasses.dataclass(frozen=True)
class Choice(JudgeOptions):
    """A judge and its options.

    Attributes:
      judge: the value of `--judge`.
      kind: the part of `judge` before the colon, one of `KINDS` or `WITH_ARGUMENT`.
      argument: the model or file after the colon in `--judge`, or "".
      after: whether `--judge-after` was given.
    """

    judge: str = "none"
    kind: str = "none"
    argument: str = ""
    after: bool = False

    @property
    def reads_eval_prompt(self) -> bool:
        """Whether the judge needs an `eval_prompt` for every role."""
        return self.kind in ("self", "model", "http") and self.rubric is None


def choose(judge: str, options: JudgeOptions, *, own: bool, after: bool = False) -> Choice:
    """Check the options that select a judge, and return them as a `Choice`.

    Args:
      judge: the value of `--judge`.
      options: the values of the options that configure the judge.
      own: whether the roles are the built-in roles of `mini`.
      after: whether `--judge-after` was given.

    Raises:
      UserError: the judge is unknown, the judge is "rules" but the roles do not belong to `mini`,
        an option does not apply to the judge, or an option needs `--judge-batch` or cannot be
        combined with it.
    """
    kind, colon, argument = judge.partition(":")
    known = (kind in WITH_ARGUMENT and bool(argument)) if colon else kind in KINDS
    if not known or (kind == "rules" and not own):
        raise UserError(f"judge is {judge!r}; choose {'rules, self' if own else 'self'}, "
                        "model:NAME, http:MODEL, human:FILE.csv or none"
                        + (" (rules supports only the roles of mini)" if kind == "rules" else ""))
    given = [name for name, value in vars(options).items() if value != getattr(JudgeOptions, name)]
    for name in given + ["after"] * after:
        fits = (("self", "model", "http") if name == "rubric" else
                ("model",) if name == "after" else ("http",))
        if kind not in fits:
            option = "--budget" if name == "budget" else f"--judge-{name.replace('_', '-')}"
            raise UserError(f"{option} is given, but the judge is {judge!r}; use it only with "
                            + " or ".join(f"{one}{'' if one == 'self' else ':…'}" for one in fits))
    apart = ("concurrency", "rpm", "tpm") if options.batch else ("batch_size", "batch_price")
    for name in given:
        if name in apart:
            raise UserError(f"--judge-{name.replace('_', '-')} is given "
                            + ("together with --judge-batch, which does not use it; omit one of "
                               "them" if options.batch else "without --judge-batch; add it"))
    return Choice(**vars(options), judge=judge, kind=kind, argument=argument, after=after)


def rubric_of(choice: Choice) -> Rubric:
    """Return the rubric in the file of `--judge-rubric`, or `ROLES` if the option was not given.

    Raises:
      UserError: the file cannot be read, or its text lacks {question} or {answer}.
    """
    from jaxpersona.inputs import read_bytes
    from jaxpersona.judges.rubric import ROLES, Rubric

    if choice.rubric is None:
        return ROLES
    try:
        text = read_bytes(choice.rubric).decode()
    except UnicodeDecodeError:
        raise UserError(f"{choice.rubric} is not UTF-8; save it as UTF-8") from None
    try:
        return Rubric(template=text.strip())
    except UserError as error:
        raise UserError(f"{choice.rubric}: {error}") from None


def opened(choice: Choice, folder: pathlib.Path) -> Judge | None:
    """Create a judge of kind none, rules, human or http; return None for self and model.

    Args:
      choice: the judge and its options.
      folder: the run folder, which contains the journal of an http judge by default.

    Raises:
      UserError: an option is invalid, the rubric cannot be read, the file of a human judge cannot
        be read or written, or, for an http judge, the API key or the package openai is missing.
    """
    from jaxpersona.distributed import processes
    from jaxpersona.judges.judges import NoJudge
    from jaxpersona.organism.method import RuleJudge

    rubric = rubric_of(choice)
    if choice.kind == "none":
        return NoJudge()
    if choice.kind == "rules":
        return RuleJudge()
    if choice.kind == "human":
        from jaxpersona.judges.human import HumanJudge, read_rows

        file = pathlib.Path(choice.argument)
        if file.suffix.lower() != ".csv":
            raise UserError(f"the judge is human:{file}; give the name of a .csv file")
        if file.exists():
            read_rows(file)
        support.check_output("--judge human", file)
        return HumanJudge(file)
    if choice.kind != "http":
        return None
    from jaxpersona.judges.endpoint import Endpoint
    from jaxpersona.judges.http import HttpJudge
    from jaxpersona.judges.limits import MOST, Batch, Budget

    for name in ("timeout", "max_tokens"):
        if not 0 < getattr(choice, name) < math.inf:
            raise UserError(f"--judge-{name.replace('_', '-')} is {getattr(choice, name)}; it must "
                            "be positive and finite")
    if not 0 <= choice.temperature <= 2:
        raise UserError(f"--judge-temperature is {choice.temperature}; give 0 to 2")
    share, index, batch = 1, 0, None
    if choice.batch:
        if processes.joined():
            raise UserError("--judge-batch is given, but the run has several processes; use "
                            "--judge none, then `jaxpersona judge` with --judge-batch")
        if not 1 <= choice.batch_size <= MOST:
            raise UserError(f"--judge-batch-size is {choice.batch_size}; give 1 to {MOST}")
        batch = Batch(choice.batch_size, _price(choice.batch_price, "--judge-batch-price"))
    if processes.joined():  # one journal per process; rates and budget are divided equally
        import jax

        share, index = jax.process_count(), processes.index()
    budget = None if choice.budget is None else Budget.parse(choice.budget).part(share)
    file = choice.cache or folder / "verdicts.jsonl"
    return HttpJudge(
        Endpoint(choice.argument, url=choice.url, key_env=choice.key_env, timeout=choice.timeout,
                 max_tokens=choice.max_tokens, temperature=choice.temperature),
        file if not index else file.with_name(f"{file.stem}.{index}{file.suffix}"), rubric=rubric,
        concurrency=choice.concurrency, rpm=_part(choice.rpm, share), tpm=_part(choice.tpm, share),
        budget=budget, price=_price(choice.price), batch=batch)


def of_model(choice: Choice, load: Callable[[], Model], target: Callable[[], Model],
             ) -> DigitJudge:
    """Create the judge `model:NAME`.

    If `choice.after` is True, the judging model is loaded for a check and then released. When the
    judge is first used, the evaluated model is released and the judging model is loaded again. The
    two models are therefore never in memory at the same time, provided that the caller loads the
    evaluated model after this call.

    Args:
      choice: the judge and its options.
      load: a function that loads and returns the judging model.
      target: a function that returns the evaluated model.

    Raises:
      UserError: the rubric or the judging model cannot be loaded, or the model has no tokenizer
        with a token for every digit.
    """
    from jaxpersona.judges.digits import DigitJudge
    from jaxpersona.models.model import release

    rubric = rubric_of(choice)
    if not choice.after:
        return DigitJudge(load(), rubric=rubric)

    def later() -> Model:
        release(target())
        return load()

    judge, checked = DigitJudge(later, rubric=rubric), load()
    judge.identify(checked)
    release(checked)
    return judge


def check_cache(judge: Judge | None) -> None:
    """Open the journal of an http judge if its file exists, before a model is loaded.

    A new journal is created only with the run, because it may be in the run folder.

    Raises:
      UserError: the journal is damaged or cannot be written, or another process uses it.
    """
    from jaxpersona.judges.http import HttpJudge

    if isinstance(judge, HttpJudge) and judge.path.exists():
        judge.begin()


@contextlib.contextmanager
def closed(judge: Judge) -> Iterator[None]:
    """Close a judge's files and connections at the end of a `with` block."""
    try:
        yield
    finally:
        if close := getattr(judge, "close", None):
            close()


def _part(rate: float | None, share: int) -> float | None:
    return None if rate is None else rate / share


def _price(text: str | None, option: str = "--judge-price") -> tuple[float, float] | None:
    """Parse an option's prices of prompt and answer tokens, such as "0.4,1.6"; None if not given.

    Raises:
      UserError: the text is not two finite, nonnegative numbers separated by a comma.
    """
    if text is None:
        return None
    try:
        before, after = map(float, text.split(","))
    except ValueError:
        before = after = math.nan
    if not (0 <= before < math.inf and 0 <= after < math.inf):
        raise UserError(f"{option} is {text!r:.40}; give the prices in USD per million prompt "
                        "tokens and per million answer tokens, such as 0.4,1.6")
    return before, after
