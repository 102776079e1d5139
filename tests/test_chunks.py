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


@pytest.mark.parametrize(
    "case",
    [
        Case(T=120, B=256, I=1, H=1, hx="tuple"),
        Case(T=80, B=256, I=3, H=2, hx="tuple", bidirectional=True),
        Case(T=80, B=256, I=2, H=6, proj=2, lengths=tuple(80 - k % 9 for k in range(256)), hx="tuple"),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_weight_gradients_of_many_rows(case, backend):
    """More than are summed in one product."""
    check(case, backend)


@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_rounding_does_not_grow_with_the_rows(backend):
    """2.5 ulp where one product over all rows erred by 56."""
    torch.manual_seed(0)
    ours, theirs = fastlstm.LSTM(1, 1), torch.nn.LSTM(1, 1).double()
    theirs.load_state_dict(ours.state_dict())
    x, grad = torch.randn(1000, 256, 1), torch.randn(1000, 256, 1)
    ours(x)[0].backward(grad)
    theirs(x.double())[0].backward(grad.double())
    for got, true in zip(ours.parameters(), theirs.parameters(), strict=True):
        if got.dim() == 2:
            error = (got.grad - true.grad).abs().max()
            assert error <= 10 * torch.finfo(torch.float32).eps * true.grad.abs().max()


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize("rows", [1, 3, 7, 12])
def test_few_rows_of_a_wide_layer(rows, backend):
    """2.5 ulp where products of MKL's on an AMD CPU err by 10: they sum one term after the other over all 4H."""
    torch.manual_seed(0)
    ours, theirs = fastlstm.LSTM(520, 512), torch.nn.LSTM(520, 512).double()
    theirs.load_state_dict(ours.state_dict())
    x, grad = torch.randn(1, rows, 520, requires_grad=True), torch.randn(1, rows, 512)
    true = x.detach().double().requires_grad_()
    ours(x)[0].backward(grad)
    theirs(true)[0].backward(grad.double())
    assert x.grad is not None
    assert true.grad is not None
    assert (x.grad - true.grad).abs().max() <= 6 * torch.finfo(torch.float32).eps * true.grad.abs().max()


@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True}, {"proj_size": 3}, {"bidirectional": True, "proj_size": 3}], ids=str
)
@pytest.mark.parametrize("rows", [97, 150, 192])
@pytest.mark.parametrize("recompute", [False, 2])
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_many_short_rows_and_a_longer_one(rows, options, recompute, backend):
    """More rows in a step than one pass takes, of which all steps together are few."""
    torch.manual_seed(0)
    lstm = fastlstm.LSTM(5, 7, dtype=torch.float64, **options)
    lstm.recompute = recompute
    x = torch.randn(4, rows, 5, dtype=torch.float64, requires_grad=True)
    lengths = torch.ones(rows, dtype=torch.long)
    lengths[0] = min(4, 193 - rows)

    def results(name):
        with fastlstm.use_backend(name):
            y, (h, c) = lstm(x, lengths=lengths)
        return [y, h, c, *torch.autograd.grad((y * y).sum() + h.sum() + c.sum(), [x, *lstm.parameters()])]

    for ours, truth in zip(results(backend), results("reference"), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("directions", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize(("T", "B"), [(4, 3), (160, 128)])
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_a_weight_that_is_an_identity(T, B, directions, backend):
    """Of one direction or both: the native backward has a shortcut for what transforms.py asks of it."""
    torch.manual_seed(0)
    H = 4
    lstm = fastlstm.LSTM(8 * H, H, bidirectional=True, dtype=torch.float64)
    with torch.no_grad():
        for d in directions:
            weight = lstm.weight_ih_l0_reverse if d else lstm.weight_ih_l0
            weight.copy_(torch.eye(8 * H)[d * 4 * H : (d + 1) * 4 * H])
    x = torch.randn(T, B, 8 * H, dtype=torch.float64, requires_grad=True)

    def gradients(name):
        with fastlstm.use_backend(name):
            return torch.autograd.grad(lstm(x)[0].pow(2).sum(), [x, *lstm.parameters()])

    for ours, truth in zip(gradients(backend), gradients("eager"), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("masks", ["plain", "lengths", "lengths and resets"])
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_an_identity_over_several_chunks(masks, backend):
    """Of one direction: the gradients of the gates then lie in dx, and those of the weights are read from there."""
    torch.manual_seed(0)
    T, B, H = 90, 60, 66
    lstm = fastlstm.LSTM(4 * H, H, dtype=torch.float64)
    with torch.no_grad():
        lstm.weight_ih_l0.copy_(torch.eye(4 * H))
    x = torch.randn(T, B, 4 * H, dtype=torch.float64, requires_grad=True)
    lengths = torch.randint(0, T + 1, (B,)) if "lengths" in masks else None
    resets = torch.rand(T, B) < 0.02 if "resets" in masks else None

    def gradients(name):
        with fastlstm.use_backend(name):
            y = lstm(x, lengths=lengths, reset_mask=resets)[0]
            return torch.autograd.grad(y.pow(2).sum(), [x, *lstm.parameters()])

    for ours, truth in zip(gradients(backend), gradients("eager"), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
