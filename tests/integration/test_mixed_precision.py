"""Training in mixed precision: autocast, GradScaler, modules in half precision; each converges as float32 does."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import nn

import fastlstm
from fastlstm.accuracy import error_bounds
from fastlstm.tutorials.common import implementation
from fastlstm.tutorials.gradient_regression import BATCH, GradientRegression

from ..device import TEST_DEVICE
from ..module_pairs import data, module_pair
from ..runners import assert_accurate, precision

X = data(6, 3, 3).float()


class Forecast(nn.Module):
    """Predicts the next value of a series [T, B, 1] at every step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = fastlstm.LSTM(1, 16, 2)
        self.head = nn.Linear(16, 1)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


def train(dtype=None, scaled=False, steps=80):
    """Mean squared error after training on sines of random phase; under autocast to `dtype` if given."""
    model, generator = Forecast(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler(TEST_DEVICE.device, enabled=scaled, init_scale=2.0**14, growth_interval=20)
    losses = []
    for _ in range(steps):
        phase = torch.rand(1, 8, 1, generator=generator, device="cpu").to(TEST_DEVICE.device) * 6.28
        series = (torch.arange(31)[:, None, None] * 0.4 + phase).sin()
        with torch.autocast(TEST_DEVICE.device, dtype or torch.bfloat16, enabled=dtype is not None):
            loss = (model(series[:-1]).float() - series[1:]).pow(2).mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        assert all(w.grad.dtype == torch.float32 for w in model.parameters())
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[0] > 0.2
    return sum(losses[-10:]) / 10


@lru_cache
def float32_error():
    return train()


@pytest.mark.parametrize(
    ("dtype", "scaled"), [(torch.bfloat16, False), (torch.float16, True), (torch.bfloat16, True)], ids=str
)
def test_training_converges_as_in_float32(dtype, scaled):
    assert train(dtype, scaled) < max(2 * float32_error(), 0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tutorial_meets_its_target_with_a_grad_scaler(dtype):
    """The quick form of gradient_regression in mixed precision: its model, data, optimizer and target."""
    task = GradientRegression(quick=True)
    model, history, generator = task.build(implementation("fastlstm")), {}, task.generator()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5)
    scaler = torch.amp.GradScaler(TEST_DEVICE.device)
    windows, slopes = task.training
    for _ in range(task.epochs):
        for rows in torch.randperm(len(slopes), generator=generator).split(BATCH):
            with torch.autocast(TEST_DEVICE.device, dtype):
                predicted = model(windows[rows])
                assert predicted.dtype == dtype
                loss = nn.functional.mse_loss(predicted.float(), slopes[rows])
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    history["validation"] = [task.mse(model, *task.validation)]
    untrained = task.mse(task.build(implementation("fastlstm")), *task.validation)
    (check,) = task.checks(model, history)
    assert check.passed, check
    assert untrained > 2 * check.bar


def test_grad_scaler_skips_a_step_that_overflows(backend):
    lstm = fastlstm.LSTM(3, 4)
    optimizer, scaler = (
        torch.optim.SGD(lstm.parameters(), lr=0.1),
        torch.amp.GradScaler(TEST_DEVICE.device, init_scale=2.0**40),
    )
    before = [w.detach().clone() for w in lstm.parameters()]
    with torch.autocast(TEST_DEVICE.device, torch.float16):
        loss = lstm(X)[0].float().pow(2).sum()
    scaler.scale(loss).backward()
    assert not all(w.grad.isfinite().all() for w in lstm.parameters())  # the max of float16 is 65504
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(a, b) for a, b in zip(before, lstm.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 2}], ids=str)
def test_modules_in_half_precision_train(dtype, options, backend):
    """Everything in one dtype, results and gradients included."""
    if backend == "triton" and "proj_size" in options:
        pytest.skip("no projection")
    ours, theirs = module_pair(**options)
    ours.to(dtype)
    theirs.double().load_state_dict({name: w.double() for name, w in ours.state_dict().items()})
    x = X.to(dtype)

    def run(module, x):
        output, (h_n, c_n) = module(x)
        grads = torch.autograd.grad(output.sum() + c_n.sum(), list(module.parameters()))
        named = dict(zip(dict(module.named_parameters()), grads, strict=True))
        return {"output": output.detach(), "h_n": h_n.detach(), "c_n": c_n.detach(), **named}

    results = run(ours, x)
    assert {t.dtype for t in results.values()} == {dtype}
    assert_accurate(results, *error_bounds(lambda: run(theirs, x.double()), precision(dtype, backend)))


def test_autocast_with_every_call_form(backend):
    """lengths, reset_mask, cell states, packed input: low-precision results, float32 gradients, close to float32's."""
    ours, _ = module_pair(bidirectional=True, dtype=torch.float32)
    packed = nn.utils.rnn.pack_padded_sequence(X, [6, 2, 3], enforce_sorted=False)
    calls = (
        {"lengths": [6, 0, 3]},
        {"reset_mask": X[..., 0] > 0},
        {"return_cell_states": True},
        {"hx": (data(2, 3, 4).float(), data(2, 3, 4).float())},
    )
    for call in (None, *calls):
        results = []
        for enabled in (False, True):
            case = f"{'packed' if call is None else list(call)}, autocast {enabled}"
            ours.zero_grad()
            with torch.autocast(TEST_DEVICE.device, torch.bfloat16, enabled=enabled):
                output, *rest = ours(packed) if call is None else ours(X, **call)
            output = output.data if call is None else output
            assert output.dtype == (torch.bfloat16 if enabled else torch.float32), case
            (output.float().pow(2).sum() + sum(r.float().sum() for r in rest[1:] if call)).backward()
            assert ours.weight_hh_l0.grad.dtype == torch.float32, case
            results.append((output.float().detach(), ours.weight_hh_l0.grad.clone()))
        for exact, low in zip(*results, strict=True):
            assert float((exact - low).abs().max()) <= 0.03 * float(exact.abs().max()), call
