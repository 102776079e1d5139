"""Where the tests' tensors lie: on CPU in float64, until tests/test_gpu_features.py runs the same bodies elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class Place:
    device: str = "cpu"
    dtype: torch.dtype = torch.float64  # the widest that the backend at work can compute

    @contextmanager
    def at(self, device: str, dtype: torch.dtype) -> Iterator[None]:
        """Tensors that name no device, those of `data` and `twins` among them, are made on `device`."""
        before = self.device, self.dtype
        self.device, self.dtype = device, dtype
        try:
            with torch.device(device):
                yield
        finally:
            self.device, self.dtype = before


HERE = Place()
