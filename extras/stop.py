"""Ctrl-C in the middle of a run."""

import contextlib
import signal
import sys


class StopSignal:
    """Let a step end after the first Ctrl-C or SIGTERM, which sets `requested`.

    The second one stops at once.
    """

    def __enter__(self):
        self.requested = False
        self.handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # only the main thread may
                self.handlers[number] = signal.signal(number, self.request)
        return self

    def request(self, number, frame):
        """Handle the signal."""
        if self.requested:
            raise KeyboardInterrupt("at once")
        self.requested = True
        print("stopping after this step (again: at once)", file=sys.stderr, flush=True)

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
