"""How many steps fit into the time that there is."""

import time
from collections.abc import Callable

MARGIN = 1.03  # steps may be slower than they were; and smaller changes of plan are not worth it
GUESSED_PAUSE = 5.0  # seconds that an evaluation takes, until one did


class Pacer:
    """Times steps, and evaluations apart from them, over all processes of a run.

    The first interval after a start compiles, and says nothing about those to come.
    """

    def __init__(
        self, done: int, spent: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Args:
            done: steps before this process.
            spent: seconds before this process.
            clock: in seconds.
        """
        self._clock, self._spent, self._began = clock, spent, clock()
        self._since, self._last, self._paused = clock(), done, 0.0
        self._steps, self._seconds, self._first = 0, 0.0, True
        self.pause = GUESSED_PAUSE

    @property
    def used(self) -> float:
        """Seconds of the whole run."""
        return self._spent + self._clock() - self._began

    def paused(self, seconds: float) -> None:
        """Call it after an evaluation that took so long."""
        self._paused += seconds
        self.pause = seconds

    def interval(self, done: int) -> float:
        """Call it when so many steps are done. Seconds a step since the last call."""
        now = self._clock()
        steps, seconds = done - self._last, now - self._since - self._paused
        self._since, self._last, self._paused = now, done, 0.0
        if not self._first:
            self._steps, self._seconds = self._steps + steps, self._seconds + seconds
        self._first = False
        return seconds / max(steps, 1)

    def plan(self, done: int, total: int | None, seconds: float, evaluations: int) -> int | None:
        """The number of steps that takes `seconds` in all, with so many evaluations to come.

        `total`, the plan so far or None, if that still fits, or nothing was timed yet. Evaluations
        get half of what is left at most: their time is a guess at first.
        """
        if not self._steps:
            return total if self.used < seconds else done
        left = seconds - self.used
        left -= min(self.pause * evaluations, left / 2)
        fits = done + max(int(left / (self._seconds / self._steps * MARGIN)), 0)
        if total is not None and total / MARGIN <= fits <= total * MARGIN:
            return total
        return fits
