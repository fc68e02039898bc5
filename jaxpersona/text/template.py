"""Locate each message's content in the text that a chat template renders.

The template renders the conversation and a twin of it, in which private-use characters (marks)
replace the contents. After each mark is replaced by its content, verbatim or trimmed, the second
rendering must equal the first. The marks thus locate the contents without an ambiguous search.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxpersona.errors import UserError
from jaxpersona.models.batch import ASSISTANT, CODE, SYSTEM, TEMPLATE, THINKING, USER
from jaxpersona.text import sandbox
from jaxpersona.text.sandbox import Refused

ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
OPEN, CLOSE = "<think>", "</think>"
BLANK_LINE = "\n\n"
# Some templates search the contents for these tags, so they are also kept in the twin.
TAGS = re.compile(r"(</?think>|</?tool_response>|</?tool_call>)")
FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})([^\n]*)$", re.MULTILINE)
# private-use code points (Unicode planes 15 and 16), which ordinary text does not contain
PRIVATE = range(0xF0000, 0x10FFFE)
_EXAMPLES = 16  # maximum number of renderings to determine closing texts


class _Piece(NamedTuple):
    """A piece of a message's content: text, a tag, or the separator of two merged messages."""

    owner: int  # the index of the message
    place: int  # the index among the pieces of the message; -1 for a separator
    text: str
    what: str = "text"  # or "tag", or "joint" for a separator


_Found = tuple[_Piece, int, int]  # piece, start and end character offsets in the rendered text


class Template:
    """A checkpoint's chat template with the values of its variables.

    Attributes:
      tokenizer, options: the tokenizer, and the values of the template variables by name.
      base: True for a base model without a template; contents are then joined as plain text.
      lead, lead_text: the ids and the text of the tokens (such as BOS) that a base model's
        tokenizer prepends. Empty if there is a template, because the template adds these tokens.
      name: the path or name of the tokenizer, for error messages.
      own: whether the tokenizer's class overrides apply_chat_template; if so, it is called.
    """

    def __init__(self, tokenizer: Any, thinking: bool, variables: Mapping[str, Any] | None) -> None:
        self.tokenizer, self.base = tokenizer, not getattr(tokenizer, "chat_template", None)
        self.name = str(getattr(tokenizer, "name_or_path", "")) or "tokenizer.chat_template"
        if not isinstance(variables, Mapping | None):
            raise UserError(f"variables is {variables!r:.60}; give a dict of template variables")
        self.options = {"enable_thinking": thinking, **(variables or {})}
        self.lead: list[int] = _lead(tokenizer) if self.base else []
        self.lead_text = "".join(tokenizer.convert_ids_to_tokens(self.lead)) if self.lead else ""
        method = getattr(type(tokenizer), "apply_chat_template", None)
        self.own = getattr(method, "__module__", "") != "transformers.tokenization_utils_base"

    def __call__(self, messages: list[dict[str, str]], reply: bool) -> str:
        """Render messages, followed by the generation prompt if `reply` is true.

        Raises:
          sandbox.Refused: the template raises an error.
          UserError: as for `sandbox.render`.
        """
        if self.base:
            return self.lead_text + BLANK_LINE.join(m["content"] for m in messages if m["content"])
        if self.own:
            try:
                return self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=reply, **self.options)
            except Exception as error:
                raise Refused(f"the chat template rejects the conversation: "
                              f"{type(error).__name__}: {error}") from error
        options = dict(self.options)
        source = self.tokenizer.get_chat_template(options.pop("chat_template", None),
                                                  options.get("tools"))
        return sandbox.render(source, {
            "tools": None, "documents": None, **self.tokenizer.special_tokens_map, **options,
            "messages": messages, "add_generation_prompt": reply}, self.name)

    def takes_system(self) -> bool:
        """Return whether the template renders a system message."""
        asked = [{"role": "system", "content": chr(PRIVATE[0])}, {"role": "user", "content": "x"}]
        try:
            return chr(PRIVATE[0]) in self(asked, True)
        except Refused:
            return False


