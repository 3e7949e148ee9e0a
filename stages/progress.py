"""Progress of long work on stderr: a bar on a terminal, a line now and then elsewhere, nothing when asked."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from stages.errors import shown

_LOG = logging.getLogger("svf")
# A log needs a sign of life, not a line per chunk.
_LINE_EVERY_S = 5.0

# What work tells of itself: a label, and the fraction done. A `Progress` is one.
Report = Callable[[str, float], None]


class Progress:
    """Call it with a label and the fraction done; use it as a context manager."""

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self._bar: Any = None
        self._task: Any = None
        self._label = ""
        self._last = self._since = time.monotonic()

    def __enter__(self) -> Progress:
        if self.enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress

            columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
            self._bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log_time()
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, label: str, fraction: float) -> None:
        """Say that the work called `label` is `fraction` (0 to 1) done."""
        label = shown(label)
        if label != self._label:
            self._log_time()
        if self._bar is not None:
            if label != self._label:
                if self._task is not None:
                    self._bar.remove_task(self._task)
                self._task = self._bar.add_task(label, total=1.0)
            self._bar.update(self._task, completed=fraction)
        elif self.enabled and time.monotonic() - self._last > _LINE_EVERY_S:
            print(f"svf: {label} {fraction:.0%}", file=sys.stderr, flush=True)
            self._last = time.monotonic()
        self._label = label

    def _log_time(self) -> None:
        """With --verbose: how long the work took that has just ended."""
        now = time.monotonic()
        if self._label:
            _LOG.info("%s: %.2f s", self._label, now - self._since)
        self._since = now

    def say(self, text: str) -> None:
        """A line for the person, on stderr."""
        if not self.enabled:
            return
        text = shown(text, limit=4000)
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(f"svf: {text}", file=sys.stderr, flush=True)
