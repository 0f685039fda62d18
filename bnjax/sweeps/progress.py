"""What a person sees while a sweep runs, on standard error."""

import time

import rich.console
import rich.progress

LINE_SECONDS = 60  # between lines where there is no terminal


class Progress:
    """Cells done, cells diverged, cells per second and the time left; silent if not `enabled`.

    On a terminal one line that is kept up to date; elsewhere a line a minute, and one at the end.
    """

    def __init__(self, total: int, *, done: int = 0, enabled: bool):
        console = rich.console.Console(stderr=True)
        self._lines = enabled and not console.is_terminal
        self._bar = rich.progress.Progress(
            rich.progress.BarColumn(bar_width=10),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("cells,"),
            rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
            rich.progress.TextColumn("{task.fields[left]}, {task.fields[note]}"),
            console=console,
            disable=not enabled or self._lines,
        )
        self._task = self._bar.add_task("", total=total, completed=done, left="left", note="compiling")
        self._done_before = done
        self._diverged = 0
        self._start = self._last_line = time.monotonic()

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *exception):
        self._bar.stop()

    def advance(self, model: str, cells: int, diverged: int) -> None:
        """Counts a chunk of `cells`, `diverged` of them, of the model of that name."""
        self._diverged += diverged
        name = f" ({model})" if model else ""
        task = self._bar.tasks[0]
        seconds = time.monotonic() - self._start
        speed = (task.completed + cells - self._done_before) / seconds
        self._bar.update(
            self._task,
            advance=cells,
            left="in all" if task.completed + cells >= task.total else "left",
            note=f"{speed:.3g}/s, {self._diverged} diverged{name}",
        )
        if self._lines and (task.finished or time.monotonic() - self._last_line > LINE_SECONDS):
            self._last_line = time.monotonic()
            left = (task.total - task.completed) / speed
            self._bar.console.print(
                f"{task.completed:.0f}/{task.total:.0f} cells, {speed:.3g}/s, {self._diverged} diverged, "
                f"{seconds:.0f} s so far, {left:.0f} s left{name}",
                soft_wrap=True,
                highlight=False,
            )