def _lead(tokenizer: Any) -> list[int]:
    """Return the ids of the special tokens that a tokenizer prepends to a text."""
    bare = tokenizer("x", add_special_tokens=False)["input_ids"]
    whole = tokenizer("x")["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return list(whole[:at])


def _pieces(template: Template, messages: list[dict[str, str]]) -> list[tuple[str, list[_Piece]]]:
    """Split messages into (role, pieces); merge an unsupported system message into message 1."""
    out = []
    for owner, message in enumerate(messages):
        texts = TAGS.split(message["content"])
        pieces = [_Piece(owner, i, text, "tag" if i % 2 else "text")
                  for i, text in enumerate(texts)]
        out.append((message["role"], pieces))
    if messages[0]["role"] != "system" or template.takes_system():
        return out
    if len(messages) == 1 or messages[1]["role"] != "user":
        raise UserError("the chat template has no system role, and no user message follows message "
                        "0 (system), with which it could be merged; add a user message")
    (_, system), (_, user), *rest = out
    if not messages[0]["content"].strip():
        return [("user", user), *rest]
    joint = [_Piece(1, -1, BLANK_LINE, "joint")] if messages[1]["content"].strip() else []
    return [("user", [*system, *joint, *user]), *rest]


def locate(template: Template, messages: list[dict[str, str]], reply: bool,
           ) -> tuple[str, np.ndarray, np.ndarray, dict[int, int]]:
    """Render messages; return the text, each character's kind and turn, and where contents end.

    Raises:
      UserError: a message's content is changed in an unsupported way, or is omitted.
    """
    plan = _pieces(template, messages)
    text = template([{"role": role, "content": "".join(p.text for p in pieces)}
                     for role, pieces in plan], reply)
    for blanks in ("all", "within", "inside", "none"):  # templates may omit blanks but not marks
        twin, marks = _twin(plan, text, blanks)
        skeleton = template(twin, reply)
        spans = _match(skeleton, text, marks)
        if spans is not None:
            break
    else:
        where = ", ".join(f"{i} ({m['role']})" for i, m in enumerate(messages))
        raise UserError(f"messages {where} could not be located in the rendered text: the chat "
                        f"template ({template.name}) changes their contents; use another template")
    kind = np.full(len(text), TEMPLATE, np.int32)
    parts: list[list[_Piece]] = [[] for _ in messages]
    for _, pieces in plan:
        for piece in pieces:
            if piece.what != "joint":
                parts[piece.owner].append(piece)
    by_message: list[list[_Found]] = [[] for _ in messages]
    for span in spans:
        by_message[span[0].owner].append(span)
    places: dict[int, list[tuple[int, int]]] = {}
    for i, message in enumerate(messages):
        if not by_message[i] and message["content"].strip():
            raise UserError(f"the chat template ({template.name}) omits the content of message {i} "
                            f"({message['role']}); use another template")
        places[i] = _mark_content(text, kind, ROLES[message["role"]], parts[i], by_message[i])
    turn = _turns(template, twin, marks, skeleton, text, spans, reply, len(messages))
    _mark_thinking(text, kind, turn, messages, places)
    _mark_code(text, kind, turn)
    return text, kind, turn, {i: s[-1][1] for i, s in places.items() if s}


def _twin(plan: list[tuple[str, list[_Piece]]], text: str, blanks: str,
          ) -> tuple[list[dict[str, str]], dict[str, _Piece]]:
    """Return the twin messages, with a unique mark per text piece, and the piece of each mark.

    `blanks` selects the whitespace-only pieces to mark: "all", "within" (if the content also has
    a tag or other text), "inside" (unless before the first tag or after the last) or "none".
    """
    used = set(text).union(*(p.text for _, pieces in plan for p in pieces))
    free = (chr(code) for code in PRIVATE if chr(code) not in used)
    marks: dict[str, _Piece] = {}
    twin = []
    for role, pieces in plan:
        content = ""
        has_text = any(piece.text.strip() for piece in pieces)
        blank = blanks == "all" or (blanks == "within" and has_text)
        for i, piece in enumerate(pieces):
            inside = blanks == "inside" and (len(pieces) == 1 or 0 < i < len(pieces) - 1)
            if piece.what == "text" and (blank or inside or piece.text.strip()):
                mark = next(free, "")
                if not mark:
                    raise UserError(f"the conversation has more than {len(PRIVATE):,} pieces of "
                                    "text; shorten the conversation")
                marks[mark] = piece
                content += mark
            else:
                content += piece.text
        twin.append({"role": role, "content": content})
    return twin, marks


def _match(skeleton: str, text: str, marks: dict[str, _Piece]) -> list[_Found] | None:
    """Locate the pieces in `text` by their marks in `skeleton`; return None on a mismatch."""
    if not marks:
        return [] if skeleton == text else None
    at = [i for i, char in enumerate(skeleton) if char in marks]
    steps = [(marks[skeleton[i]], skeleton[i + 1 : end])
             for i, end in itertools.pairwise([*at, len(skeleton)])]
    first = skeleton[: at[0]] if at else skeleton
    if not text.startswith(first) or not steps:
        return [] if skeleton == text else None
    forms = [_forms(piece.text) for piece, _ in steps]
    # The length bounds of the remaining steps and the memoized failed (step, position) pairs prune
    # the search. Without them, whitespace-only contents would take exponential time.
    most, least = [0], [0]
    for (_, scaffold), variants in zip(reversed(steps), reversed(forms), strict=True):
        sizes = [len(form) for form in variants]
        most.append(most[-1] + len(scaffold) + max(sizes))
        least.append(least[-1] + len(scaffold) + min(sizes))
    most.reverse()
    least.reverse()
    failed: set[tuple[int, int]] = set()
    trail = [(len(first), iter(forms[0]))]
    found: list[_Found] = []
    while trail:  # depth-first search with backtracking
        number = len(trail) - 1
        start, left = trail[-1]
        piece, scaffold = steps[number]
        for form in left:
            end = start + len(form)
            after = end + len(scaffold)
            rest = len(text) - after
            if not least[number + 1] <= rest <= most[number + 1] or (number + 1, after) in failed:
                continue
            if not text.startswith(form, start) or not text.startswith(scaffold, end):
                continue
            found.append((piece, start, end))
            if number + 1 == len(steps):
                return found  # the length bounds ensure that no text remains
            trail.append((after, iter(forms[number + 1])))
            break
        else:
            failed.add((number, start))
            trail.pop()
            if found:
                found.pop()
    return None


def _forms(content: str) -> list[str]:
    """Return the content verbatim and with each kind of trimming that templates apply."""
    forms = [content, content.strip(), content.lstrip(), content.rstrip(), content.strip("\n"),
             content.lstrip("\n"), content.rstrip("\n")]
    return list(dict.fromkeys(forms))


def _mark_content(text: str, kind: np.ndarray, role: int, parts: list[_Piece],
                  mine: list[_Found]) -> list[tuple[int, int]]:
    """Set the kind of one message's pieces, and of adjacent tags that are rendered verbatim.

    Return the (start, end) span of every piece. If such tags precede the first piece or follow the
    last one, also return an empty span at the outer end of these tags.
    """
    places = [(start, end) for _, start, end in mine]
    for (piece, start, end), after in itertools.zip_longest(mine, mine[1:]):
        kind[start:end] = role
        i = piece.place
        if (piece, start, end) == mine[0]:
            lead = "".join(p.text for p in parts[:i])
            if lead and text.endswith(lead, 0, start):
                first = start - len(lead)
                kind[first:start] = role
                places.insert(0, (first, first))
        if after is None:
            tail = "".join(p.text for p in parts[i + 1 :])
            if tail and text.startswith(tail, end):
                last = end + len(tail)
                kind[end:last] = role
                places.append((last, last))
        elif text[end : after[1]] == "".join(p.text for p in parts[i + 1 : after[0].place]):
            kind[end : after[1]] = role
    return places


def _turns(template: Template, twin: list[dict[str, str]], marks: dict[str, _Piece],
           skeleton: str, text: str, found: list[_Found], reply: bool, n: int) -> np.ndarray:
    """Return the message index of every character."""
    # in the twin, a merged system message is part of the user message
    places = {piece.owner: m for m, message in enumerate(twin)
              for piece in (marks[c] for c in message["content"] if c in marks)}
    closings = _closings(template, twin, marks, places)
    longest = sorted(set(closings.values()), key=len, reverse=True)
    turn = np.zeros(len(text), np.int32)
    at = 0
    for (piece, _, end), after in itertools.zip_longest(found, found[1:]):
        turn[at:end] = piece.owner
        at = end
        if after and after[0].owner != piece.owner:
            known = [closings.get(_manner(twin, places[piece.owner]), ""), *longest]
            at += len(next((c for c in known if c and text.startswith(c, end, after[1])), ""))
            turn[end:at] = piece.owner
    turn[at:] = n - 1
    if reply and not template.base:
        closed = template(twin, False)
        coming = len(skeleton) - len(closed) if skeleton.startswith(closed) else 0
        turn[max(at, len(text) - coming) if coming else at :] = n  # all the rest if `coming` is 0
    return turn


def _manner(twin: list[dict[str, str]], m: int) -> tuple[Any, ...]:
    """Return the properties of message `m` on which its closing text can depend."""
    content = twin[m]["content"]
    return (twin[m]["role"], bool(content), tuple(sorted(set(TAGS.findall(content)))),
            m == 0 or twin[m - 1]["role"])


def _closings(template: Template, twin: list[dict[str, str]],
              marks: dict[str, _Piece], places: dict[int, int]) -> dict[tuple[Any, ...], str]:
    """Return the closing text by `_manner`: the text after the content of a final message.

    At most two messages per key, and `_EXAMPLES` in total, are rendered. The second text replaces
    the first, because templates may treat the first message of a conversation as a special case.
    """
    seen: dict[tuple[Any, ...], int] = {}
    out: dict[tuple[Any, ...], str] = {}
    looked = 0
    for m in range(len(twin)):
        manner = _manner(twin, m)
        seen[manner] = seen.get(manner, 0) + 1
        if seen[manner] > 2 or looked == _EXAMPLES:
            continue
        looked += 1
        try:
            alone = template(twin[: m + 1], False)
        except Refused:  # some templates reject conversations that end with this message
            continue
        if at := [i for i, char in enumerate(alone) if char in marks]:
            last = places[marks[alone[at[-1]]].owner]
            out[_manner(twin, last)] = alone[at[-1] + 1 :]
    return out


def _mark_thinking(text: str, kind: np.ndarray, turn: np.ndarray, messages: list[dict[str, str]],
                   spans: dict[int, list[tuple[int, int]]]) -> None:
    """Mark the thinking blocks of assistant messages and of the generation prompt."""
    if OPEN not in text and CLOSE not in text:
        return
    begins = np.full(len(messages) + 1, -1)
    begins[turn[::-1]] = np.arange(len(text))[::-1]  # reversed to keep each turn's first index
    ends = np.full(len(messages) + 1, -1)
    ends[turn] = np.arange(len(text))
    for i in range(len(messages) + 1):
        if begins[i] < 0 or (i < len(messages) and messages[i]["role"] != "assistant"):
            continue
        content = spans.get(i, [])
        low, high = int(begins[i]), int(ends[i]) + 1
        begin: int | None = None
        blocks: list[tuple[int, int, int]] = []  # start, end, end of the inner text
        for tag in re.finditer(f"{OPEN}|{CLOSE}", text[low:high]):
            start, end = low + tag.start(), low + tag.end()
            if tag[0] == OPEN:
                begin = start if begin is None else begin
                continue
            if begin is None:  # without an opening tag, the generation prompt opened the block
                begin = start if blocks or not content else min(content[0][0], start)
            blocks.append((begin, end, start))
            begin = None
        if begin is not None:
            end = content[-1][1] if content and content[-1][1] > begin else high
            blocks.append((begin, end, end))
        starts = [start for start, _ in content]
        for begin, end, inner in blocks:
            # `starts` is sorted; `one` indexes the first span that starts in or after the block
            one = bisect.bisect_left(starts, begin)
            own = one < len(content) and content[one][1] <= inner
            own = own or bool((kind[begin:end] & ASSISTANT).any())  # or the block has content
            kind[begin:end] = (ASSISTANT if own else TEMPLATE) | THINKING


def _mark_code(text: str, kind: np.ndarray, turn: np.ndarray) -> None:
    """Mark fenced code, including its fences, in every contiguous run of content."""
    if "```" not in text and "~~~" not in text:
        return
    cuts = np.flatnonzero((np.diff(kind) != 0) | (np.diff(turn) != 0)) + 1
    for start, end in itertools.pairwise([0, *cuts.tolist(), len(text)]):
        if not kind[start] & TEMPLATE:
            for low, high in fences(text[start:end]):
                kind[start + low : start + high] |= CODE


def fences(text: str) -> list[tuple[int, int]]:
    """Return (start, end) of each fenced code block; an unclosed block ends with the text."""
    out: list[tuple[int, int]] = []
    fence, begin = "", 0
    for line in FENCE.finditer(text):
        run, info = line[1], line[2]
        if not fence and not (run[0] == "`" and "`" in info):
            fence, begin = run, line.start()
        elif fence and run.startswith(fence) and not info.strip():
            out.append((begin, line.end()))
            fence = ""
    return [*out, (begin, len(text))] if fence else out
