"""Features beyond nn.LSTM on the GPU: runs tests of the CPU with their tensors on CUDA.

`data` and `module_pair` create tensors on TEST_DEVICE; constants of the tests' modules and parameters of the tests are
moved. FASTLSTM_TEST_DEVICE=cpu runs these tests on CPU tensors, without a GPU.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlstm

from ..device import TEST_DEVICE
from ..integration.test_compile import (  # noqa: F401
    fresh_compiler,
    test_cell,
    test_compile_time_does_not_grow_with_t,
    test_compiled_autograd,
    test_export_with_dynamic_t_and_b,
    test_graph_has_one_op_per_layer,
    test_inductor,
    test_no_recompilation_after_a_step_of_the_optimizer,
    test_no_recompilation_for_another_t_or_b,
    test_one_compilation_covers_training_at_every_t_and_b,
    test_one_graph_on_every_backend,
    test_one_graph_with_every_argument,
)
from ..integration.test_distributed import test_activation_checkpointing_replays_dropout  # noqa: F401
from ..integration.test_mixed_precision import (  # noqa: F401
    test_autocast_with_every_call_form,
    test_grad_scaler_skips_a_step_that_overflows,
    test_modules_in_half_precision_train,
    test_training_converges_as_in_float32,
)
from ..integration.test_reliability import (  # noqa: F401
    test_dropout_repeats_under_a_seed,
    test_eight_python_threads_train_and_infer_with_one_module,
)
from ..integration.test_rl import (  # noqa: F401
    test_gradients_of_ppo_equal_those_of_the_step_loop,
    test_training_pass_equals_the_rollout,
)
from ..integration.test_transforms import (  # noqa: F401
    test_ensemble,
    test_forward_mode_ad,
    test_functionalize,
    test_grad,
    test_jacobian_and_nested_gradients,
    test_jvp_agrees_with_vjp,
    test_under_compile,
    test_vmap_over_inputs_and_ragged_arguments,
)
from ..integration.test_transforms_deep import (  # noqa: F401
    test_backward_through_per_sample_gradients,
    test_dropout_under_vmap,
    test_ensemble_gradients,
    test_hessian_by_three_compositions,
    test_hessian_vector_product_and_third_derivative,
    test_per_sample_gradients,
    test_per_sample_gradients_of_an_ensemble,
    test_per_sample_gradients_of_ragged_rows,
    test_per_sample_gradients_of_states,
    test_vmap_in_vmap,
)
from ..module_pairs import data, module_pair, naming
from ..ops.test_gradients import (  # noqa: F401
    test_aliasing_arguments,
    test_anomaly_mode,
    test_backward_in_eval_mode,
    test_backward_twice_with_retain_graph,
    test_checkpointing,
    test_double_backward_of_some_weights,
    test_gradgradcheck,
    test_gradient_penalty_equals_nn_lstms,
    test_gradients_accumulate,
)
from ..ops.test_recompute import (  # noqa: F401
    interval,
    test_autocast_and_transforms,
    test_compiles_to_one_graph_without_recompilation,
    test_recompute_op_runs_and_backward_twice_with_retain_graph,
    test_saved_memory_is_at_most_a_third,
)
from .gpu_support import DEVICE, each_backend, gpu  # noqa: F401

pytestmark = gpu
MODULES = [
    sys.modules[f"tests.{name}"]
    for name in (
        "integration.test_compile",
        "integration.test_distributed",
        "integration.test_mixed_precision",
        "integration.test_reliability",
        "integration.test_rl",
        "integration.test_transforms",
        "integration.test_transforms_deep",
        "ops.test_gradients",
        "ops.test_recompute",
    )
]


def moved(value: Any) -> Any:
    """Move every tensor in `value` to TEST_DEVICE, and floating-point ones to its dtype."""
    if isinstance(value, Tensor):
        return value.to(TEST_DEVICE.device, TEST_DEVICE.dtype if value.dtype == torch.float64 else None)
    if isinstance(value, dict):
        return {key: moved(part) for key, part in value.items()}
    return type(value)(map(moved, value)) if type(value) in (tuple, list) else value


@pytest.fixture(autouse=True)
def on_test_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Move the test's tensors. cuDNN is off: it has no double backward, and no backward in eval mode."""
    callspec = getattr(request.node, "callspec", None)
    triton = callspec is not None and callspec.params.get("backend") == "triton"
    with TEST_DEVICE.use(DEVICE, torch.float32 if triton else torch.float64), torch.backends.cudnn.flags(enabled=False):
        if triton:
            loosely = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3)
            monkeypatch.setattr(torch.testing, "assert_close", loosely)
        for module in MODULES:
            for name, value in vars(module).items():
                if isinstance(value, Tensor):
                    monkeypatch.setitem(vars(module), name, moved(value))
        if callspec is not None:
            for name, value in callspec.params.items():
                callspec.params[name] = moved(value)
        yield


@pytest.mark.skipif(DEVICE == "cpu", reason="peaks are counted on a GPU")
def test_recompute_halves_the_peak_of_a_long_training_step(backend):
    """Of y, dy and what one interval needs, against gates and cells of every step beside them."""
    T, B, H = 4096, 16, 64
    lstm, x = fastlstm.LSTM(H, H), torch.randn(T, B, H)
    weights, peaks, results = list(lstm.parameters()), {}, {}
    for recompute in (False, True, False, True):  # the first two leave workspaces behind
        lstm.recompute = recompute
        torch.cuda.synchronize()
        resting = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results[recompute] = torch.autograd.grad(lstm(x)[0].sum(), weights)
        peaks[recompute] = torch.cuda.max_memory_allocated() - resting
    for a, b in zip(*results.values(), strict=True):
        assert float((a - b).abs().max()) <= 1e-4 * float(a.abs().max())
    assert peaks[True] <= 0.6 * peaks[False], {key: f"{peak / 2**20:.1f} MiB" for key, peak in peaks.items()}


def test_modules_move_between_devices(backend):
    """pickle, deepcopy, state_dict and .to, with the optimizer's view of the weights: the device's numbers stay."""
    ours, theirs = module_pair(num_layers=2, bidirectional=True)
    x = data(4, 2, 3)
    expected = ours(x)[0]
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(ours),
        "pickle": pickle.loads(pickle.dumps(ours)),
        "torch.load": torch.load(buffer, weights_only=False),
        "convert": fastlstm.convert(copy.deepcopy(theirs)),
    }
    for how, other in copies.items():
        assert {w.device for w in other.parameters()} == {x.device}, how
        torch.testing.assert_close(other(x)[0], expected, msg=naming(how))
    torch.testing.assert_close(nn.Sequential(ours).to("cpu")[0].weight_hh_l0, theirs.weight_hh_l0.cpu())
    if backend != "triton":
        torch.testing.assert_close(ours(x.cpu())[0], expected.cpu())
    theirs.load_state_dict(ours.state_dict())  # copies from CPU to the device
    torch.testing.assert_close(theirs(x)[0], expected)
    there = ours.to(DEVICE)
    torch.testing.assert_close(there(x)[0], expected)
    on_cpu = torch.load(io.BytesIO(_saved(there.state_dict())), map_location="cpu")
    assert {w.device.type for w in on_cpu.values()} == {"cpu"}
    fresh = fastlstm.LSTM(3, 4, 2, bidirectional=True, dtype=TEST_DEVICE.dtype)
    fresh.load_state_dict(on_cpu)
    torch.testing.assert_close(fresh(x)[0], expected)


def _saved(state: dict[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
