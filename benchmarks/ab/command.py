"""python -m benchmarks ab REV: the working tree against a revision, interleaved. docs/measuring.md explains it.

The exit status is 1 if a result of the new revision was wrong or failed, 2 if the comparison cannot run.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks import machine, results, suites
from benchmarks.ab import trees
from benchmarks.ab.compare import AbRow, Settings, decide, measure_case
from benchmarks.ab.paired import FASTER, MIN_CHANGE, SLOWER, WITHIN_NOISE, geometric_mean
from benchmarks.cases import MODES, TORCH_DTYPES, Case
from benchmarks.console import Print, escape, printer, progress
from benchmarks.load import MAX_BACKGROUND_LOAD
from benchmarks.run import Suite

SUITES = ("cpu", "quick", "grid", "random", "few_rows", "scaling")
ABOUT = ("device", "cpu", "cpu_capability", "cores", "threads", "torch", "python", "date")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks ab",
        description="Time a revision and the working tree, interleaved, and give the ratio old / new of every case.",
    )
    parser.add_argument("revision", metavar="REV", help="the old revision: anything git names a commit by")
    parser.add_argument("--new", metavar="REV", help="the new revision; the working tree otherwise")
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=["cpu"])
    parser.add_argument("--filter", nargs="+", default=[""], metavar="TEXT", help="only cases whose name contains one")
    parser.add_argument("--dtype", choices=TORCH_DTYPES, default="", help="only cases of this dtype")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; torch's default otherwise")
    parser.add_argument(
        "--budget", type=float, default=Settings.budget, metavar="S", help="seconds per case and mode (%(default)g)"
    )
    parser.add_argument(
        "--launches",
        type=int,
        default=Settings.launches,
        metavar="N",
        help="pairs of new processes per case, at least 2 (%(default)s)",
    )
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: CPU time instead of wall time, with --threads 1; other processes disturb it less",
    )
    parser.add_argument(
        "--min-change",
        type=float,
        default=MIN_CHANGE,
        metavar="X",
        help="smallest change called outside noise, as a fraction (%(default)g)",
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=0.0,
        metavar="S",
        help="max seconds a launch may wait for an idle machine",
    )
    parser.add_argument("--seconds", type=float, metavar="S", help="start no case later than this")
    parser.add_argument("--output", type=Path, metavar="FILE", help="CSV to write, whole after every case")
    options = parser.parse_args(arguments)
    if options.launches < 2:
        parser.error(f"--launches must be at least 2, got {options.launches}")
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu requires --threads 1: with more, CPU time counts threads that wait for each other")
    return options


def line(row: AbRow) -> str:
    """Format one comparison in the console's markup."""
    if row.ratio is None:
        return f"    {row.mode:<8}[bold red]{escape(row.status)}[/]"
    text = f"    {row.mode:<8}old {row.old_p50_ms:9.3f} ms  new {row.new_p50_ms:9.3f} ms"
    text += f"  {row.ratio:.3f}x  ({row.ratio_low:.3f} .. {row.ratio_high:.3f}, "
    text += f"{row.launches} x {row.rounds} x {row.calls})"
    if row.others_cpu is not None and row.others_cpu > MAX_BACKGROUND_LOAD:
        text += f"  [bold red]background load {row.others_cpu:.0%}[/]"
    if row.old_backend != row.new_backend:
        text += f"  [yellow]{row.old_backend} -> {row.new_backend}[/]"
    return text


