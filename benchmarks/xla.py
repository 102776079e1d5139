"""XLA as a baseline of training: an LSTM by jax.lax.scan, compiled by jax.jit. `pip install 'fastlstm[xla]'`.

flax is not needed: its cells (flax.linen.OptimizedLSTMCell under nn.RNN) run the same scan, but make x W_ih^T within
it, step by step. Here one product makes it for all steps, as in nn.LSTM, and only h W_hh^T is left in the loop.
Gradients are those of jax.vjp, as in training with jax.

Threads: XLA's pool on a CPU has one thread per CPU unless PJRT_NPROC says otherwise. It is read once per process, so
the suite measures each case in a new process, with torch's number of threads (`limit_threads`).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.data import Inputs
from benchmarks.load import wait_for_rest
from benchmarks.programs import Program

CASES: list[Case] = [
    Case(10, 1, 1, 100),
    Case(5, 20, 1, 16),
    Case(100, 32, 128, 128),
    Case(100, 64, 512, 512),
    Case(200, 64, 50, 100, 2),
    Case(50, 32, 256, 256, 2, bidirectional=True),
]


def missing(device: str) -> str | None:
    if device != "cpu":
        return "the XLA baseline is measured on CPUs"
    if importlib.util.find_spec("jax"):
        return None
    return "jax is not installed: pip install 'fastlstm[xla]'"


def refuses(case: Case) -> str | None:
    if case.kind in ("packed", "cells") or case.proj or case.dtype != "float32":
        return "the XLA loop supports padded float32 sequences, without projection"
    return None


def limit_threads() -> None:
    """Give XLA's pool torch's number of threads; RuntimeError if it may have been made with another."""
    threads = str(torch.get_num_threads())
    before = os.environ.get("PJRT_NPROC")
    if before is None and "jax" in sys.modules:
        raise RuntimeError(f"XLA's pool may exist: set PJRT_NPROC={threads} before jax is imported")
    if before not in (None, threads):
        raise RuntimeError(f"XLA's pool has PJRT_NPROC={before} threads in this process, torch has {threads}")
    os.environ["PJRT_NPROC"] = threads


def lstm(weights: dict[str, Any], x: Any, h0: Any, c0: Any, layers: int, directions: int) -> tuple[Any, Any, Any]:
    """output, h_n and c_n as of nn.LSTM: x [T, B, I], states [L * D, B, H], weights by nn.LSTM's names."""
    import jax
    from jax import numpy as jnp

    def one(x: Any, h0: Any, c0: Any, suffix: str, reverse: bool) -> tuple[Any, Any, Any]:
        w_ih, w_hh, b_ih, b_hh = (weights[f"{n}_{suffix}"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))

        def step(state: tuple[Any, Any], gates: Any) -> tuple[tuple[Any, Any], Any]:
            h, c = state
            i, f, g, o = jnp.split(gates + h @ w_hh.T, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        (h, c), y = jax.lax.scan(step, (h0, c0), x @ w_ih.T + (b_ih + b_hh), reverse=reverse)
        return y, h, c

    h_n, c_n = [], []
    for k in range(layers):
        outputs = []
        for d in range(directions):
            n = k * directions + d
            y, h, c = one(x, h0[n], c0[n], f"l{k}" + ("_reverse" if d else ""), d == 1)
            outputs.append(y)
            h_n.append(h)
            c_n.append(c)
        x = jnp.concatenate(outputs, -1) if directions == 2 else outputs[0]
    return x, jnp.stack(h_n), jnp.stack(c_n)


class XlaProgram(Program):
    """Forward, and forward with all gradients, each one compiled function; a call ends when its results are there."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        limit_threads()
        import jax

        super().__init__(case, inputs, nn.Module())
        self.weights = {name: jax.numpy.asarray(w.numpy()) for name, w in inputs.weights.items()}
        hx = inputs.hx or tuple(torch.zeros(case.L * case.D, case.B, n) for n in (case.P, case.H))
        self.arguments = tuple(jax.numpy.asarray(t.numpy()) for t in (inputs.x, *hx))
        self.gradient = jax.numpy.asarray(inputs.grad_output.numpy())

        def forward(weights: Any, *arguments: Any) -> Any:
            return lstm(weights, *arguments, case.L, case.D)

        def train(weights: Any, arguments: Any, gradient: Any) -> Any:
            # Of the states too only where the case asks for it, as for the other implementations.
            wanted, rest = (arguments, ()) if inputs.hx is not None else (arguments[:1], arguments[1:])

            def output(weights: Any, *wanted: Any) -> Any:
                y, h_n, c_n = forward(weights, *wanted, *rest)
                return y, (h_n, c_n)

            y, pullback, states = jax.vjp(output, weights, *wanted, has_aux=True)
            return (y, *states), pullback(gradient)

        self.compiled_forward, self.compiled_train = jax.jit(forward), jax.jit(train)
        self.forward()  # compiles, as the first call of each does
        self.train_step()

    def forward(self) -> Any:
        import jax

        return jax.block_until_ready(self.compiled_forward(self.weights, *self.arguments))

    def train_step(self) -> Any:
        import jax

        return jax.block_until_ready(self.compiled_train(self.weights, self.arguments, self.gradient))

    @contextmanager
    def mode(self, mode: str) -> Iterator[Any]:
        """Wait before and after until no pool spins: torch's and XLA's would take each other's CPUs."""
        wait_for_rest()
        yield self.train_step if mode == "train" else self.forward
        wait_for_rest()

    def named_results(self, mode: str, outputs: Any) -> dict[str, Tensor]:
        values, gradients = outputs if mode == "train" else (outputs, ())
        results = dict(zip(("output", "h_n", "c_n"), map(_tensor, values), strict=True))
        if not gradients:
            return results
        of_weights, *of_inputs = gradients
        results |= dict(zip(("d_x", "d_h0", "d_c0"), map(_tensor, of_inputs), strict=False))
        return results | {f"d_{name}": _tensor(of_weights[name]) for name in self.weights}


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array))
