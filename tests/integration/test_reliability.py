"""Reliability of services and long training: threads, worker processes, old pickles, seeds, determinism."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fastlstm

from ..cpu.test_threads import together
from ..device import TEST_DEVICE

ROOT = Path(__file__).parents[2]


def test_eight_python_threads_train_and_infer_with_one_module(backend):
    """Concurrent training and inference give the results of running separately."""
    torch.manual_seed(0)
    lstm = fastlstm.LSTM(3, 17, 2, bidirectional=True)
    inputs = [torch.randn(6, 2, 3) for _ in range(8)]
    weights = list(lstm.parameters())

    def gradients(x):
        return torch.autograd.grad(lstm(x)[0].pow(2).sum(), weights)

    expected = [(gradients(x), lstm(x)[0].detach()) for x in inputs]

    def work(k):
        for _ in range(5):
            for got, wanted in zip(gradients(inputs[k]), expected[k][0], strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
            with torch.no_grad():
                assert torch.equal(lstm(inputs[k])[0], expected[k][1])

    together(8, work)


class Features(Dataset):
    """A data set that runs an LSTM in the loader's workers."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.lstm = fastlstm.LSTM(3, 8).eval()
        self.inputs = torch.randn(4, 5, 3)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, k: int):
        with torch.no_grad():
            return self.lstm(self.inputs[k])[0]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers(method):
    if method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    features = Features()
    expected = torch.stack([features[k] for k in range(4)])  # the parent runs it before the workers start
    loader = DataLoader(features, batch_size=2, num_workers=2, multiprocessing_context=method, timeout=120)
    torch.testing.assert_close(torch.cat(list(loader)), expected)


def test_module_saved_by_an_earlier_version_loads():
    """tests/data/lstm-0.1.0.pt: torch.save of a module, an input and the output that 0.1.0 gave."""
    saved = torch.load(ROOT / "tests/data/lstm-0.1.0.pt", weights_only=False)
    module = saved["module"]
    assert type(module) is fastlstm.LSTM
    torch.testing.assert_close(module(saved["input"])[0], saved["output"])
    assert module.recompute is False  # an attribute added later has its default


def test_attributes_of_a_later_version_are_ignored():
    lstm = fastlstm.LSTM(3, 4)
    state = {**lstm.__getstate__(), "option_of_the_future": 3}
    restored = fastlstm.LSTM.__new__(fastlstm.LSTM)
    restored.__setstate__(state)
    x = torch.randn(2, 1, 3)
    assert torch.equal(restored(x)[0], lstm(x)[0])


def test_dropout_repeats_under_a_seed(backend):
    lstm, x = fastlstm.LSTM(3, 8, 3, dropout=0.5), torch.randn(5, 2, 3)
    rng = torch if TEST_DEVICE.device == "cpu" else torch.get_device_module(TEST_DEVICE.device)
    with torch.device("cpu"):  # lengths must be on the CPU
        packed = nn.utils.rnn.pack_sequence([x[:, 0], x[:3, 1]])
    for form, batch in {"padded": x, "packed": packed}.items():
        results = []
        for seed in (1, 1, 2):
            rng.manual_seed(seed)
            output = lstm(batch)[0]
            results.append(output.data if len(output) == 4 else output)
        assert torch.equal(results[0], results[1]), form
        assert not torch.equal(results[0], results[2]), form
        state = rng.get_rng_state()
        first = lstm(x)[0]
        rng.set_rng_state(state)
        assert torch.equal(lstm(x)[0], first), form


@pytest.mark.parametrize("H", [8, 100])
def test_row_is_independent_of_its_batch_to_within_rounding(H, backend):
    """Not bitwise equal: small batches use other kernels (docs/limits.md)."""
    torch.manual_seed(0)
    lstm, x = fastlstm.LSTM(5, H), torch.randn(20, 33, 5)
    with torch.no_grad():
        whole = lstm(x)[0]
        for rows in (slice(0, 1), slice(3, 5), slice(7, 33)):
            assert float((lstm(x[:, rows])[0] - whole[:, rows]).abs().max()) <= 1e-6, rows


PROGRAM = """
import sys, torch, fastlstm
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
lstm, x = fastlstm.LSTM(20, 64, bidirectional=True), torch.randn(30, 32, 20)
for name in ("native", "eager"):
    fastlstm.use_backend(name)
    lstm.zero_grad()
    output, _ = lstm(x)
    output.sum().backward()
    print(name, output.detach().numpy().tobytes().hex()[:4000], lstm.weight_hh_l0.grad.numpy().tobytes().hex()[:4000])
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_results_are_bitwise_deterministic_across_processes(threads):
    if "not available" in str(fastlstm.explain(fastlstm.LSTM(2, 3), torch.zeros(1, 1, 2))):
        pytest.skip("the extension is not built")
    command = [sys.executable, "-c", PROGRAM, str(threads)]
    runs = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120) for _ in range(2)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    assert runs[0].stdout == runs[1].stdout
