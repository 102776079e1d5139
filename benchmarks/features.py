"""What nn.LSTM cannot do, or only by a loop: per-sample gradients, recompute, PPO's training pass, torch.compile.

In each case the first implementation is the baseline of the ratios: what a user writes without the feature. Gradients
must agree to `TOLERANCE` before anything is timed.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import fastlstm
from benchmarks.load import background_load
from benchmarks.measure import Measurement, Plan, Spread, alternate, wall_timer
from benchmarks.results import Row

TOLERANCE = 1e-4  # of the largest gradient; float32
PLAN = Plan(budget=4.0, min_rounds=7, patience=20.0)

Step = Callable[[], list[Tensor]]  # runs once and gives the gradients, or the outputs


@dataclass
class Feature:
    """One case: implementations by name, the baseline first, and target ratios of the others."""

    name: str
    mode: str
    build: Callable[[], dict[str, Step]]
    targets: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    reports_saved: bool = False  # whether to report the memory saved for backward as well


def module_pair(I: int, H: int) -> tuple[nn.Module, nn.Module]:  # noqa: E741
    torch.manual_seed(0)
    theirs = nn.LSTM(I, H)
    return fastlstm.convert(copy.deepcopy(theirs)), theirs


def per_sample_gradients(T: int, B: int, I: int, H: int) -> Feature:  # noqa: E741
    """The gradient of each sample's own loss: a loop over samples, and vmap(grad)."""

    def build() -> dict[str, Step]:
        ours, theirs = module_pair(I, H)
        x, weights = torch.randn(T, B, I), {name: w.detach() for name, w in ours.named_parameters()}

        def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
            return functional_call(ours, weights, (row[:, None],))[0].pow(2).sum()

        def loop(module: nn.Module) -> list[Tensor]:
            grads = []
            for b in range(B):
                output, _ = module(x[:, b : b + 1])
                grads.append(torch.autograd.grad(output.pow(2).sum(), list(module.parameters())))
            return [torch.stack(parts) for parts in zip(*grads, strict=True)]

        per_sample = vmap(grad(loss), in_dims=(None, 1))
        return {
            "nn": lambda: loop(theirs),
            "loop": lambda: loop(ours),
            "fastlstm": lambda: list(per_sample(weights, x).values()),
        }

    sizes = {"T": T, "B": B, "I": I, "H": H}
    return Feature(f"per-sample gradients T={T} B={B} I={I} H={H}", "train", build, {"fastlstm": 5.0}, sizes)


def recompute(T: int, B: int, I: int, H: int) -> Feature:  # noqa: E741
    """Training steps without and with recompute, which saves checkpoints only; target: at most 1.35 times the time."""

    def build() -> dict[str, Step]:
        saving, _ = module_pair(I, H)
        recomputing = copy.deepcopy(saving)
        recomputing.recompute = True
        x = torch.randn(T, B, I)

        def step(module: nn.Module) -> list[Tensor]:
            return list(torch.autograd.grad(module(x)[0].pow(2).sum(), list(module.parameters())))

        return {"kept": lambda: step(saving), "recompute": lambda: step(recomputing)}

    sizes = {"T": T, "B": B, "I": I, "H": H}
    return Feature(
        f"recompute T={T} B={B} I={I} H={H}", "train", build, {"recompute": 1 / 1.35}, sizes, reports_saved=True
    )


def ppo(T: int, B: int, I: int, H: int) -> Feature:  # noqa: E741
    """A training pass over a rollout in which episodes end: a loop over steps, and one call with reset_mask."""

    def build() -> dict[str, Step]:
        ours, theirs = module_pair(I, H)
        x, starts = torch.randn(T, B, I), torch.rand(T, B) < 0.02
        keep = (~starts).float()[:, None, :, None]
        zero = torch.zeros(1, B, H)

        def finish(output: Tensor, module: nn.Module) -> list[Tensor]:
            return list(torch.autograd.grad(output.pow(2).mean(), list(module.parameters())))

        def loop(module: nn.Module) -> list[Tensor]:
            h, c, outputs = zero, zero, []
            for t in range(T):
                output, (h, c) = module(x[t : t + 1], (h * keep[t], c * keep[t]))
                outputs.append(output)
            return finish(torch.cat(outputs), module)

        return {
            "nn": lambda: loop(theirs),
            "loop": lambda: loop(ours),
            "fastlstm": lambda: finish(ours(x, (zero, zero), reset_mask=starts)[0], ours),
        }

    sizes = {"T": T, "B": B, "I": I, "H": H}
    return Feature(f"recurrent PPO T={T} B={B} I={I} H={H}", "train", build, {"fastlstm": 10.0}, sizes)


FEATURES = (
    per_sample_gradients(20, 64, 8, 16),
    per_sample_gradients(20, 64, 16, 32),
    per_sample_gradients(50, 64, 64, 64),
    recompute(4096, 16, 64, 64),
    recompute(4096, 8, 128, 256),
    ppo(128, 16, 64, 64),
)


# T of the compiled models and the implementations measured: nn.LSTM is unrolled, so its compile time grows with T.
COMPILED = {8: ("nn", "fastlstm"), 16: ("nn", "fastlstm"), 512: ("fastlstm",)}


def chosen(matching: str = "") -> list[Feature]:
    return [feature for feature in FEATURES if matching in feature.name]


