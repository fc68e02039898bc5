"""Check the inputs of a run, to find errors before hours of generation.

`check_texts` needs no model, so a command can call it before loading the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxpersona.brief import count, named
from jaxpersona.data.texts import DEFAULT, Question, Role, all_of
from jaxpersona.engine.sampling import sampling
from jaxpersona.errors import UserError
from jaxpersona.runs.manifest import tokens_digest
from jaxpersona.runs.names import check_names
from jaxpersona.runs.rollouts import Settings, opening
from jaxpersona.text import chat

if TYPE_CHECKING:
    from jaxpersona.models.model import Model

_PROBE = "Who are you?"  # the fixed question for the digest of a role's prompts


def check_texts(roles: Sequence[Role], questions: Sequence[Question], settings: Settings, *,
                min_count: int, held_out: Sequence[str], judge: object,
                ) -> tuple[list[Role], list[Question], list[str]]:
    """Check the roles, questions and settings of a run.

    Args:
      roles: the roles, one of them named "default".
      questions: the questions.
      settings: the sampling settings of the rollouts.
      min_count: the number of rollouts with score 3 that a role needs to be included in the axis.
      held_out: names of roles that are not included in the axis.
      judge: the judge, or an object whose attribute `reads_eval_prompt` is true if the judge needs
        the `eval_prompt` of every role; a missing attribute counts as false.

    Returns:
      (roles, questions, held_out) as lists.

    Raises:
      UserError: an argument has the wrong type, a setting is out of range, `min_count` is not
        positive, "default" is missing or held out, a name in `held_out` is unknown, a role name is
        given twice or not valid as a file name, a prompt is blank (except "" in the default role),
        there is no question, two questions have the same id, the judge needs an `eval_prompt` that
        a role lacks, or the roles or rollouts are too few for an axis.
    """
    roles, questions = all_of(Role, roles, "roles"), all_of(Question, questions, "questions")
    if isinstance(held_out, str):
        raise UserError(f"held_out is one string ({held_out!r}); give a list of role names")
    held_out = list(held_out)
    names = [role.name for role in roles]
    check_names(names)
    unknown = sorted(set(held_out) - set(names))
    if DEFAULT not in names or unknown or DEFAULT in held_out:
        raise UserError(
            f"held_out contains unknown roles {unknown}; give names from roles" if unknown else
            "roles must contain a role named 'default', and held_out must not contain it"
        )
    blank = [(role.name, i) for role in roles for i, prompt in enumerate(role.prompts)
             if not prompt.strip() and (prompt or role.name != DEFAULT)]
    if blank:
        raise UserError(f"prompt {blank[0][1]} of role {blank[0][0]!r} is blank; only the default "
                        'role can have no system prompt, as ""')
    sampling(1, temperature=settings.temperature, top_p=settings.top_p, seed=settings.seed)
    if min_count < 1:
        raise UserError(f"min_count is {min_count}; it must be positive")
    if not questions:
        raise UserError("questions is empty; give at least one question")
    twice = [i for i, n in Counter(question.id for question in questions).items() if n > 1]
    if twice:
        raise UserError(f"question id {twice[0]} is given more than once; ids identify rollouts: "
                        "give every question a unique id")
    most = sorted(total for name, total in rollouts_of(roles, questions, settings).items()
                  if name not in (DEFAULT, *held_out))[-2:]
    if most and min_count > most[0]:
        raise UserError(f"min_count is {min_count}; the axis needs at least two roles with that "
                        "many rollouts; with these prompts, questions and samples, min_count can "
                        f"be at most {most[0]}: lower min_count or add questions")
    if (left := len(roles) - 1 - len(held_out)) < 2:
        raise UserError(f"roles has {count(left, 'role')} besides the default persona and the "
                        "held-out roles; the axis needs at least two")
    if getattr(judge, "reads_eval_prompt", False) and (bare := [
            role.name for role in roles if role.name != DEFAULT and not role.eval_prompt]):
        raise UserError(f"the judge needs an eval_prompt, missing for {named(bare, 'role')}; add "
                        "one to each, give one rubric for all roles (--judge-rubric), or use the "
                        "judge 'none'")
    return roles, questions, held_out


def check_redo(redo: Sequence[str], roles: Sequence[Role]) -> None:
    """Check that `redo` contains only names of roles.

    Raises:
      UserError: a name is unknown.
    """
    names = [role.name for role in roles]
    if unknown := sorted(set(redo) - set(names)):
        raise UserError(f"redo contains unknown roles {unknown}; the roles are {names[:8]}"
                        + (" …" if len(names) > 8 else ""))


def rollouts_of(roles: Sequence[Role], questions: Sequence[Question],
                settings: Settings) -> dict[str, int]:
    """Return the number of rollouts of each role in a run."""
    return {role.name: len(role.prompts) * len(questions) * settings.samples for role in roles}


def check_prompts(model: Model, roles: Sequence[Role], questions: Sequence[Question],
                  ) -> dict[str, str]:
    """Check that prompts and questions leave room for a reply, and return digests of their tokens.

    To check the lengths against the model's context, each prompt is tokenized with the question
    that has the most characters, and each question with the prompt that has the most characters.

    Returns:
      "role NAME" → digest of the tokens of the role's prompts with a fixed question, and "question
      ID" → digest of the tokens of the question without a system prompt.

    Raises:
      UserError: a prompt with a question fills the context, or the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise UserError(f"{model.name} has no tokenizer; role prompts need one")
    context = model.config.max_context

    def row(prompt: str, question: str) -> chat.Row:
        found = chat.encode_row(model.tokenizer, opening(prompt, question))
        size = found.tokens.size
        if size >= context:
            raise UserError(f"the prompt {prompt[:40]!r} with the question {question[:40]!r} has "
                            f"{size} tokens; prompt and reply must fit into the context "
                            f"length of {context} tokens: shorten the prompt or the question")
        return found

    longest = max(questions, key=lambda q: len(q.text)).text
    most = max((prompt for role in roles for prompt in role.prompts), key=len)
    digests = {}
    for role in roles:
        for prompt in role.prompts:
            row(prompt, longest)
        digests[f"role {role.name}"] = tokens_digest([row(p, _PROBE) for p in role.prompts])
    for question in questions:
        row(most, question.text)
        digests[f"question {question.id}"] = tokens_digest([row("", question.text)])
    return digests


def base_notice(model: Model) -> str | None:
    """Return a warning if a model has no chat template, else None."""
    if model.template:
        return None
    return (f"{model.name} has no chat template, so it is probably a base model: system prompts "
            "and questions are joined into plain text, and replies may ignore the role. If "
            "possible, use the instruction-tuned model")
