"""One implementation of one case, ready to run: `Program`.

All programs run the same forward and the same training step with different modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastlstm
from benchmarks.cases import Case
from benchmarks.data import Inputs

Outputs = tuple[Tensor, Tensor, Tensor]


class Program:
    """`forward` or `train_step`, run inside `mode(...)`; `results` gives their numbers under common names.

    A training step sets the gradients to None, then runs forward, and backward from a fixed gradient of the output,
    with gradients for x, for every weight, and for hx in a streaming case.
    """

    def __init__(self, case: Case, inputs: Inputs, module: nn.Module, backend: str | None = None) -> None:
        """`module` holds the weights. `backend` is the fastlstm backend to run under; None leaves fastlstm alone."""
        self.case, self.inputs, self.module, self.backend = case, inputs, module, backend
        packed = case.kind == "packed"
        self.x = (inputs.packed(inputs.x).data if packed else inputs.x).detach().clone()
        self.grad_output = inputs.packed(inputs.grad_output).data if packed else inputs.grad_output
        self.hx = None if inputs.hx is None else tuple(state.detach().clone() for state in inputs.hx)
        self.leaves = [t.requires_grad_() for t in (self.x, *(self.hx or ()))] + list(module.parameters())

    def call(self) -> Outputs:
        """(output, h_n, c_n); the output of a packed case is its PackedSequence's data."""
        raise NotImplementedError

    def forward(self) -> Outputs:
        return self.call()

    def train_step(self) -> Outputs:
        for leaf in self.leaves:
            leaf.grad = None
        outputs = self.call()
        outputs[0].backward(self.grad_output)
        return outputs

    @contextmanager
    def mode(self, mode: str) -> Iterator[Callable[[], Outputs]]:
        """Enter "train" or "forward" (no_grad, eval), and yield the function to run in it."""
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(mode == "train"))
            if self.backend is not None:
                stack.enter_context(fastlstm.use_backend(self.backend))
            self.module.train(mode == "train")
            yield self.train_step if mode == "train" else self.forward

    def results(self, mode: str) -> dict[str, Tensor]:
        """Run once; return output, h_n, c_n and, in training, all gradients: padded, under common keys."""
        with self.mode(mode) as run:
            return self.named_results(mode, run())

    def named_results(self, mode: str, outputs: Outputs) -> dict[str, Tensor]:
        """Name the outputs of a run and its gradients."""
        output, h_n, c_n = (t.detach() for t in outputs)
        results = {"output": self._padded(output), "h_n": h_n, "c_n": c_n}
        if mode == "forward":
            return results
        results["d_x"] = self._padded(gradient(self.x))
        if self.hx is not None:
            results |= {"d_h0": gradient(self.hx[0]), "d_c0": gradient(self.hx[1])}
        return results | {f"d_{name}": value for name, value in self.weight_gradients().items()}

    def chosen(self) -> tuple[str, str | None]:
        """(backend that runs this, None), or ("", reason that the requested one cannot); ("", None) if not fastlstm."""
        if self.backend is None:
            return "", None
        with fastlstm.use_backend(self.backend):
            explanation = fastlstm.explain(*self.example())
        return explanation.backend, None if explanation.backend else explanation.reasons[self.backend]

    def example(self) -> tuple[object, ...]:
        """A module and the arguments of one call to it."""
        raise NotImplementedError

    def weight_gradients(self) -> dict[str, Tensor]:
        """Gradients by nn.LSTM's parameter names, in its layouts."""
        return {name: gradient(weight) for name, weight in self.module.named_parameters()}

    def _padded(self, rows: Tensor) -> Tensor:
        return self.inputs.unpacked(rows) if self.case.kind == "packed" else rows


def gradient(leaf: Tensor) -> Tensor:
    """The gradient of a leaf; NaN if an implementation computed none, so that the gate refuses it."""
    return torch.full_like(leaf, float("nan")).detach() if leaf.grad is None else leaf.grad


class SequenceProgram(Program):
    """An nn.LSTM or anything that is called like one."""

    def __init__(self, case: Case, inputs: Inputs, module: nn.Module, backend: str | None = None) -> None:
        super().__init__(case, inputs, module, backend)
        self.argument: Tensor | PackedSequence = self.x
        if case.kind == "packed":
            like = inputs.packed(inputs.x)
            self.argument = PackedSequence(self.x, like.batch_sizes, like.sorted_indices, like.unsorted_indices)

    def example(self) -> tuple[object, ...]:
        return self.module, self.argument, self.hx

    def call(self) -> Outputs:
        output, (h_n, c_n) = self.module(self.argument, self.hx)
        return (output.data if self.case.kind == "packed" else output), h_n, c_n


class CellsProgram(Program):
    """L stacked cells looped over T in Python; `module` is a ModuleList of the cells."""

    def example(self) -> tuple[object, ...]:
        return self.module[0], self.x[0]

    def call(self) -> Outputs:
        zero = self.x.new_zeros(self.case.B, self.case.H)
        states = [(zero, zero) for _ in self.module]
        outputs = []
        for h in self.x.unbind():
            for k, cell in enumerate(self.module):
                states[k] = cell(h, states[k])
                h = states[k][0]
            outputs.append(h)
        return torch.stack(outputs), torch.stack([h for h, _ in states]), torch.stack([c for _, c in states])

    def weight_gradients(self) -> dict[str, Tensor]:
        return {
            f"{name}_l{k}": gradient(weight)
            for k, cell in enumerate(self.module)
            for name, weight in cell.named_parameters()
        }


def build_program(case: Case, inputs: Inputs, lstm: type, cell: type, backend: str | None = None) -> Program:
    """The program of classes with nn.LSTM's and nn.LSTMCell's constructors, holding the case's weights."""
    factory = {"device": inputs.x.device, "dtype": inputs.x.dtype}
    if case.kind != "cells":
        module = lstm(case.I, case.H, case.L, bidirectional=case.bidirectional, proj_size=case.proj, **factory)
        module.load_state_dict(inputs.weights)
        return SequenceProgram(case, inputs, module, backend)
    cells = nn.ModuleList(cell(case.I if k == 0 else case.H, case.H, **factory) for k in range(case.L))
    for k, cell_k in enumerate(cells):
        cell_k.load_state_dict({name: inputs.weights[f"{name}_l{k}"] for name, _ in cell_k.named_parameters()})
    return CellsProgram(case, inputs, cells, backend)
