"""The CPU kernels' sigmoid and tanh: max ulp error over their whole range, and non-finite arguments."""

import mpmath
import numpy as np
import pytest
import torch

from fastlstm.backends import native

pytestmark = pytest.mark.skipif(native.extension is None, reason=f"native: {native.load_error}")

MAX_ULP = 2.5


def arguments(dtype: torch.dtype) -> torch.Tensor:
    """Dense in the nonlinear range, every binade down to the linear range, and far into saturation."""
    generator = torch.Generator().manual_seed(0)
    limit = 86.0 if dtype == torch.float32 else 700.0
    magnitudes = torch.logspace(-30, 0, 4001, dtype=torch.float64)
    x = torch.cat(
        [
            torch.linspace(-12, 12, 20001, dtype=torch.float64),
            torch.randn(20000, generator=generator, dtype=torch.float64) * 4,
            torch.linspace(-limit, limit, 4001, dtype=torch.float64),
            magnitudes,
            -magnitudes,
        ]
    )
    return x.to(dtype)


def exact(x: torch.Tensor, name: str) -> torch.Tensor:
    """The function in much higher precision than x: float64 for float32, 30 digits for float64."""
    if x.dtype == torch.float32:
        x = x.double()
        # torch's sigmoid and tanh in float64 are accurate to an ulp
        return x.sigmoid() if name == "sigmoid" else x.tanh()
    with mpmath.workdps(30):
        f = mpmath.tanh if name == "tanh" else lambda v: 1 / (1 + mpmath.exp(-v))
        return torch.tensor([float(f(mpmath.mpf(v))) for v in x.tolist()], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_error_stays_within_the_bound(name, dtype):
    x = arguments(dtype)
    if dtype == torch.float64:
        x = x[::7].contiguous()  # mpmath is slow
    reference = exact(x, name)
    ours = native.extension.activation(x, name)
    ulp = torch.from_numpy(np.spacing(reference.abs().to(dtype).numpy())).double()
    error = (ours.double() - reference.double()).abs() / ulp
    worst = int(error.argmax())
    assert error[worst] <= MAX_ULP, f"{float(error[worst]):.2f} ulp at x = {float(x[worst])!r}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_non_finite_arguments(dtype):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e4, -1e4, 0.0], dtype=dtype)
    sigmoid = native.extension.activation(x, "sigmoid")
    tanh = native.extension.activation(x, "tanh")
    assert sigmoid[0].isnan()
    assert tanh[0].isnan()
    assert tanh[1:].tolist() == [1, -1, 1, -1, 0]
    # exact, because 0 * inf must be NaN in weight gradients, as in nn.LSTM
    assert sigmoid[1:].tolist() == [1, 0, 1, 0, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sigmoid_falls_to_zero_where_exp_overflows(dtype):
    """Around the largest argument of exp: no NaN, monotonic, and an error below the smallest normal number."""
    edge = 88.0 if dtype == torch.float32 else 709.0
    x = -torch.linspace(edge - 2, edge + 2, 40001, dtype=torch.float64).to(dtype)
    sigmoid = native.extension.activation(x, "sigmoid").double()
    assert (sigmoid.diff() <= 0).all()
    assert ((sigmoid - x.double().sigmoid()).abs() <= torch.finfo(dtype).tiny).all()
    assert sigmoid[-1] == 0


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nan_of_any_payload(dtype, name):
    """Tail lanes may read any NaN from uninitialized memory; make sanitize checks the arithmetic."""
    integer, bits = (torch.int32, 31) if dtype == torch.float32 else (torch.int64, 63)
    payloads = torch.tensor([-1, 2**bits - 1, 2**bits - 100, -100], dtype=integer)
    assert native.extension.activation(payloads.view(dtype), name).isnan().all()


@pytest.mark.parametrize("n", range(18))
def test_any_number_of_elements(n):
    x = torch.linspace(-3, 3, max(n, 1))[:n].contiguous()
    assert torch.allclose(native.extension.activation(x, "tanh"), x.tanh(), atol=1e-6)
