"""Device and dtype of the tests' tensors: CPU and float64, except in tests/gpu/test_gpu_features.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class DeviceAndDtype:
    device: str = "cpu"
    dtype: torch.dtype = torch.float64  # the widest that the backend in use supports

    @contextmanager
    def use(self, device: str, dtype: torch.dtype) -> Iterator[None]:
        """Create tensors without an explicit device, such as those of `data` and `module_pair`, on `device`."""
        before = self.device, self.dtype
        self.device, self.dtype = device, dtype
        try:
            with torch.device(device):
                yield
        finally:
            self.device, self.dtype = before


TEST_DEVICE = DeviceAndDtype()
