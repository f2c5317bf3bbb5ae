"""What a person watching a run sees."""

import datetime
import sys


class Progress:
    """A bar on a terminal, plain lines elsewhere, or nothing.

    Args:
        start: step that the run begins at.
        total: step that it ends at.
        show: `None` for a bar where standard output is a terminal and lines elsewhere; `False` for nothing.
    """

    def __init__(self, start: int, total: int, show: bool | None = None):
        self._total = total
        self._lines = show is not False
        self._bar = None
        if self._lines and sys.stdout.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(initial=start, total=total, unit="step", file=sys.stdout, dynamic_ncols=True)

    def update(self, step: int, loss: float, images_per_second: float | None, seconds_left: float | None) -> None:
        """Shows a step."""
        rate = None if images_per_second is None else f"{images_per_second:,.0f} examples/s"
        if self._bar is not None:
            # The bar shows the time left itself.
            self._bar.set_postfix_str(f"loss {loss:.4f}" + (f", {rate}" if rate else ""), refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._lines:
            parts = [f"step {step}/{self._total}", f"loss {loss:.4f}"]
            if rate is not None and seconds_left is not None:
                parts += [rate, f"{_duration(seconds_left)} left"]
            print("  ".join(parts), flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    days = seconds / 86400
    return f"{days:,.0f} days" if not days < 1000 else str(datetime.timedelta(seconds=round(seconds)))