def compiled(matching: str = "") -> dict[str, int]:
    """T of each case of compile time, by name."""
    names = {f"compile T={T} B=8 I=32 H=64 L=2": T for T in COMPILED}
    return {name: T for name, T in names.items() if matching in name}


def feature_rows(matching: str, report: Callable[[str, list[Row]], None], budget: float | None = None) -> list[Row]:
    """One row per implementation, and one for the memory it saves for backward if the case reports that."""
    rows = []
    for feature in chosen(matching):
        new_rows = _measure(feature, PLAN if budget is None else Plan(budget=budget, min_rounds=3, patience=budget))
        report(feature.name, new_rows)
        rows += new_rows
    for name, T in compiled(matching).items():
        new_rows = [_compile_time(name, impl, T) for impl in COMPILED[T]]
        for row in new_rows:
            row.ratio = (
                new_rows[0].p50_ms / row.p50_ms
                if new_rows[0].impl == "nn" and new_rows[0].p50_ms and row.p50_ms
                else None
            )
        report(name, new_rows)
        rows += new_rows
    return rows


def _compile_time(name: str, impl: str, T: int) -> Row:
    """The first training step of a compiled model, nothing cached: Dynamo, AOTAutograd and Inductor's C++ compiler."""
    row = Row("features", name, "compile", impl, kind="feature", dtype="float32", T=T, B=8, I=32, H=64, L=2, D=1)
    torch.manual_seed(0)
    lstm = (nn.LSTM if impl == "nn" else fastlstm.LSTM)(32, 64, 2)
    head, x = nn.Linear(64, 4), torch.randn(T, 8, 32)

    def model(x: Tensor) -> Tensor:
        return head(lstm(x)[0].tanh()).pow(2).mean()

    torch._dynamo.reset()
    # Inductor cannot train through oneDNN's layer (torch 2.13), so nn.LSTM is traced step by step without oneDNN.
    with (
        torch.backends.mkldnn.flags(enabled=impl != "nn"),
        torch._dynamo.config.patch(allow_rnn=True),
        torch._inductor.config.patch(force_disable_caches=True),
    ):
        measured_load, start = background_load(), time.perf_counter()
        loss = torch.compile(model, fullgraph=True)(x)
        loss.backward()
        row.p20_ms = row.p50_ms = row.p80_ms = (time.perf_counter() - start) * 1e3
        row.rounds, row.calls, row.others_cpu = 1, 1, measured_load()
    row.error, row.error_allowed = abs(float(loss.detach()) - float(model(x).detach())), TOLERANCE
    if not row.error <= TOLERANCE:
        row.status = f"WRONG: loss differs by {row.error:.2e}"
    return row


def _measure(feature: Feature, plan: Plan) -> list[Row]:
    steps = feature.build()
    baseline, *_ = steps
    rows = {name: _row(feature, name) for name in steps}
    reference = steps[baseline]()
    for name, step in steps.items():
        row = rows[name]
        row.error, row.error_allowed = error(step(), reference), TOLERANCE
        if not row.error <= TOLERANCE:
            row.status = f"WRONG: gradients differ from those of {baseline!r} by {row.error:.2e} of the largest"
    time_steps(steps, rows, baseline, plan)
    if not feature.reports_saved:
        return list(rows.values())
    memory = {name: _row(feature, name, "memory") for name, row in rows.items() if row.status == "ok"}
    for name, row in memory.items():
        row.peak_mib = saved_mib(steps[name])
        row.target = None if name == baseline else 3.0
        row.ratio = memory[baseline].peak_mib / row.peak_mib if memory[baseline].peak_mib else None
    return [*rows.values(), *memory.values()]


def _row(feature: Feature, impl: str, mode: str = "") -> Row:
    row = Row("features", feature.name, mode or feature.mode, impl, kind="feature", dtype="float32")
    row.target = feature.targets.get(impl)
    row.T, row.B, row.I, row.H = (feature.sizes.get(size) for size in "TBIH")
    row.L = row.D = 1
    return row


def time_steps(steps: dict[str, Step], rows: dict[str, Row], baseline: str, plan: Plan) -> None:
    """Time the steps whose row is "ok", interleaved, and fill in their rows."""
    correct = {name: Measurement.of(step) for name, step in steps.items() if rows[name].status == "ok"}
    measured_load = background_load()
    rounds = alternate(correct, wall_timer, plan)
    load = measured_load()
    for name, measurement in correct.items():
        row, spread = rows[name], Spread.of(measurement.samples)
        row.p20_ms, row.p50_ms, row.p80_ms = spread.p20 * 1e3, spread.p50 * 1e3, spread.p80 * 1e3
        row.rounds, row.calls, row.others_cpu = rounds, measurement.calls, load
        row.ratio = Spread.of(correct[baseline].samples).p50 / spread.p50
        pairs = zip(correct[baseline].samples, measurement.samples, strict=True)
        row.ratio_rounds = statistics.median(a / b for a, b in pairs)


def error(results: list[Tensor], reference: list[Tensor]) -> float:
    """The largest difference, relative to the largest element of its tensor."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(results, reference, strict=True))


def saved_mib(step: Step) -> float:
    """MiB that a forward pass saves for backward, parameters and the input included; each storage counts once."""
    bytes_by_storage: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        bytes_by_storage[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    return sum(bytes_by_storage.values()) / 2**20
