"""Ctrl-C between two steps, never within one."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interruptible() -> Generator[threading.Event, None, None]:
    """Let the first Ctrl-C (or SIGTERM) finish the step; a second one interrupts at once.

    Yields:
        An event that the first one sets. In another thread than the main one signals are left
        alone.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
