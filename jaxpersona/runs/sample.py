"""Choose the rollouts whose response means are stored: a seeded, stratified sample per role.

The sample is stratified by prompt: as far as possible, it contains the same number of rollouts of
each prompt. Every rollout has a random rank that depends only on the seed, the role and the
rollout, and for each prompt, the rollouts with the lowest ranks are chosen. The sample therefore
does not depend on the order in which the rollouts finish. After questions are added, the new sample
consists of new rollouts and of rollouts from the previous sample.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping

from jaxpersona.brief import shown
from jaxpersona.errors import UserError

KEEP = 16


def check_keep(keep: int | None) -> None:
    """Check the number of response means to store per role; None stores all.

    Raises:
      UserError: `keep` is neither None nor an integer of at least 2.
    """
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 2):
        raise UserError(f"keep_means is {shown(keep)}; give an integer of at least 2, or None for "
                        "all")


def chosen(prompts: Mapping[str, int], keep: int | None, *, seed: int, role: str) -> list[str]:
    """Return the keys of the chosen rollouts, in the order of `prompts`.

    Args:
      prompts: key of each rollout → index of its prompt.
      keep: the maximum number of rollouts to choose, or None for all.
      seed: the seed of the sample.
      role: the name of the role.
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
    while len(kept) < keep:  # add each prompt's lowest-ranked rollout, then its second-lowest, …
        for prompt in sorted(strata, key=lambda p: _rank(seed, role, f"prompt {p}")):
            if depth < len(strata[prompt]) and len(kept) < keep:
                kept.add(strata[prompt][depth])
        depth += 1
    return [key for key in prompts if key in kept]


def _rank(seed: int, role: str, key: str) -> bytes:
    return hashlib.sha256(f"{seed}/{role}/{key}".encode("utf-8", "surrogatepass")).digest()
