"""A judge that scores replies by a model's next-token probabilities for the scale's integers."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpersona.brief import brief, line, quoted
from jaxpersona.engine import prompts
from jaxpersona.engine.scoring import next_logprobs
from jaxpersona.errors import UserError
from jaxpersona.judges.protocol import Item, Verdict
from jaxpersona.judges.rubric import ROLES, Rubric

if TYPE_CHECKING:
    from jaxpersona.models.model import Model
    from jaxpersona.text.chat import Row

# If the total probability of the scale's integers is lower than this, the score is None.
LEAST_MASS = 0.25
# The next-digit probabilities are computed after each digit prefix with at least this probability,
# and after the prefix that greedy decoding generates.
LEAST_BRANCH = 1e-3
_ITEMS = 256  # maximum number of items that are scored together
_SPACES = ("", "Ġ", "▁")  # a token may begin with a space, encoded as Ġ or ▁


@dataclasses.dataclass(frozen=True)
class Readings:
    """A judge's probabilities of the S integers of a scale, for n prompts.

    Attributes:
      scale: the S integers.
      probabilities: [n, S], the probability of each integer, normalized to a sum of 1; all 0 if
        `mass` is 0.
      mass: [n], the probability that the judge's reply begins with an integer of the scale.
      refusal: [n], the probability that the judge's reply begins with the first token of the
        rubric's refusal word; 0 if the rubric has no refusal word.
      greedy: [n], the integer that greedy decoding generates if it is restricted to the scale.
    """

    __repr__ = brief

    scale: tuple[int, ...]
    probabilities: np.ndarray
    mass: np.ndarray
    refusal: np.ndarray
    greedy: np.ndarray

    @property
    def expected(self) -> np.ndarray:
        """The expected score Σ s·p(s) for each prompt, [n]."""
        return self.probabilities @ np.asarray(self.scale, np.float64)

    @property
    def refused(self) -> np.ndarray:
        """Whether `refusal` is greater than `mass`, [n] bool."""
        return self.refusal > self.mass

    @property
    def scores(self) -> list[int | None]:
        """The n scores: `greedy`, or None where `mass` < `LEAST_MASS` or `refused` is True."""
        known = (self.mass >= LEAST_MASS) & ~self.refused
        return [int(s) if fine else None for s, fine in zip(self.greedy, known, strict=True)]


class DigitJudge:
    """A judge that scores replies by a model's next-token probabilities after the rubric's prompt.

    If each integer of the scale is a single token, such as 0 to 3, a reply is scored from the
    next-token probabilities after its prompt, without generation (Chen et al. 2025 score traits
    this way). If the tokenizer splits an integer into several tokens, such as 57 into 5 and 7, its
    probability is the product p(57) = p(5)·p(7 | 5), and the score 5 has the probability of
    a 5 without a further digit. The next-token probabilities are then also computed after each
    digit prefix with a probability of at least `LEAST_BRANCH`, and after the greedy prefix.

    Args:
      model: the judging model, which needs a tokenizer, or a function without arguments that loads
        this model when it is first needed. The judging model may be the evaluated model.
      rubric: the prompt and the scale; default: each role's `eval_prompt`, scores 0 to 3.
      batch_tokens: the target number of tokens per batch, or None for the default of
        `engine.scoring.next_logprobs`.

    Raises:
      UserError: the model has no tokenizer, or its tokenizer has no token for a digit.

    Examples:
      >>> import jaxpersona as jp
      >>> from jaxpersona.data.texts import Role
      >>> from jaxpersona.judges.digits import DigitJudge
      >>> from jaxpersona.judges.protocol import Item
      >>> judge = DigitJudge(jp.load("mini"))
      >>> ghost = Role("ghost", ("Be a ghost.",), "{question} {answer} Is this a ghost?")
      >>> [verdict] = judge.score([Item("a", ghost, "Who are you?", "Boo.")])
      >>> verdict.mass <= 1 and verdict.error is None
      True
    """

    together = True
    _words: list[int]
    _digits: list[int]

    def __init__(self, model: Model | Callable[[], Model], *, rubric: Rubric = ROLES,
                 batch_tokens: int | None = None) -> None:
        self.rubric, self.batch_tokens = rubric, batch_tokens
        self.scale, self.reads_eval_prompt = rubric.scale, rubric.template is None
        self._load: Any = None if hasattr(model, "params") else model
        self._model: Any = None if self._load else model
        self._name, self._tree, self._words, self._digits = "", _Node(), [], []
        if self._model is not None:
            self.identify(self._model)

    def __repr__(self) -> str:
        name = "model not loaded" if self._model is None else quoted(self._model.name)
        return line("DigitJudge", name, f"rubric {self.rubric.digest}")

    @property
    def after(self) -> bool:
        """Whether the judging model is not loaded yet (see `Judge`)."""
        return self._model is None

    @property
    def model(self) -> Model:
        """The judging model, loaded when it is first needed.

        Raises:
          UserError: as for `identify`, or the loaded model differs from the model that was passed
            to `identify`.
        """
        if self._model is None:
            before, model = self._name, self._load()
            self.identify(model)
            if before and before != self._name:
                raise UserError(f"the model of the judge changed: the judge was {before}, and is "
                                f"now {self._name}; use one unchanged checkpoint")
            self._model = model
        return self._model

    @property
    def name(self) -> str:
        """The judge's name.

        The name contains the fingerprint of the judging model, so the model is loaded unless
        `identify` was called before.
        """
        if not self._name:
            self.identify(self.model)
        return self._name

    def identify(self, model: Model) -> None:
        """Set the judge's name and check the model's tokenizer, without storing the model.

        Raises:
          UserError: the model has no tokenizer, or its tokenizer has no token for a digit.
        """
        if model.tokenizer is None:
            raise UserError(f"{model.name} has no tokenizer; the judging model needs one")
        self._tree, known = _tree(model, self.scale), model.tokenizer.get_vocab()
        self._digits = [known[digit] for digit in string.digits if digit in known]
        self._words = _starts(model.tokenizer, self.rubric.refusal) if self.rubric.refusal else []
        self._name = (f"model {model.name} {model.fingerprint} rubric {self.rubric.digest}"
                      + (f" batch {self.batch_tokens}" if self.batch_tokens else ""))

    def read(self, texts: Sequence[str | Row]) -> Readings:
        """Return the probabilities of the scale's integers and of a refusal, for each prompt.

        Args:
          texts: the prompts, as texts or encoded rows.

        Raises:
          UserError: a prompt fills the context of the judging model.
        """
        model = self.model
        rows = [prompts.encode(model, text) for text in texts]
        values = np.zeros((len(rows), len(self.scale)))
        refusal = np.zeros(len(rows))
        greedy = np.full(len(rows), -1)
        place = {value: i for i, value in enumerate(self.scale)}
        # nodes at one depth: (row, node, its probability, whether greedy decoding reaches it)
        level = [(i, self._tree, 1.0, True) for i in range(len(rows))]
        while level:
            wanted = sorted({token for _, node, _, _ in level for token in node.next})
            first = level[0][1] is self._tree
            extra = [token for token in (self._words if first else self._digits)
                     if token not in wanted]
            here = [rows[i] if node is self._tree else
                    [*np.asarray(rows[i].tokens).tolist(), *node.path] for i, node, _, _ in level]
            found = np.exp(next_logprobs(model, here, [*wanted, *extra],
                                         batch_tokens=self.batch_tokens).astype(np.float64))
            column = {token: found[:, j] for j, token in enumerate([*wanted, *extra])}
            if first and self._words:
                refusal = np.sum([column[token] for token in self._words], 0)
            deeper = []
            for at, (i, node, p, chosen) in enumerate(level):
                each = {token: float(column[token][at]) for token in node.next}
                # probability that no digit follows, not even one that leads out of the scale, such
                # as the 5 of 105 after 10
                more = node.next if first else dict.fromkeys([*node.next, *self._digits])
                ends = max(0.0, 1.0 - sum(float(column[token][at]) for token in more))
                if node.value is not None:
                    values[i, place[node.value]] += p * ends
                best = max(each, key=lambda token: each[token])
                stays = node.value is not None and ends >= each[best]
                if chosen and stays:
                    greedy[i] = node.value
                for token, child in node.next.items():
                    follows = chosen and not stays and token == best
                    if child.next and (follows or p * each[token] >= LEAST_BRANCH):
                        deeper.append((i, child, p * each[token], follows))
                        continue
                    if child.value is not None:
                        values[i, place[child.value]] += p * each[token]
                    if follows:
                        greedy[i] = child.value
            level = deeper
        mass = values.sum(-1)
        return Readings(self.scale, values / np.maximum(mass, 1e-300)[:, None], mass, refusal,
                        greedy)

    def score(self, items: Sequence[Item]) -> Iterator[Verdict]:
        """Yield one verdict per item.

        `raw` contains the four most probable integers with their probabilities. If an item's prompt
        leaves no room for a score in the model's context, its verdict has an `error`.

        Raises:
          UserError: the rubric has no template, and a role has no `eval_prompt`.
        """
        for start in range(0, len(items), _ITEMS):
            part = items[start : start + _ITEMS]
            rows = [prompts.encode(self.model, self.rubric.prompt(item)) for item in part]
            room = self.model.config.max_context
            for item, row in zip(part, rows, strict=True):
                if row.tokens.size >= room - 3:  # the longest integer, 100, may take 3 tokens
                    yield Verdict(item.key, error=f"the prompt has {row.tokens.size} tokens, "
                                                  "so a score does not fit into the judge's "
                                                  f"context of {room} tokens")
            fits = [(item, row) for item, row in zip(part, rows, strict=True)
                    if row.tokens.size < room - 3]
            if fits:
                yield from self._verdicts([item for item, _ in fits],
                                          self.read([row for _, row in fits]))

    def _verdicts(self, items: Sequence[Item], found: Readings) -> Iterator[Verdict]:
        for i, (item, score) in enumerate(zip(items, found.scores, strict=True)):
            refused = bool(found.refused[i]) or self.rubric.refuses(score)
            order = np.argsort(-found.probabilities[i], kind="stable")[:4]
            yield Verdict(
                item.key, score, mass=float(found.mass[i]), refused=refused,
                expected=None if score is None else float(found.expected[i]),
                raw=", ".join(f"{self.scale[j]}: {found.probabilities[i, j]:.3f}" for j in order))


class _Node:
    """A node in the prefix tree of the token sequences that spell the scale's integers.

    Attributes:
      path: the tokens on the path from the root to this node.
      value: the integer that these tokens spell, or None.
      next: token → child node.
    """

    def __init__(self, path: tuple[int, ...] = ()) -> None:
        self.path, self.value = path, None
        self.next: dict[int, _Node] = {}

    value: int | None

    def add(self, tokens: Sequence[int], value: int) -> None:
        node = self
        for token in tokens:
            node = node.next.setdefault(token, _Node((*node.path, token)))
        node.value = value


def _tree(model: Any, scale: Sequence[int]) -> _Node:
    """Return the prefix tree of the scale's integers, with and without a leading space.

    Raises:
      UserError: the tokenizer has no token for a digit.
    """
    root, vocabulary = _Node(), model.tokenizer.get_vocab()
    for value in scale:
        spelled = _spelling(model.tokenizer, vocabulary, str(value))
        firsts = [i for space in _SPACES if (i := vocabulary.get(space + spelled[0])) is not None]
        rest = [vocabulary.get(token) for token in spelled[1:]]
        if not firsts or None in rest:
            bare = next(t for t in spelled if t not in vocabulary)
            raise UserError(f"the tokenizer of {model.name} has no token for the digit {bare[0]}; "
                            "use another judge")
        for first in firsts:
            root.add([first, *(i for i in rest if i is not None)], value)
    return root


def _spelling(tokenizer: Any, vocabulary: dict[str, int], number: str) -> list[str]:
    """Return the tokens of a number as strings, without a leading space.

    If these strings are not all in the vocabulary, or do not spell the number, return its digits.
    """
    if len(number) == 1:
        return [number]
    ids = tokenizer(number, add_special_tokens=False).input_ids
    tokens = [token.lstrip("Ġ▁") for token in tokenizer.convert_ids_to_tokens(list(ids))]
    tokens = [token for token in tokens if token]
    whole = "".join(tokens) == number and all(token in vocabulary for token in tokens)
    return tokens if whole else list(number)


def _starts(tokenizer: Any, word: str) -> list[int]:
    """Return the ids of a word's first token, with and without a leading space."""
    found = []
    for text in (word, f" {word}"):
        ids = list(tokenizer(text, add_special_tokens=False).input_ids)
        tokens = tokenizer.convert_ids_to_tokens(ids)
        # skip a token that contains only a space, because any word may follow the space
        found += [i for i, token in zip(ids, tokens, strict=True) if token.lstrip("Ġ▁")][:1]
    return list(dict.fromkeys(found))
