"""SIGTERM, SIGHUP and Ctrl-C, put off until the running step is done."""

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator

import jax
from jax.experimental import multihost_utils

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

    def handler(signum: int, frame: object) -> None:
        if caught and signum == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(signum)

    with _handling(SIGNALS, handler):
        yield caught


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], int | None]]:
    """As `deferred_signals`, for the processes of a run together.

    Of several processes each hears of a signal that any one was sent, at the same call: JAX's preemption service tells
    them, which `jax.distributed.initialize` starts. It listens to SIGTERM, which the other signals are turned into.

    Yields:
        `asked()`, to be called after every step by every process: the signal to stop for, or `None`.
    """
    if jax.process_count() == 1:
        with deferred_signals() as caught:
            yield lambda: caught[0] if caught else None
        return
    calls, interrupted = itertools.count(1), False

    def asked() -> int | None:
        return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(next(calls)) else None

    def handler(signum: int, frame: object) -> None:
        nonlocal interrupted
        if interrupted and signum == signal.SIGINT:
            raise KeyboardInterrupt
        interrupted = True
        os.kill(os.getpid(), signal.SIGTERM)

    with _handling([each for each in SIGNALS if each != signal.SIGTERM], handler):
        yield asked


@contextlib.contextmanager
def _handling(signals: Iterable[int], handler: Callable[[int, object], None]) -> Iterator[None]:
    """Within the main thread; elsewhere Python allows no handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [signum for signum in signals if signal.getsignal(signum) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, handler) for signum in heard}
    try:
        yield
    finally:
        for signum, old in before.items():
            # None stands for a handler that was not installed from Python, and cannot be put back.
            signal.signal(signum, signal.SIG_DFL if old is None else old)
