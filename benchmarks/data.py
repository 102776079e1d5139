"""The inputs of a case: `Inputs`, equal for all implementations, drawn from a fixed seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from benchmarks.cases import SEED, Case


@dataclass(frozen=True)
class Inputs:
    """All inputs and weights of a case, in its dtype; time-major as nn.LSTM's default."""

    x: Tensor  # [T, B, I]
    grad_output: Tensor  # [T, B, D*P], gradient of the output
    hx: tuple[Tensor, Tensor] | None  # [L*D, B, P], [L*D, B, H] for a streaming case
    lengths: Tensor | None  # [B] int64 on the CPU for a packed case
    weights: dict[str, Tensor]  # by nn.LSTM's parameter names

    def packed(self, padded: Tensor) -> PackedSequence:
        """[T, B, F] as a PackedSequence with this case's lengths."""
        assert self.lengths is not None
        return pack_padded_sequence(padded, self.lengths, enforce_sorted=False)

    def unpacked(self, rows: Tensor) -> Tensor:
        """[sum of lengths, F], ordered as PackedSequence.data, back to [T, B, F] with zeros past each length."""
        like = self.packed(self.x)
        whole = PackedSequence(rows, like.batch_sizes, like.sorted_indices, like.unsorted_indices)
        return pad_packed_sequence(whole, total_length=len(self.x))[0]


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """Seeded inputs. Drawn in float32 on the CPU for every dtype and device, so that all get equal values."""
    T, B, D, dtype = case.T, case.B, case.D, case.torch_dtype
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        template = torch.nn.LSTM(case.I, case.H, case.L, bidirectional=case.bidirectional, proj_size=case.proj)
    hx = (normal(case.L * D, B, case.P), normal(case.L * D, B, case.H)) if case.kind == "stream" else None
    return Inputs(
        x=normal(T, B, case.I),
        grad_output=normal(T, B, D * case.P),
        hx=hx,
        lengths=case.lengths(),
        weights={name: weight.detach().to(device, dtype) for name, weight in template.named_parameters()},
    )
