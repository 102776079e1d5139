"""Long batches, which the native backend takes in chunks of steps, agree with the reference."""

import pytest
import torch

import fastlstm

from .cases import Case
from .runners import check

# More than three times the rows that one chunk of backward holds at this H (csrc/cpu/layer_backward.cpp, chunk_steps).
T, B, I, H = 900, 4, 3, 160  # noqa: E741


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("masks", ["plain", "lengths", "resets", "lengths and resets"])
def test_chunked_equals_reference(bidirectional, masks):
    torch.manual_seed(0)
    lstm = fastlstm.LSTM(I, H, bidirectional=bidirectional, dtype=torch.float64)
    D = 1 + bidirectional
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    hx = tuple(torch.randn(D, B, H, dtype=torch.float64, requires_grad=True) for _ in range(2))
    lengths = torch.tensor([T, 17, 500, 0]) if "lengths" in masks else None
    reset_mask = torch.rand(T, B) < 0.01 if "resets" in masks else None

    def results(backend):
        with fastlstm.use_backend(backend):
            y, (h, c) = lstm(x, hx, lengths=lengths, reset_mask=reset_mask)
            with torch.no_grad():
                inferred = lstm(x, hx, lengths=lengths, reset_mask=reset_mask)[0]
        loss = (y * y).sum() + h.sum() + c.sum()
        return [y, h, c, inferred, *torch.autograd.grad(loss, [x, *hx, *lstm.parameters()])]

    for ours, truth in zip(results("auto"), results("eager"), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "case", [Case(T=8, B=16, I=8192, H=64), Case(T=8, B=3, I=20000, H=32), Case(T=40, B=2, I=8192, H=32)], ids=str
)
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_rounding_does_not_grow_with_the_length_of_a_sum(case, backend):
    """A BLAS sums long rows in parts; one running sum over 8192 products is already past the bar."""
    check(case, backend)
