"""Baselines besides nn.LSTM: a compiled PyTorch loop, haste and FlashRNN.

Each runs at its best: weights are converted before the timing, each uses its own memory layout, and none does work that
the others skip. The timing of all of them includes the input projection x W_ih^T.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks.cases import Case
from benchmarks.data import Inputs
from benchmarks.programs import Outputs, Program, SequenceProgram, gradient

# Dynamo unrolls the time loop; above this many steps compiling takes minutes, so only the step is compiled.
UNROLLED_STEPS = 20


class LoopLSTM(nn.Module):
    """The loop a PyTorch user writes: one input projection for all steps, then one cell per step."""

    def __init__(self, case: Case, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.L, self.D, self.H = case.L, case.D, case.H
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight.clone()))
        unrolled = case.T * case.L * case.D <= UNROLLED_STEPS
        self.step = self._step if unrolled else torch.compile(self._step, dynamic=False)
        self.run = torch.compile(self._run, dynamic=False) if unrolled else self._run

    @staticmethod
    def _step(xg: Tensor, h: Tensor, c: Tensor, w_hh: Tensor) -> tuple[Tensor, Tensor]:
        """(h, c) from xg [B, 4H], h and c [B, H], w_hh [4H, H]."""
        i, f, g, o = (xg + linear(h, w_hh)).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def _run(self, x: Tensor, h0: Tensor, c0: Tensor) -> Outputs:
        last: list[tuple[Tensor, Tensor]] = []
        for layer in range(self.L):
            outputs = []
            for d in range(self.D):
                suffix = f"_l{layer}" + ("_reverse" if d else "")
                w_ih, w_hh, b_ih, b_hh = (
                    getattr(self, n + suffix) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                )
                h, c = h0[layer * self.D + d], c0[layer * self.D + d]
                ys = []
                steps = linear(x, w_ih, b_ih + b_hh).unbind()
                for xg in reversed(steps) if d else steps:
                    h, c = self.step(xg, h, c, w_hh)
                    ys.append(h)
                outputs.append(torch.stack(ys[::-1] if d else ys))
                last.append((h, c))
            x = torch.cat(outputs, dim=-1) if self.D == 2 else outputs[0]
        return x, torch.stack([h for h, _ in last]), torch.stack([c for _, c in last])

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        zero = x.new_zeros(self.L * self.D, x.shape[1], self.H)
        output, h_n, c_n = self.run(x, *(hx or (zero, zero)))
        return output, (h_n, c_n)


def compiled_loop(case: Case, inputs: Inputs) -> Program:
    """torch.compile of the loop, or of its step where the loop is too long to unroll."""
    torch._dynamo.reset()  # otherwise specialisations of earlier cases reach Dynamo's limit, and it stops compiling
    return SequenceProgram(case, inputs, LoopLSTM(case, inputs.weights))


def compiled_loop_refuses(case: Case) -> str | None:
    if case.kind in ("packed", "cells") or case.proj:
        return "the compiled loop supports padded sequences only, without projection"
    return None


def _regate(weight: Tensor, order: tuple[int, int, int, int]) -> Tensor:
    """Permute the four gate blocks of a weight [4H, ...]."""
    blocks = weight.chunk(4)
    return torch.cat([blocks[k] for k in order])


class HasteProgram(Program):
    """haste_pytorch.LSTM: gates i, g, f, o, matrices transposed, one bias. Its backward needs train mode."""

    def call(self) -> Outputs:
        output, (h_n, c_n) = self.module(self.x, self.hx)
        return output, h_n, c_n

    def weight_gradients(self) -> dict[str, Tensor]:
        ifgo = (0, 2, 1, 3)  # from haste's i, g, f, o
        bias = _regate(gradient(self.module.bias), ifgo)
        return {
            "weight_ih_l0": _regate(gradient(self.module.kernel).T, ifgo),
            "weight_hh_l0": _regate(gradient(self.module.recurrent_kernel).T, ifgo),
            "bias_ih_l0": bias,
            "bias_hh_l0": bias,
        }


def haste(case: Case, inputs: Inputs) -> Program:
    import haste_pytorch

    module = haste_pytorch.LSTM(case.I, case.H, batch_first=False).to(inputs.x.device, inputs.x.dtype)
    w = inputs.weights
    module.from_native_weights(w["weight_ih_l0"], w["weight_hh_l0"], w["bias_ih_l0"], w["bias_hh_l0"])
    return HasteProgram(case, inputs, module)


def haste_refuses(case: Case) -> str | None:
    if case.kind not in ("sequence", "stream") or case.L > 1 or case.D > 1 or case.proj:
        return "haste supports one layer and one direction, without projection or packed input"
    if case.dtype not in ("float32", "tf32", "float64"):
        return f"haste supports float32 and float64, not {case.dtype}"
    return None


class FlashRNNModule(nn.Module):
    """flashrnn on batch-first input [B, T, I]. The kernel takes x W_ih^T, W_hh and one bias; gates i, f, g, o."""

    def __init__(self, case: Case, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.H, self.dtype = case.H, str(case.torch_dtype).removeprefix("torch.")
        self.weight_ih = nn.Parameter(weights["weight_ih_l0"].clone())
        self.weight_hh = nn.Parameter(weights["weight_hh_l0"].clone())
        self.bias = nn.Parameter(weights["bias_ih_l0"] + weights["bias_hh_l0"])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(output [B, T, H], states [2, B, T, 1, H]); the states are y and c of every step."""
        from flashrnn import flashrnn as kernel

        B, T, _ = x.shape
        states, _ = kernel(
            linear(x, self.weight_ih).view(B, T, 4, 1, self.H),
            self.weight_hh.view(4, 1, self.H, self.H),
            self.bias.view(4, 1, self.H),
            function="lstm",
            backend="cuda_fused",
            dtype=self.dtype,
        )
        return states[0, :, :, 0], states


class FlashRNNProgram(Program):
    def __init__(self, case: Case, inputs: Inputs, module: nn.Module) -> None:
        super().__init__(case, inputs, module)
        self.x = inputs.x.transpose(0, 1).contiguous().requires_grad_()
        self.grad_output = inputs.grad_output.transpose(0, 1).contiguous()
        self.leaves = [self.x, *module.parameters()]

    def call(self) -> Outputs:
        output, states = self.module(self.x)
        return output, states[0, :, -1].transpose(0, 1), states[1, :, -1].transpose(0, 1)

    def weight_gradients(self) -> dict[str, Tensor]:
        bias = gradient(self.module.bias)
        return {
            "weight_ih_l0": gradient(self.module.weight_ih),
            "weight_hh_l0": gradient(self.module.weight_hh),
            "bias_ih_l0": bias,
            "bias_hh_l0": bias,
        }

    def _padded(self, rows: Tensor) -> Tensor:
        return rows.transpose(0, 1)


def flashrnn(case: Case, inputs: Inputs) -> Program:
    return FlashRNNProgram(case, inputs, FlashRNNModule(case, inputs.weights))


def flashrnn_refuses(case: Case) -> str | None:
    if case.kind != "sequence" or case.L > 1 or case.D > 1 or case.proj:
        return "flashrnn supports one layer and one direction, from zero states, without projection or packed input"
    if case.dtype not in ("float32", "tf32", "bfloat16", "float16"):
        return f"flashrnn has no {case.dtype} kernel"
    return None
