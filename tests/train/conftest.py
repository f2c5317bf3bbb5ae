"""Signals as a terminal has them: where the tests run in the background, or under `nohup`, some are ignored."""

import signal

import pytest


@pytest.fixture(autouse=True)
def _signals_are_heard():
    """In this process and in those that it starts, which inherit what is ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if hasattr(signal, "SIGHUP"):
        usual[signal.SIGHUP] = signal.SIG_DFL
    before = {signum: signal.signal(signum, handler) for signum, handler in usual.items()}
    yield
    for signum, handler in before.items():
        signal.signal(signum, signal.SIG_DFL if handler is None else handler)
