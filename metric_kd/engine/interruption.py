"""Ctrl-C and SIGTERM: noted at once, acted on where everything is saved."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from metric_kd import distributed


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, after everything was saved."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopRequest:
    """Whether somebody asked the run to stop.

    The first Ctrl-C or SIGTERM is noted, so that the step can be finished and saved; a second Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._nothing_to_lose = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within this context signals are noted; afterwards the earlier handlers are back."""
        try:
            previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: the caller's affair
            previous = {}
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    @contextmanager
    def nothing_to_lose(self) -> Iterator[None]:
        """Within this context, where everything is saved, a signal stops at once."""
        self.raise_if_made()
        self._nothing_to_lose = True
        try:
            yield
        finally:
            self._nothing_to_lose = False

    def made(self) -> bool:
        """Whether a signal came, to any process of the group; all of them must ask together."""
        return distributed.any_rank(bool(self.signum))

    def raise_if_made(self) -> None:
        """Stop here, where everything is saved."""
        if self.made():
            raise Interrupted(self.signum or signal.SIGTERM)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._nothing_to_lose:
            raise Interrupted(signum)
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
