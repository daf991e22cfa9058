"""A progress bar with the time left, for work of more than a few seconds."""

import contextlib
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.progress

QUIET_SECONDS = 2.0  # work that is done sooner shows nothing


@contextlib.contextmanager
def bar(wanted: bool) -> Iterator[Callable[[int, int, str], None]]:
    """Gives `show(done, total, text)`. Writes to stderr, so that stdout stays what the program says."""
    if not wanted:
        yield lambda done, total, text: None
        return
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True), transient=True) as progress:
        task, shown, since = None, None, time.perf_counter()

        def show(done: int, total: int, text: str):
            nonlocal task, shown, since
            if text != shown:
                if task is not None:
                    progress.remove_task(task)
                task, shown, since = None, text, time.perf_counter()
            if task is None and time.perf_counter() - since > QUIET_SECONDS:
                task = progress.add_task(text, total=total)
            if task is not None:
                progress.update(task, completed=done, total=total)

        yield show
