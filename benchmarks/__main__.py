"""python -m benchmarks [--suite NAME] [--impl NAME ...] [--out DIR]; see --help.
python -m benchmarks ab REV [--suite NAME ...] compares two revisions (benchmarks/ab/);
python -m benchmarks calibrate compares the CPU plan's predictions with this machine.

Measures a suite, prints each case when it is done, and writes DIR/<suite>.csv; DIR is benchmarks/results/<device>/ by
default. The file is complete after every case; --seconds limits the time of a long suite, and --resume continues it.
The exit status is 1 if a result of ours was wrong or failed, 2 if the suite cannot run here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import gpu, implementations, machine, results, suites
from benchmarks.cases import TORCH_DTYPES
from benchmarks.console import escape, printer, progress
from benchmarks.inference import engines
from benchmarks.inference.report import speedup_summary
from benchmarks.load import MAX_BACKGROUND_LOAD
from benchmarks.results import AccuracyRow, ErrorRow, InferenceRow, ModelRow, Row
from benchmarks.run import failures, silence
from benchmarks.tables import geometric_mean
from fastlstm.backends import native


def parse(arguments: list[str] | None) -> argparse.Namespace:
    names = [name for name in implementations.IMPLEMENTATIONS if name not in results.BASELINES]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Compare fastlstm with nn.LSTM and with the machine's peak."
    )
    parser.add_argument(
        "--suite",
        choices=suites.NAMES,
        default="cpu",
        help="cpu by default; models: public models before and after fastlstm.convert, whose packages "
        "pip install 'fastlstm[models]' installs; inference: fixed weights on a CPU, beside ONNX Runtime, OpenVINO and "
        "torch.ao, which --impl does not select; xla: nn.LSTM and fastlstm beside a loop compiled by XLA, which "
        "pip install 'fastlstm[xla]' installs",
    )
    parser.add_argument(
        "--impl",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"any of {', '.join(names)}, next to nn, the "
        "baseline, and on CUDA nn_graph, nn in a CUDA graph: ratios are to the faster of these two; "
        "by default fastlstm and the baselines that are installed",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the CSV")
    parser.add_argument(
        "--filter", default="", metavar="TEXT", help="only cases whose name contains it; no CSV unless --out"
    )
    parser.add_argument(
        "--dtype", choices=TORCH_DTYPES, default="", help="only cases of this dtype; no CSV unless --out"
    )
    parser.add_argument("--budget", type=float, metavar="S", help="seconds per case and mode")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; torch's default otherwise")
    parser.add_argument(
        "--wait", type=float, default=0.0, metavar="S", help="max seconds a case may wait for an idle machine"
    )
    parser.add_argument("--seconds", type=float, metavar="S", help="start no case later than this")
    parser.add_argument("--resume", action="store_true", help="keep the CSV's rows, and measure the cases it lacks")
    parser.add_argument(
        "--kernels",
        choices=("steps", "A", "B", "D", "S"),
        help="fastlstm's CUDA kernels: step by step, or persistent ones of a tier if they fit; otherwise as planned",
    )
    return parser.parse_args(arguments)


def line(row: Row) -> str:
    """Format one measurement in the console's markup."""
    text = f"    {row.mode:<8}{row.impl:<12}"
    if row.status != "ok":
        return (
            f"{text}[bold red]{escape(row.status)}[/]"
            if not row.status.startswith("skipped")
            else f"{text}[dim]{escape(row.status)}[/]"
        )
    if row.peak_mib is not None:
        text += f"{row.peak_mib:10.1f} MiB"
    if row.p50_ms is not None:
        text += f"{row.p50_ms:10.3f} ms  ({row.p20_ms:.3f} .. {row.p80_ms:.3f}, {row.rounds} x {row.calls})"
    if row.suite in ("gpu", "gpu_points") and row.us_per_step is not None:
        text += f"{row.us_per_step:9.2f} us per step"
    if row.impl not in results.BASELINES and row.ratio is not None:
        colour = "green" if row.ratio >= (row.target or 1.0) else "yellow" if row.ratio >= 1 else "red"
        text += f"  [{colour}]{row.ratio:.2f}x[/]"
    if isinstance(row, ModelRow) and row.lstm_share is not None:
        text += f"  LSTMs take {row.lstm_share:.0%}"
    if isinstance(row, AccuracyRow) and row.value is not None:
        text += f"  {row.weights:<10}{row.measure} {row.value:.5g}"
    if isinstance(row, ErrorRow) and row.rms_error is not None:
        text += f"  {row.products:<6}{row.tensor:<13}RMS error {row.rms_error:.2e}, max error {row.max_error:.2e}"
    if isinstance(row, InferenceRow):
        if row.p50_us is not None:
            text += f"{row.p50_us:10.2f} us  (99 %: {row.p99_us:.1f}, 99.9 %: {row.p999_us:.1f})"
            text += f"  {row.steps_per_s:.0f} per s"
        if row.speedup is not None:
            text += f"  {row.speedup:.2f}x {row.compared_with}"
    if row.fraction is not None:
        text += f"  {row.fraction:.0%} of peak"
    if row.others_cpu is not None and row.others_cpu > MAX_BACKGROUND_LOAD:
        text += f"  [bold red]background load {row.others_cpu:.0%}[/]"
    return text + (f"  {row.backend}" if row.backend else "")


