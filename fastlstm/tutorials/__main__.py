"""python -m fastlstm.tutorials [name ...|all] [--impl fastlstm|torch|both] [--quick] [--plots DIR] [--device D] ...

Trains each tutorial, holds it against its quality bar, compares fastlstm with nn.LSTM from the same seed, and writes
plots. The exit status is 1 if a bar is missed, 2 if the command cannot run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from fastlstm.tutorials import plots
from fastlstm.tutorials.char_model import CharacterModel
from fastlstm.tutorials.common import (
    TRAJECTORY_BAR,
    TRAJECTORY_UPDATES,
    Check,
    History,
    Timing,
    Trajectory,
    Tutorial,
    backend,
    compare_trajectories,
    implementation,
    missing_packages,
    time_both,
)
from fastlstm.tutorials.daily_series import DailySeries
from fastlstm.tutorials.gates_from_scratch import GatesFromScratch
from fastlstm.tutorials.gradient_regression import GradientRegression
from fastlstm.tutorials.sine_to_cosine import SineToCosine
from fastlstm.tutorials.time_sequence import TimeSequence

TUTORIALS: dict[str, type[Tutorial]] = {
    tutorial.name: tutorial
    for tutorial in (GradientRegression, SineToCosine, TimeSequence, DailySeries, CharacterModel, GatesFromScratch)
}


DESCRIPTION = "Small complete exercises around the LSTM, each held against its quality bar and against nn.LSTM."


@dataclass(frozen=True)
class Result:
    """What one tutorial reached."""

    title: str
    checks: dict[str, list[Check]]  # by trained implementation
    losses: dict[str, float]  # of the last update, by trained implementation
    trajectory: Trajectory
    timing: Timing

    @property
    def passed(self) -> bool:
        return self.trajectory.check().passed and all(
            check.passed for checks in self.checks.values() for check in checks
        )


def train(task: Tutorial, impl_name: str, console) -> tuple[torch.nn.Module, History, float]:
    """Trains to the end under a progress bar and returns the model, what the loop noted, and the last loss."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.2e}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    model, loss = task.build(implementation(impl_name)), float("nan")
    history: History = defaultdict(list)
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(f"training with {impl_name}", total=task.updates, loss=loss)
        shown = time.monotonic()
        done = 0
        for done, loss in enumerate(task.train(model, history), 1):
            # Ten looks a second: drawing after each of 148,500 updates would cost as much as the updates.
            if time.monotonic() - shown > 0.1:
                progress.update(bar, completed=done, loss=loss)
                shown = time.monotonic()
        progress.update(bar, completed=done, total=done, loss=loss)  # a loop that stopped early is complete as well
    return model, history, loss


def run(tutorial: type[Tutorial], arguments: argparse.Namespace, console) -> Result:
    """One tutorial from data to plots."""
    console.rule(f"[bold]{tutorial.title}[/bold] ({tutorial.name})")
    task = tutorial(arguments.quick, None, arguments.device, arguments.seed)
    trained = ("torch", "fastlstm") if arguments.impl == "both" else (arguments.impl,)
    checks, losses = {}, {}
    written: list[Path] = []
    for name in trained:
        start = time.perf_counter()
        model, history, losses[name] = train(task, name, console)
        console.print(f"  trained in {time.perf_counter() - start:.1f} s, loss of the last update {losses[name]:.3g}")
        checks[name] = task.checks(model, history)
        for check in checks[name]:
            console.print(f"  {verdict(check.passed)} {check}", highlight=False)
        for note in task.notes(model, implementation(name)):
            console.print("  " + note.replace("\n", "\n    "), highlight=False, markup=False)
        folder = arguments.plots / name if len(trained) > 1 else arguments.plots
        with plots.style():
            written += task.plot(model, history, folder)

    with console.status(f"comparing the first {TRAJECTORY_UPDATES} updates in float64"):
        trajectory = compare_trajectories(tutorial, arguments.quick, arguments.device, arguments.seed)
    console.print(f"  {verdict(trajectory.check().passed)} trajectory: {trajectory.check()}", highlight=False)
    path = arguments.plots / f"{tutorial.name}_trajectory.png"
    with plots.style():
        written.append(plots.plot_trajectory(trajectory, tutorial.title, path))
    with console.status("timing both implementations in turn"):
        timing = time_both(task, blocks=2 if arguments.quick else 5)
    console.print("  plots: " + ", ".join(map(str, written)), highlight=False, soft_wrap=True)
    return Result(tutorial.title, checks, losses, trajectory, timing)


