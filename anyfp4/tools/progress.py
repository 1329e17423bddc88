"""Progress bars of work that goes through stages: the demo's and the quantizer's."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn


class StageBars:
    """Progress bars, one per stage, that appear when their stage begins."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def update(self, stage: str, done: int, total: int) -> None:
        """Moves the bar of ``stage``."""
        if stage not in self._tasks:
            self._progress.start()  # does nothing the second time; without stages there is nothing to show
            self._tasks[stage] = self._progress.add_task(stage)
        self._progress.update(self._tasks[stage], completed=done, total=total)

    def __enter__(self) -> StageBars:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if not self._tasks:
            return
        if error is None:  # a stage that stops short of its total is done, too: tied embeddings load once
            for task in self._progress.tasks:
                self._progress.update(task.id, completed=task.total)
        self._progress.stop()
