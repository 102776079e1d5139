"""The correctness gate: no time is reported for a wrong result. `truth`, `judge`, `Verdict`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.data import Inputs
from fastlstm import reference

# An implementation may err this many times as much as nn.LSTM at the same dtype ...
ALLOWED_FACTOR = 2.0
# ... plus this many ulp of the tensor's largest value, for where nn.LSTM happens to err by almost nothing.
ALLOWED_ULP = 4.0
# In float64 the reference is rounded as much as what it judges (nn.LSTM, which runs the very same operations, even
# seems to err by nothing). A sum of n terms taken in another order differs by about sqrt(n) ulp; n is the case's rows.
# TF32 rounds the factors of a product to 10 bits of mantissa.
TF32_EPS = 2.0**-10


@dataclass(frozen=True)
class Verdict:
    """How the worst tensor fared: errors in the max norm against the float64 reference."""

    ok: bool
    tensor: str
    error: float
    allowed: float
    theirs: float  # nn.LSTM's error on the same tensor

    def __str__(self) -> str:
        state = "ok" if self.ok else "WRONG"
        return f"{state}: {self.tensor} error {self.error:.2e}, allowed {self.allowed:.2e}, nn.LSTM {self.theirs:.2e}"


def truth(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """What every program must give, in float64 from the case's own (already rounded) inputs and weights.

    fastlstm.reference layer by layer, with autograd's gradients; named as Program.results names them.
    """

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().double().clone().requires_grad_()

    x, weights = leaf(inputs.x), {name: leaf(weight) for name, weight in inputs.weights.items()}
    hx = None if inputs.hx is None else tuple(leaf(state) for state in inputs.hx)
    lengths = None if inputs.lengths is None else inputs.lengths.to(x.device)
    y, h_n, c_n = x, [], []
    for layer in range(case.L):
        own = [weights[name] for name in weights if name.split("_l")[1].split("_")[0] == str(layer)]
        directions = slice(layer * case.D, (layer + 1) * case.D)
        h0, c0 = (None, None) if hx is None else (hx[0][directions], hx[1][directions])
        y, h, c, _ = reference.layer(y, h0, c0, own, lengths)
        h_n.append(h)
        c_n.append(c)
    y.backward(inputs.grad_output.double())
    found = {"output": y, "h_n": torch.cat(h_n), "c_n": torch.cat(c_n), "d_x": x.grad}
    if hx is not None:
        found |= {"d_h0": hx[0].grad, "d_c0": hx[1].grad}
    found |= {f"d_{name}": weight.grad for name, weight in weights.items()}
    return {name: value.detach() for name, value in found.items()}


def judge(ours: dict[str, Tensor], theirs: dict[str, Tensor], true: dict[str, Tensor], case: Case) -> Verdict:
    """The verdict on the tensor closest to, or furthest beyond, what is allowed.

    `true` may hold more than `theirs` (the gradients, when only a forward is judged); ours must hold all of theirs.
    """
    eps = TF32_EPS if case.dtype == "tf32" else torch.finfo(case.torch_dtype).eps
    ulp = ALLOWED_ULP + (case.rows**0.5 if case.dtype == "float64" else 0.0)
    worst: Verdict | None = None
    for name, their in theirs.items():
        their_error = _error(their, true[name])
        allowed = ALLOWED_FACTOR * their_error + ulp * eps * _size(true[name])
        error = _error(ours[name], true[name]) if name in ours else float("nan")
        # A NaN compares false, so it is refused.
        verdict = Verdict(error <= allowed, name, error, allowed, their_error)
        if worst is None or _excess(verdict) > _excess(worst):
            worst = verdict
    assert worst is not None
    return worst


def _error(value: Tensor, true: Tensor) -> float:
    """Largest absolute difference; infinite for a wrong shape."""
    if value.shape != true.shape:
        return float("inf")
    return _size(value.double() - true)


def _size(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _excess(verdict: Verdict) -> float:
    """Error as a part of what is allowed: at most 1 for a good one, infinite for a NaN."""
    if verdict.ok:
        return verdict.error / verdict.allowed if verdict.allowed else 0.0
    return verdict.error / verdict.allowed if verdict.allowed and verdict.error < float("inf") else float("inf")