def verdict(passed: bool) -> str:
    return "[green]pass[/green]" if passed else "[bold red]MISS[/bold red]"


def summary(results: list[Result], arguments: argparse.Namespace):
    """The final table."""
    from rich.table import Table

    length = "quick, with looser bars" if arguments.quick else "full length"
    table = Table(
        title=f"Tutorials, {length}, on {arguments.device} ({torch.get_num_threads()} threads), "
        f"fastlstm's backend: {backend(arguments.device)}, seed {arguments.seed}",
        caption=f"loss: after {TRAJECTORY_UPDATES} updates in float64, same seed; largest difference: relative, "
        f"along these updates (bar {TRAJECTORY_BAR:g}); time: per update, both in turn over equal work; "
        "ratio: nn.LSTM / fastlstm",
        show_lines=True,
    )
    for heading in ("tutorial", "figure (bar)"):
        table.add_column(heading)
    for heading in (
        "loss\nnn.LSTM",
        "loss\nfastlstm",
        "largest\ndifference",
        "ms\nnn.LSTM",
        "ms\nfastlstm",
        "time\nratio",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        figures = []
        for name, checks in result.checks.items():
            prefix = f"{name}: " if len(result.checks) > 1 else ""
            figures += [f"{verdict(check.passed)} {prefix}{check}" for check in checks]
        gap = result.trajectory.check()
        colour = "green" if gap.passed else "bold red"
        table.add_row(
            result.title,
            "\n".join(figures),
            f"{result.trajectory.torch[-1]:.6g}",
            f"{result.trajectory.fastlstm[-1]:.6g}",
            f"[{colour}]{gap.value:.1e}[/{colour}]",
            f"{1e3 * min(result.timing.torch):.3g}",
            f"{1e3 * min(result.timing.fastlstm):.3g}",
            f"{result.timing.ratio:.2f}x",
        )
    return table


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fastlstm.tutorials", description=DESCRIPTION)
    parser.add_argument(
        "names", nargs="*", default=["all"], metavar="name", help=f"all, or any of {', '.join(TUTORIALS)}"
    )
    parser.add_argument(
        "--impl", choices=("fastlstm", "torch", "both"), default="fastlstm", help="which one to train at full length"
    )
    parser.add_argument("--quick", action="store_true", help="shortened tasks with looser bars, about a minute for all")
    parser.add_argument(
        "--plots", type=Path, default=Path("tutorial_plots"), metavar="DIR", help="folder of the PNG files"
    )
    parser.add_argument("--device", default="cpu", help="e.g. cpu, cuda, cuda:1, mps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=1, help="of PyTorch on the CPU; models this small gain nothing by more"
    )
    parsed = parser.parse_args(arguments)
    unknown = set(parsed.names) - set(TUTORIALS) - {"all"}
    if unknown:
        parser.error(f"no tutorial named {', '.join(sorted(unknown))}; there are: all, {', '.join(TUTORIALS)}")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    """Runs the named tutorials; 0 if every bar was met, 1 if one was missed, 2 if packages are missing."""
    parsed = parse(arguments)
    chosen = [tutorial for name, tutorial in TUTORIALS.items() if "all" in parsed.names or name in parsed.names]
    missing = missing_packages(chosen)
    if missing:
        print(f"the tutorials need {', '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    from rich.console import Console

    torch.set_num_threads(parsed.threads)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a log file has no width of its own; the table needs this much
    results = [run(tutorial, parsed, console) for tutorial in chosen]
    console.print(summary(results, parsed))
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
