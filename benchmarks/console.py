"""What the benchmark command prints: coloured by rich where it is installed, plain lines where it is not.

A machine lent for an hour with a GPU in it may have neither rich nor a network.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

try:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ImportError:
    Console = None

    def escape(text: str) -> str:
        """`text` as it is: plain output knows no markup beyond the styles of `MARKUP`."""
        return text


MARKUP = re.compile(r"\[/?(?:(?:bold|dim|red|green|yellow) ?)*\]")
Print = Callable[[str], None]


def printer() -> Print:
    """A function that prints a line of rich's markup."""
    if Console is None:
        return lambda text: print(MARKUP.sub("", text), flush=True)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    return lambda text: console.print(text, soft_wrap=True)


@contextmanager
def progress(total: int) -> Iterator[tuple[Print, Callable[[], None]]]:
    """(prints a line, counts one case done), with a bar below the lines on a terminal that rich draws on."""
    if Console is None:
        yield printer(), lambda: None
        return
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("measuring", total=total)
        yield lambda text: bar.console.print(text, soft_wrap=True), lambda: bar.advance(task)
