"""What a person sees while a sweep runs."""

import rich.progress


class Progress:
    """A line with cells done, cells diverged, cells per second and the time left; silent if not `enabled`."""

    def __init__(self, total: int, *, enabled: bool):
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=12),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("cells, {task.fields[diverged]} diverged, {task.fields[speed]}"),
            rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
            disable=not enabled,
        )
        self._task = self._bar.add_task("training", total=total, diverged=0, speed="compiling")
        self._diverged = 0

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *exception):
        self._bar.stop()

    def advance(self, model: str, cells: int, diverged: int) -> None:
        """Counts a chunk of `cells`, `diverged` of them, of the model of that name."""
        self._diverged += diverged
        speed = self._bar.tasks[0].speed
        self._bar.update(
            self._task,
            advance=cells,
            description=f"training {model}".rstrip(),
            diverged=self._diverged,
            speed=f"{speed:.3g} cells/s" if speed else "",
        )