def summary(rows: list[AbRow], typical: float) -> list[str]:
    """Geometric means and minima per suite and mode, then the cases outside noise."""
    lines = []
    for suite in dict.fromkeys(row.suite for row in rows):
        for mode in MODES:
            timed = [row for row in rows if (row.suite, row.mode) == (suite, mode) and row.ratio]
            if timed:
                lowest = min(timed, key=lambda row: row.ratio or 0.0)
                mean = geometric_mean([row.ratio for row in timed if row.ratio])
                lines.append(
                    f"{suite}, {mode}: geometric mean {mean:.3f}x over {len(timed)} cases, "
                    f"min {lowest.ratio:.3f}x ({lowest.case})"
                )
    measured = [row for row in rows if row.noise is not None]
    if measured:
        noise = [row.noise for row in measured if row.noise is not None]
        lines.append(
            f"spread of a launch {typical:.1%} (typical standard deviation); "
            f"changes up to {min(noise):.1%} .. {max(noise):.1%}, by the case, are within noise"
        )
    for verdict, colour in ((SLOWER, "red"), (FASTER, "green")):
        outside = sorted((row for row in measured if row.verdict == verdict), key=lambda row: row.ratio or 0.0)
        lines += [
            f"[{colour}]{verdict}[/]: {row.case}, {row.mode}: {row.ratio:.3f}x "
            f"({row.ratio_low:.3f} .. {row.ratio_high:.3f}; noise {row.noise:.1%})"
            for row in outside
        ]
    if measured and all(row.verdict == WITHIN_NOISE for row in measured):
        lines.append("no case is outside noise")
    loaded = sum(row.others_cpu is not None and row.others_cpu > MAX_BACKGROUND_LOAD for row in rows)
    if loaded:
        lines.append(f"{loaded} rows have a background load above {MAX_BACKGROUND_LOAD:.0%}")
    return lines


def select(options: argparse.Namespace) -> list[tuple[Suite, Case]]:
    """The cases to run, those of `suites.suite_of`."""
    return [
        (suite, case)
        for suite in map(suites.suite_of, dict.fromkeys(options.suite))
        for case in suite.cases
        if any(text in case.name for text in options.filter) and options.dtype in ("", case.dtype)
    ]


def find_trees(options: argparse.Namespace, say: Print) -> dict[str, trees.Tree]:
    """Both trees, built, with a warning about what may make a comparison misleading. Raises TreeError."""
    revisions = [options.revision, *([options.new] if options.new else [])]
    for revision in revisions:
        trees.resolve(revision)  # before anything is built
    old, *rest = (trees.built(revision, say) for revision in revisions)
    new = rest[0] if rest else trees.working_tree()
    say(f"old: {old.commit} ({escape(options.revision)})")
    say(f"new: {new.commit} ({escape(options.new) if options.new else 'the working tree'})")
    if new.commit.endswith("-dirty"):
        say("[yellow]the working tree has uncommitted changes: its times are not those of a commit[/]")
    stale = trees.stale_extension(new.path)
    if stale:
        say(f"[yellow]new: {escape(stale)}: build it (make env), or its old kernels are timed[/]")
    return {"old": old, "new": new}


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    say = printer()
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = Settings(
        threads=torch.get_num_threads(),
        budget=options.budget,
        launches=options.launches,
        wait=options.wait,
        clock=options.clock,
        min_change=options.min_change,
    )
    try:
        sides = find_trees(options, say)
    except trees.TreeError as error:
        say(f"[red]{escape(str(error))}[/]")
        return 2
    about = machine.describe("cpu")
    cases = select(options)
    say(
        f"suite {', '.join(options.suite)}: {len(cases)} cases on {about['device']}, {settings.threads} threads, "
        f"torch {about['torch']}; {settings.launches} launches, {settings.budget:g} s per case and mode, "
        f"{settings.clock} time"
    )
    rows: list[AbRow] = []
    until = float("inf") if options.seconds is None else time.monotonic() + options.seconds
    typical, left = 0.0, len(cases)
    with progress(len(cases)) as (tell, advance):
        for suite, case in cases:
            if time.monotonic() > until:
                break
            new_rows = measure_case(suite, case, sides, settings)
            left -= 1
            for row in new_rows:
                for column in ABOUT:
                    setattr(row, column, about[column])
            rows += new_rows
            typical = decide(rows, settings.min_change)
            if options.output:
                results.write(rows, options.output, AbRow)
            tell(f"[bold]{escape(case.name)}[/]")
            for row in new_rows:
                tell(line(row))
            advance()
    for text in summary(rows, typical):
        say(text)
    if left:
        say(f"{left} cases are left, for lack of time")
    if options.output:
        say(f"wrote {options.output.name}")
    refused = [row for row in rows if row.status != "ok"]
    for row in refused:
        say(f"[bold red]{escape(f'{row.case}, {row.mode}: {row.status}')}[/]")
    return 1 if any(row.status.startswith(("refused: new", "failed: new")) for row in refused) else 0
