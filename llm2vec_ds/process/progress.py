"""Progress of long work: a bar on a terminal, and a line now and then in a file, such as a job's log."""

from __future__ import annotations

import logging
import time

from tqdm import tqdm

log = logging.getLogger(__name__)

LINE_EVERY_S = 10


class Progress(tqdm):
    """Counts finished items and says how long the rest will take."""

    def __init__(
        self, what: str, unit: str, *, total: int | None = None, initial: int = 0, shown: bool = True
    ) -> None:
        """
        Args:
            what: the work, in a word or two.
            unit: what is counted, in the singular.
            total: number of items, if it is known.
            initial: items that an earlier process finished.
            shown: False shows nothing.
        """
        super().__init__(desc=what, unit=unit, total=total, initial=initial, disable=None if shown else True)
        self._line = f"{what}: %s {unit}s, %.0f a second%s"
        self._writes_lines = shown and self.disable
        self._initial = initial
        self._began_s = self._said_s = time.monotonic()

    def update(self, n: float | None = 1) -> bool | None:
        if not self._writes_lines:
            return super().update(n)
        self.n += n or 0
        now = time.monotonic()
        if now - self._said_s >= LINE_EVERY_S:
            self._said_s = now
            self._say(max(self.n - self._initial, 0) / (now - self._began_s))
        return None

    def _say(self, rate: float) -> None:
        if self.total is None:
            log.info(self._line, self.n, rate, "")
        else:
            left = tqdm.format_interval((self.total - self.n) / rate) if rate > 0 else "?"
            log.info(self._line, f"{self.n} of {self.total}", rate, f", {left} left")
