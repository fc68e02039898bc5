"""Which rollouts of a role keep their response means: a seeded sample, stratified by prompt.

Every rollout has a random rank that depends on the seed, the role and the rollout alone. A prompt's
rollouts of lowest rank are kept, as many of each prompt as possible. The sample therefore does not
depend on the order in which rollouts finish, and the sample of more questions is contained in the
sample of the first ones and the further rollouts.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping

from jaxpersona.errors import UserError

KEEP = 16


def check_keep(keep: int | None) -> None:
    """Check the number of kept means per role; None keeps all.

    Raises:
      UserError: it is no integer of at least 2.
    """
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 2):
        raise UserError(f"keep_means is {keep!r}; give at least 2 for each role, or all (None)")


def chosen(prompts: Mapping[str, int], keep: int | None, *, seed: int, role: str) -> list[str]:
    """Return the keys of the rollouts to keep, in the order of `prompts`.

    Args:
      prompts: key of each rollout → index of its prompt.
      keep: the number to keep; None: all.
      seed: seed of the sample.
      role: name of the role.
    """
    if keep is None or len(prompts) <= keep:
        return list(prompts)
    strata: dict[int, list[str]] = defaultdict(list)
    for key, prompt in prompts.items():
        strata[prompt].append(key)
    for keys in strata.values():
        keys.sort(key=lambda key: _rank(seed, role, key))
    kept: set[str] = set()
    depth = 0
    while len(kept) < keep:  # the lowest of each prompt, then the second of each prompt, …
        for prompt in sorted(strata, key=lambda p: _rank(seed, role, f"prompt {p}")):
            if depth < len(strata[prompt]) and len(kept) < keep:
                kept.add(strata[prompt][depth])
        depth += 1
    return [key for key in prompts if key in kept]


def _rank(seed: int, role: str, key: str) -> bytes:
    return hashlib.sha256(f"{seed}/{role}/{key}".encode("utf-8", "surrogatepass")).digest()
