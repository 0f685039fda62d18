"""The progress of a sweep, on standard error."""

import time

import rich.console
import rich.progress

LINE_SECONDS = 60  # between lines where there is no terminal
NOTEBOOK_SECONDS = 0.5  # between changes of the line in a notebook


class Progress(rich.progress.Progress):
    """Shows what is compiled, cells done, cells diverged, cells per second and the time left; silent if not `enabled`.

    On a terminal and in a notebook one line that is kept up to date; elsewhere a line for each network that is
    compiled, one a minute, and one at the end.
    """

    def __init__(self, *, enabled: bool):
        console = rich.console.Console(stderr=True)
        self._lines = enabled and not console.is_terminal
        super().__init__(
            rich.progress.BarColumn(bar_width=10),
            rich.progress.TextColumn("{task.fields[cells]}"),
            rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
            rich.progress.TextColumn("{task.fields[left]}{task.fields[note]}"),
            console=console,
            disable=not enabled or self._lines,
            transient=True,  # until a cell is trained: results that stand leave no line
        )
        self.add_task("", total=None, cells="", left="", note="reading the networks ...")
        self._said, self._done_before, self._diverged = set(), 0, 0
        self._in_notebook = None  # the line there
        self._start = self._last_line = time.monotonic()

    def compiling(self, model: str) -> None:
        """Says that the model of that name is being compiled."""
        note = f"compiling {model or 'the network'} ..."
        self.update(self.tasks[0].id, note=note, refresh=True)
        if self._lines and note not in self._said:
            self._say(note)
        self._said.add(note)

    def begin(self, total: int, done: int) -> None:
        """The number of cells, and of those that are done already; the clock starts."""
        self.update(self.tasks[0].id, total=total, completed=done, cells=f"{done}/{total} cells,", left="left, ")
        self._done_before, self._start = done, time.monotonic()
        self._last_line = self._start

    def count(self, model: str, cells: int, diverged: int) -> None:
        """Counts `cells` more, `diverged` of them, of the model of that name."""
        (task,), self._diverged = self.tasks, self._diverged + diverged
        done, seconds = task.completed + cells, time.monotonic() - self._start
        speed = (done - self._done_before) / seconds
        note = f"{speed:.3g}/s, {self._diverged} diverged"
        name = f" ({model})" if model else ""
        self.live.transient = False
        self.update(
            task.id,
            completed=done,
            cells=f"{done:.0f}/{task.total:.0f} cells,",
            left="left, " if done < task.total else "in all, ",
            note=note + name,
        )
        pause = NOTEBOOK_SECONDS if self.console.is_jupyter else LINE_SECONDS
        if self._lines and (done == task.total or time.monotonic() - self._last_line > pause):
            self._last_line, left = time.monotonic(), (task.total - done) / speed
            line = f"{done:.0f}/{task.total:.0f} cells, {note}, {seconds:.0f} s so far, {left:.0f} s left{name}"
            self._say(line)

    def _say(self, line):
        if not self.console.is_jupyter:
            self.console.print(line, soft_wrap=True, highlight=False)
        elif self._in_notebook is None:
            from IPython.display import display  # which is there

            self._in_notebook = display({"text/plain": line}, raw=True, display_id=True)
        else:
            self._in_notebook.update({"text/plain": line}, raw=True)
