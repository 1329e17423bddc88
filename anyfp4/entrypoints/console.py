"""What every command shares: where messages go, progress bars, and how errors are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

#: answers go to stdout, everything else to stderr, so that output can be piped
stdout = Console()
stderr = Console(stderr=True)


@contextmanager
def byte_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that reports (bytes done, bytes in all); it disappears when done. Only on a terminal."""
    from rich.progress import DownloadColumn, TransferSpeedColumn  # noqa: PLC0415

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
    ) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def stage_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage of work that reports (stage, steps done, steps in all); a line each if not on a terminal."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=stderr,
        disable=not stderr.is_terminal,
    ) as bar:
        tasks: dict[str, TaskID] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
                if not stderr.is_terminal:
                    stderr.print(f"{stage} …", highlight=False)
            bar.update(tasks[stage], completed=done, total=total)

        yield update
