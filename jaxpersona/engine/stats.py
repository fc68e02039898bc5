"""Counters of a run: decode steps, live rows and prompt tokens."""

from __future__ import annotations

import dataclasses
import threading

from jaxpersona.brief import count, line


@dataclasses.dataclass(frozen=True)
class RunStats:
    """The numbers of decode steps, live rows and prompt tokens of a run.

    Attributes:
      steps: the number of decode steps.
      row_steps: the number of rows B, summed over the decode steps.
      live_steps: the number of live rows, summed over the decode steps. In each step, one token of
        a live row's reply is passed through the model.
      prompt_tokens: the number of prompt tokens that were prefilled; a shared prefix counts only
        when it is prefilled.
      padded_tokens: the number of token positions in the prefill calls, including padding and empty
        rows.

    Examples:
      >>> import jaxpersona as jp
      >>> stats = jp.generate(jp.load("mini"), ["Who are you?"], max_new_tokens=2).stats
      >>> stats.steps, stats.live_steps, stats.utilisation
      (2, 2, 0.03125)
    """

    steps: int = 0
    row_steps: int = 0
    live_steps: int = 0
    prompt_tokens: int = 0
    padded_tokens: int = 0

    @property
    def utilisation(self) -> float:
        """`live_steps` / `row_steps`, the fraction of live rows; NaN if there were no steps."""
        return self.live_steps / self.row_steps if self.row_steps else float("nan")

    @property
    def prefill_efficiency(self) -> float:
        """`prompt_tokens` / `padded_tokens`; NaN if nothing was prefilled."""
        return self.prompt_tokens / self.padded_tokens if self.padded_tokens else float("nan")

    def __repr__(self) -> str:
        return line("RunStats", count(self.steps, "decode step"),
                    f"utilisation {self.utilisation:.3f}",
                    f"prefill efficiency {self.prefill_efficiency:.3f}")


class Stats:
    """A thread-safe counter that accumulates the `RunStats` of lanes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = RunStats()

    def decoded(self, steps: int, rows: int, live: int) -> None:
        """Add decode steps to the counts.

        Args:
          steps: the number of decode steps.
          rows: the number of rows B.
          live: the number of live rows, summed over the steps.
        """
        self._add(steps=steps, row_steps=steps * rows, live_steps=live)

    def prefilled(self, tokens: int, padded: int) -> None:
        """Add a prefill call to the counts.

        Args:
          tokens: the number of prompt tokens.
          padded: the number of token positions, including padding and empty rows.
        """
        self._add(prompt_tokens=tokens, padded_tokens=padded)

    def snapshot(self) -> RunStats:
        """Return the counts so far."""
        with self._lock:
            return self._counts

    def _add(self, **more: int) -> None:
        with self._lock:
            self._counts = dataclasses.replace(self._counts, **{
                name: getattr(self._counts, name) + value for name, value in more.items()})
