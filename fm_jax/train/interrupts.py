"""SIGTERM, SIGHUP and Ctrl-C, put off until the running step is done."""

import contextlib
import signal
import threading
from collections.abc import Iterator

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


@contextlib.contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Collects SIGTERM, SIGHUP and SIGINT instead of stopping the process; a second Ctrl-C stops it at once.

    A signal that was ignored stays so, as SIGHUP under `nohup`.

    Yields:
        A list to which the number of every signal caught is appended. Outside the main thread, where Python
        allows no handlers, it stays empty.

    Raises:
        KeyboardInterrupt: from wherever the process is, on Ctrl-C after another signal.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def handler(signum: int, frame: object) -> None:
        if caught and signum == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(signum)

    heard = [signum for signum in SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, handler) for signum in heard}
    try:
        yield caught
    finally:
        for signum, old in before.items():
            # None stands for a handler that was not installed from Python, and cannot be put back.
            signal.signal(signum, signal.SIG_DFL if old is None else old)
