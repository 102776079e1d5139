"""nn.LSTM's surface besides forward: constructor, attributes, state_dict, initial values, methods."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import fastlstm

from ..module_pairs import CONFIGURATIONS, data, module_pair

every_configuration = pytest.mark.parametrize("kwargs", CONFIGURATIONS, ids=str)


def test_base_class():
    lstm = fastlstm.LSTM(3, 4)
    assert isinstance(lstm, nn.RNNBase)
    assert not isinstance(lstm, nn.LSTM)  # torch.compile would refuse it


def test_arguments_by_position():
    args = (3, 6, 2, False, True, 0.5, True, 2, "meta", torch.float64)
    ours, theirs = fastlstm.LSTM(*args), nn.LSTM(*args)
    assert repr(ours) == repr(theirs)
    assert ours.weight_hr_l1_reverse.shape == (2, 6)
    assert ours.weight_ih_l0.device.type == "meta"
    assert ours.weight_ih_l0.dtype == torch.float64


def test_forward_arguments_by_keyword():
    lstm = fastlstm.LSTM(3, 4)
    x, hx = torch.zeros(2, 1, 3), (torch.ones(1, 1, 4), torch.ones(1, 1, 4))
    assert torch.equal(lstm(input=x, hx=hx)[0], lstm(x, hx)[0])
    parameters = list(inspect.signature(lstm.forward).parameters.values())
    assert [(p.name, p.default) for p in parameters[:2]] == [("input", inspect.Parameter.empty), ("hx", None)]
    assert all(p.kind == p.KEYWORD_ONLY for p in parameters[2:])


@every_configuration
def test_attributes(kwargs):
    ours, theirs = module_pair(3, 4, **kwargs)
    for name in theirs.__constants__:
        assert getattr(ours, name) == getattr(theirs, name), name
        assert type(getattr(ours, name)) is type(getattr(theirs, name)), name
    assert ours.mode == "LSTM"
    assert ours.__constants__ == theirs.__constants__
    assert ours._all_weights == theirs._all_weights
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert [id(w) for w in ours._flat_weights] == [id(w) for w in ours.parameters()]
    for mine, yours in zip(ours.all_weights, theirs.all_weights, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, yours, strict=True))
    assert set(dir(theirs)) <= set(dir(ours))


def test_dropout_is_a_float():
    assert type(fastlstm.LSTM(3, 4, 2, dropout=1).dropout) is float


@every_configuration
def test_initial_weights_from_a_seed(kwargs):
    states, after = [], []
    for cls in (fastlstm.LSTM, nn.LSTM):
        torch.manual_seed(7)
        states.append(cls(3, 4, **kwargs).state_dict())
        after.append(torch.rand(1))
    ours, theirs = states
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert torch.equal(ours[name], value), name
    assert torch.equal(*after)  # the random state is the same afterwards


def test_state_dict_order():
    names = list(fastlstm.LSTM(3, 4, 2, bidirectional=True, proj_size=2).state_dict())
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    assert names == [f"{kind}_l{k}{d}" for k in (0, 1) for d in ("", "_reverse") for kind in kinds]


def test_reset_parameters():
    ours, theirs = module_pair(num_layers=2, bidirectional=True, proj_size=2)
    for module in (ours, theirs):
        torch.manual_seed(3)
        module.reset_parameters()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    assert max(float(w.detach().abs().max()) for w in ours.parameters()) <= 0.5  # 1 / sqrt(hidden_size)


@every_configuration
def test_repr(kwargs):
    ours, theirs = module_pair(3, 4, **kwargs)
    assert ours.extra_repr() == theirs.extra_repr()
    assert repr(nn.Sequential(ours)) == repr(nn.Sequential(theirs))


@every_configuration
@pytest.mark.parametrize("batch_sizes", [None, torch.tensor([6, 2])], ids=["padded", "packed"])
def test_expected_sizes(kwargs, batch_sizes):
    ours, theirs = module_pair(3, 4, **kwargs)
    x = torch.empty(5, 2, 3)
    assert ours.get_expected_hidden_size(x, batch_sizes) == theirs.get_expected_hidden_size(x, batch_sizes)
    assert ours.get_expected_cell_size(x, batch_sizes) == theirs.get_expected_cell_size(x, batch_sizes)


def test_check_methods():
    ours, theirs = module_pair()
    x, good, bad = data(5, 2, 3), data(1, 2, 4), data(1, 2, 5)
    for module in (ours, theirs):
        assert module.check_input(x, None) is None, type(module)
        assert module.check_forward_args(x, (good, good), None) is None, type(module)
        assert module.check_hidden_size(good, (1, 2, 4)) is None, type(module)
    calls = {
        "input size": lambda m: m.check_input(x[..., :2], None),
        "input dtype": lambda m: m.check_input(x.float(), None),
        "2-D input": lambda m: m.check_input(x[0], None),
        "packed 3-D input": lambda m: m.check_input(x, torch.tensor([1])),
        "h0 size": lambda m: m.check_forward_args(x, (bad, good), None),
        "c0 size": lambda m: m.check_forward_args(x, (good, bad), None),
        "hidden size": lambda m: m.check_hidden_size(bad, (1, 2, 4)),
        "hidden size, own message": lambda m: m.check_hidden_size(bad, (1, 2, 4), "wanted {}, not {}"),
    }
    for name, call in calls.items():
        with pytest.raises((RuntimeError, ValueError)) as theirs_raised:
            call(theirs)
        with pytest.raises(theirs_raised.type) as ours_raised:
            call(ours)
        assert str(ours_raised.value) == str(theirs_raised.value), name


def test_permute_hidden():
    ours, theirs = module_pair()
    hx, order = (data(1, 3, 4), data(1, 3, 4, seed=1)), torch.tensor([2, 0, 1])
    for mine, yours in zip(ours.permute_hidden(hx, order), theirs.permute_hidden(hx, order), strict=True):
        assert torch.equal(mine, yours)
    assert ours.permute_hidden(hx, None) is hx


def test_flatten_parameters_changes_nothing():
    lstm = fastlstm.LSTM(3, 4, 2)
    before = [(id(w), w.data_ptr()) for w in lstm.parameters()]
    assert lstm.flatten_parameters() is None
    assert [(id(w), w.data_ptr()) for w in lstm.parameters()] == before


def test_setting_a_weight_updates_flat_weights():
    lstm = fastlstm.LSTM(3, 4)
    weight = nn.Parameter(torch.zeros(16, 4))
    lstm.weight_hh_l0 = weight
    assert lstm._flat_weights[1] is weight
    assert lstm.all_weights[0][1] is weight
    lstm.double()
    assert [w.dtype for w in lstm._flat_weights] == [torch.float64] * 4
    assert lstm._flat_weights[1] is lstm.weight_hh_l0


def test_replicas_have_separate_weight_lists():
    lstm = fastlstm.LSTM(3, 4)
    replica = lstm._replicate_for_data_parallel()
    assert replica._flat_weights is not lstm._flat_weights
    assert replica._flat_weights_names is not lstm._flat_weights_names
    assert replica._flat_weights_names == lstm._flat_weights_names


@pytest.mark.parametrize("move", ["double", "float", "half", "bfloat16"])
def test_dtype_moves(move):
    ours, theirs = (getattr(m, move)() for m in module_pair(num_layers=2, bidirectional=True))
    x = data(3, 2, 3).to(ours.weight_ih_l0.dtype)
    (output, (h_n, c_n)), (expected, _) = ours(x), theirs(x)
    assert output.dtype == h_n.dtype == c_n.dtype == expected.dtype == x.dtype
    torch.testing.assert_close(output, expected, rtol=4 * torch.finfo(x.dtype).eps, atol=torch.finfo(x.dtype).eps)


def test_train_and_eval_and_requires_grad():
    lstm = fastlstm.LSTM(3, 4)
    assert lstm.training
    assert not lstm.eval().training
    lstm.requires_grad_(False)
    assert not lstm(torch.zeros(2, 1, 3))[0].requires_grad
