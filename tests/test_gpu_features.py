"""What nn.LSTM cannot do, on the GPU: the bodies of the CPU's tests again, with their tensors on CUDA.

A body draws with `data` and `twins`, which put what they make where HERE says; the constants of its module and the
parameters of its test are moved. FASTLSTM_TEST_DEVICE=cpu runs all of it on CPU tensors, where no GPU is at hand.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlstm

from .gpu_support import DEVICE, OURS, gpu
from .place import HERE
from .test_compile import (  # noqa: F401
    fresh_compiler,
    test_cell,
    test_compile_time_does_not_grow_with_t,
    test_compiled_autograd,
    test_export_with_free_t_and_b,
    test_inductor,
    test_no_recompilation_after_a_step_of_the_optimizer,
    test_no_recompilation_for_another_t_or_b,
    test_one_compilation_serves_training_of_every_t_and_b,
    test_one_graph_on_every_backend,
    test_one_graph_with_every_argument,
    test_the_graph_holds_one_op_a_layer,
)
from .test_gradients import (  # noqa: F401
    test_anomaly_mode,
    test_backward_in_eval_mode,
    test_checkpointing,
    test_double_backward_of_part_of_the_weights,
    test_gradient_penalty_equals_nn_lstms,
    test_gradients_accumulate,
    test_one_tensor_in_two_roles,
)
from .test_mixed_precision import (  # noqa: F401
    test_autocast_of_every_form_of_call,
    test_the_scaler_skips_a_step_that_overflows,
    test_training_converges_as_in_float32,
)
from .test_recompute import (  # noqa: F401
    interval,
    test_autocast_and_transforms,
    test_compiles_to_one_graph_without_recompilation,
    test_saved_memory_is_at_most_a_third,
    test_the_op_does_the_work_and_twice_with_retain_graph,
)
from .test_reliability import (  # noqa: F401
    test_dropout_repeats_under_a_seed,
    test_eight_python_threads_train_and_serve_one_module,
)
from .test_rl import (  # noqa: F401
    test_gradients_of_ppo_equal_those_of_the_step_loop,
    test_the_training_pass_sees_what_the_rollout_saw,
)
from .test_transforms import (  # noqa: F401
    test_ensemble,
    test_forward_mode_ad,
    test_functionalize,
    test_grad,
    test_jacobian_and_nested_gradients,
    test_jvp_agrees_with_vjp,
    test_vmap_over_inputs_and_ragged_arguments,
)
from .test_transforms_deep import (  # noqa: F401
    test_an_ensemble_and_its_gradients,
    test_backward_through_per_sample_gradients,
    test_dropout_under_vmap,
    test_hessian_and_its_two_other_ways,
    test_hessian_vector_product_and_third_derivative,
    test_per_sample_gradients,
    test_per_sample_gradients_of_an_ensemble,
    test_per_sample_gradients_of_ragged_rows,
    test_per_sample_gradients_of_states,
    test_vmap_in_vmap,
)

pytestmark = gpu
MODULES = [
    sys.modules[f"tests.test_{name}"]
    for name in (
        "compile",
        "gradients",
        "mixed_precision",
        "recompute",
        "reliability",
        "rl",
        "transforms",
        "transforms_deep",
    )
]


def moved(value: Any) -> Any:
    """`value` with every tensor in it where HERE says, and of HERE's dtype if it is floating point."""
    if isinstance(value, Tensor):
        return value.to(HERE.device, HERE.dtype if value.dtype == torch.float64 else None)
    if isinstance(value, dict):
        return {key: moved(part) for key, part in value.items()}
    return type(value)(map(moved, value)) if type(value) in (tuple, list) else value


@pytest.fixture(params=[*OURS, "eager"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn, asked for by name; skips with the reason where it cannot run here."""
    if DEVICE == "cpu" and request.param == "triton":
        pytest.skip("Triton runs on a GPU")
    with fastlstm.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test's tensors on the device; nn.LSTM without cuDNN, which has no double backward and none in eval mode."""
    asked = getattr(request.node, "callspec", None)
    triton = asked is not None and asked.params.get("backend") == "triton"
    with HERE.at(DEVICE, torch.float32 if triton else torch.float64), torch.backends.cudnn.flags(enabled=False):
        if triton:
            loosely = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3)
            monkeypatch.setattr(torch.testing, "assert_close", loosely)
        for module in MODULES:
            for name, value in vars(module).items():
                if isinstance(value, Tensor):
                    monkeypatch.setitem(vars(module), name, moved(value))
        if asked is not None:
            for name, value in asked.params.items():
                asked.params[name] = moved(value)
        yield
