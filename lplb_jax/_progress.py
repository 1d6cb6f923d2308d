"""A progress bar for long computations, in one line of the terminal."""

from __future__ import annotations

import sys
import time

_PATIENCE_S, _WIDTH = 2.0, 40


class Bar:
    """Call it with the completed fraction; it appears after two seconds if stderr is a terminal.

    >>> from lplb_jax._progress import Bar
    >>> bar = Bar("placing")
    >>> bar(0.5)
    >>> bar.close()
    """

    def __init__(self, text: str) -> None:
        self._text, self._start, self._shown = text, time.monotonic(), False

    def __call__(self, share: float) -> None:
        if time.monotonic() - self._start < _PATIENCE_S or not sys.stderr.isatty():
            return
        done = round(share * _WIDTH)
        bar = "█" * done + "·" * (_WIDTH - done)
        print(f"\r\x1b[K{self._text} {bar} {share:4.0%}", end="", file=sys.stderr, flush=True)
        self._shown = True

    def close(self) -> None:
        """Erases the bar."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
