"""A progress bar over the passes of a profile, on a terminal only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


@contextmanager
def passes(names: Sequence[str], *, enabled: bool = True) -> Iterator[Callable[[str], None]]:
    """Yields what is to be told the name of each pass as it begins."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:>9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not (enabled and console.is_terminal)) as progress:
        task = progress.add_task("", total=len(names))

        def told(name: str) -> None:
            progress.update(task, description=name, completed=names.index(name))

        yield told
