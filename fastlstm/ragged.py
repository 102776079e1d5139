"""PackedSequence data to a padded batch with lengths and back: `PackedLayout`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedLayout:
    """Where the N = sum(lengths) packed rows lie in a padded batch of T steps and B rows (longest row first)."""

    T: int
    B: int
    lengths: Tensor  # [B] int64, on the CPU as batch_sizes is
    positions: Tensor  # [N] int64, on the data's device: t * B + b of each packed row

    @classmethod
    def of(cls, batch_sizes: Tensor, data: Tensor) -> PackedLayout:
        """The layout of a PackedSequence's data [N, n] and batch_sizes [T] (rows that have step t)."""
        lengths = torch.ops.fastlstm.packed_lengths.default(batch_sizes)
        return cls._of(batch_sizes, lengths, data.shape[0], data.device)

    @classmethod
    def of_lengths(cls, lengths: Tensor) -> PackedLayout:
        """The layout of rows of these lengths [B], longest first, on the CPU."""
        steps = torch.arange(int(lengths[0]), device="cpu")
        batch_sizes = (lengths > steps[:, None]).sum(1)
        return cls._of(batch_sizes, lengths, int(batch_sizes.sum()), lengths.device)

    @classmethod
    def _of(cls, batch_sizes: Tensor, lengths: Tensor, N: int, device: torch.device) -> PackedLayout:
        T, B = batch_sizes.shape[0], lengths.shape[0]
        starts = torch.cumsum(batch_sizes, 0) - batch_sizes
        shift = torch.arange(T, device="cpu") * B - starts  # from packed row to padded row, per step
        positions = torch.arange(N, device="cpu") + torch.repeat_interleave(shift, batch_sizes, output_size=N)
        return cls(T, B, lengths, positions.to(device, non_blocking=True))

    def pad(self, data: Tensor) -> Tensor:
        """[N, n] to [T, B, n], zeros in the padding."""
        padded = data.new_zeros(self.T * self.B, data.shape[1])
        padded[self.positions] = data  # not index_copy_, for which vmap has no rule
        return padded.view(self.T, self.B, -1)

    def pack(self, padded: Tensor) -> Tensor:
        """[T, B, n] to [N, n]."""
        return padded.flatten(0, 1).index_select(0, self.positions)