def summary(rows: list[Row]) -> list[str]:
    """Geometric means, and the number of rows measured under background load."""
    lines = []
    for impl in dict.fromkeys(row.impl for row in rows if row.impl not in results.BASELINES):
        for mode in dict.fromkeys(row.mode for row in rows):
            ratios = [row.ratio for row in rows if (row.impl, row.mode) == (impl, mode) and row.ratio]
            if ratios:
                mean = geometric_mean(ratios)
                lines.append(
                    f"{impl}, {mode}: geometric mean {mean:.2f}x over {len(ratios)} cases, min {min(ratios):.2f}x"
                )
    lines += speedup_summary(row for row in rows if isinstance(row, InferenceRow))
    loaded = sum(row.others_cpu is not None and row.others_cpu > MAX_BACKGROUND_LOAD for row in rows)
    if loaded:
        lines.append(f"{loaded} rows have a background load above {MAX_BACKGROUND_LOAD:.0%}: measure again")
    return lines


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["ab"]:
        from benchmarks.ab.command import main as compare

        return compare(words[1:])
    if words[:1] == ["calibrate"]:
        from benchmarks.calibrate import main as calibrate

        return calibrate(words[1:])
    options = parse(arguments)
    say = printer()
    on_gpu = options.suite in ("gpu", "gpu_points", "gpu_variants")
    device = "cuda" if on_gpu else "cpu"
    if on_gpu and gpu.unavailable_reason():
        say(f"[red]{gpu.unavailable_reason()}[/]")
        return 2
    if options.kernels:
        steps = options.kernels == "steps"
        native.set_persistent(not steps, tier="" if steps else options.kernels)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        measured = implementations.select(options.impl or suites.IMPLEMENTATIONS_OF.get(options.suite, []), device)
    except ValueError as error:
        say(f"[red]{escape(str(error))}[/]")
        return 2
    silence()
    description, inference = machine.describe(device), options.suite == "inference"
    say(
        f"suite {options.suite} on {description['device']}, {description['threads']} threads, "
        f"torch {description['torch']}"
        + (f", cuDNN {description['cudnn']}" if description["cudnn"] else "")
        + f", commit {description['commit']}: {', '.join(engines.installed() if inference else measured)}"
    )
    for absent in engines.missing() if inference else ():
        say(escape(absent))
    if options.suite == "grid":
        say("grid: {} of {} combinations are within the flop budget".format(*suites.sweeps.grid_size()))
    path = None
    if options.out or not (options.filter or options.dtype):
        path = (options.out or results.RESULTS / machine.slug(description)) / f"{options.suite}.csv"
    keep = options.resume and path and path.exists() and options.suite != "tutorials"
    rows = results.read(path) if keep else []
    done = {row.case for row in rows}
    kept, total = len(rows), suites.size_of(options.suite, options.filter, done, options.dtype)
    with progress(total) as (tell, advance):

        def report(name: str, new_rows: list[Row]) -> None:
            nonlocal total
            total -= 1
            tell(f"[bold]{escape(name)}[/]")
            for row in new_rows:
                tell(line(row))
                for column, value in description.items():
                    setattr(row, column, value)
            rows.extend(new_rows)
            if path:
                results.write(rows, path)
            advance()

        settings = (options.budget, options.wait, done, options.seconds)
        suites.rows_of(options.suite, measured, report, options.filter, *settings, options.dtype)
    for text in summary(rows):
        say(text)
    if path:
        results.write(rows, path)
        say(f"wrote {path.name} for {machine.slug(description)}: python -m benchmarks.report shows it")
    if total:
        say(f"{total} cases are left, for lack of time: add --resume to continue")
    refused = failures(rows[kept:], engines.ENGINES if inference else implementations.IMPLEMENTATIONS)
    for row in refused:
        say(f"[bold red]{escape(f'{row.case}, {row.mode}, {row.impl}: {row.status}')}[/]")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
