"""Pickles of modules: while torch.nn is patched, and from torch versions with another state."""

from __future__ import annotations

import copy
import copyreg
import io
import pickle
import subprocess
import sys
from collections import OrderedDict
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import nn

import fastlstm

from ..module_pairs import assert_same, data, flat, module_pair, naming

X = data(5, 2, 3)
TorchLSTM, TorchLSTMCell = nn.LSTM, nn.LSTMCell  # the originals, also under the patch


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(3, 4, 2, bidirectional=True, dtype=torch.float64)
        self.cell = nn.LSTMCell(8, 4, dtype=torch.float64)

    def forward(self, x):
        return self.cell(self.lstm(x)[0][-1])[0]


def kinds(model: nn.Module) -> tuple[type, type]:
    return type(model.lstm), type(model.cell)


def built(how: str) -> nn.Module:
    """A model of torch's classes, built before the patch or converted back during it."""
    if how == "before":
        return Model()
    with fastlstm.patch_torch():
        return fastlstm.convert(Model(), to="torch")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("how", ["before", "converted back"])
def test_torch_modules_are_pickled_under_the_patch(how, protocol):
    model = built(how)
    with fastlstm.patch_torch():
        written = pickle.dumps(model, protocol)
        # A name is resolved where the pickle is loaded.
        patched = pickle.loads(written)
        assert kinds(patched) == (fastlstm.LSTM, fastlstm.LSTMCell)
    restored = pickle.loads(written)
    assert kinds(restored) == (TorchLSTM, TorchLSTMCell)
    assert vars(restored.lstm).keys() == vars(Model().lstm).keys()
    assert [id(w) for w in restored.lstm._flat_weights] == [id(w) for w in restored.lstm.parameters()]
    assert_same(restored, Model(), X)
    assert_same(patched, Model(), X)


@pytest.mark.parametrize("how", ["before", "converted back"])
def test_torch_save_under_the_patch(how):
    file, model = io.BytesIO(), built(how)
    with fastlstm.patch_torch():
        torch.save(model, file)
    file.seek(0)
    restored = torch.load(file, weights_only=False)
    assert kinds(restored) == (TorchLSTM, TorchLSTMCell)
    assert_same(restored, Model(), X)


def test_copies_under_the_patch_keep_their_class():
    model = Model()
    with fastlstm.patch_torch():
        copied, shallow = copy.deepcopy(model), copy.copy(model.lstm)
        assert kinds(copied) == (TorchLSTM, TorchLSTMCell)
        assert type(shallow) is TorchLSTM
        assert shallow.weight_hh_l0 is model.lstm.weight_hh_l0
        pickle.dumps(copied)
    for weight in model.parameters():
        weight.detach_().zero_()
    assert_same(copied, Model(), X)


def test_fastlstm_modules_pickled_under_the_patch_load_without_it():
    with fastlstm.patch_torch():
        written = pickle.dumps(Model())
    restored = pickle.loads(written)
    assert kinds(restored) == (fastlstm.LSTM, fastlstm.LSTMCell)
    assert_same(restored, Model(), X)


def test_pickles_of_torch_modules_need_no_fastlstm(tmp_path):
    model = nn.ModuleList([nn.LSTM(3, 4), nn.LSTMCell(3, 4)])
    with fastlstm.patch_torch():
        torch.save(model, tmp_path / "model.pt")
    program = (
        "import sys; sys.modules['fastlstm'] = None; import torch\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "assert [type(m) for m in model] == [torch.nn.LSTM, torch.nn.LSTMCell]\n"
        "assert model[0](torch.zeros(5, 2, 3))[0].shape == (5, 2, 4)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_pickles_sent_to_a_spawned_process_under_the_patch():
    model = Model()
    with fastlstm.patch_torch():
        sent = ForkingPickler.dumps(model)
    received = pickle.loads(sent)
    assert kinds(received) == (TorchLSTM, TorchLSTMCell)
    assert_same(received, Model(), X)


def test_patch_is_undone_completely():
    with fastlstm.patch_torch():
        with fastlstm.patch_torch():
            pass
        pickle.dumps(TorchLSTM(3, 4))
        assert copyreg.dispatch_table.keys() >= {TorchLSTM, TorchLSTMCell}
    assert not copyreg.dispatch_table.keys() & {TorchLSTM, TorchLSTMCell}


def old_state(module: nn.Module, version: str) -> dict[str, Any]:
    """The pickled state of an LSTM in this version of torch."""
    names = [n for n, _ in module.named_parameters()]
    per = len(names) // (module.num_layers * (2 if module.bidirectional else 1))
    state = {
        "training": True,
        "_parameters": OrderedDict(module._parameters),
        "_buffers": OrderedDict(),
        "_backward_hooks": OrderedDict(),
        "_forward_hooks": OrderedDict(),
        "_forward_pre_hooks": OrderedDict(),
        "_modules": OrderedDict(),
        "mode": "LSTM",
        "input_size": module.input_size,
        "hidden_size": module.hidden_size,
        "num_layers": module.num_layers,
        "bias": module.bias,
        "batch_first": module.batch_first,
        "dropout": 0,
        "bidirectional": module.bidirectional,
    }
    if version == "0.1":  # lists of the weights themselves
        weights = list(module._parameters.values())
        state |= {"_backend": None, "dropout_state": {}}
        state["all_weights"] = [weights[k : k + per] for k in range(0, len(names), per)]
        return state
    state["_all_weights"] = [names[k : k + per] for k in range(0, len(names), per)]
    if version == "0.3":
        state |= {"_backend": None, "dropout_state": {}, "_data_ptrs": []}
    if version == "1.4":
        state |= {"_state_dict_hooks": OrderedDict(), "_load_state_dict_pre_hooks": OrderedDict()}
        state |= {"_flat_weights_names": names, "_flat_weights": list(module._parameters.values())}
    return state


class Written:
    """An object that pickles as a module of class `cls` with this state."""

    def __init__(self, cls: type, state: dict[str, Any]) -> None:
        self.cls, self.state = cls, state

    def __reduce__(self):
        return copyreg._reconstructor, (self.cls, object, None), self.state


VERSIONS = ["0.1", "0.3", "1.2", "1.4"]
SHAPES = [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "num_layers": 2, "batch_first": True}]


@pytest.mark.parametrize("kwargs", SHAPES, ids=str)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("cls", [fastlstm.LSTM, nn.LSTM], ids=["fastlstm.LSTM", "nn.LSTM under the patch"])
def test_states_of_early_versions(cls, version, kwargs):
    _, theirs = module_pair(**kwargs)
    written = pickle.dumps(Written(cls, old_state(theirs, version)))
    with fastlstm.patch_torch():
        restored = pickle.loads(written)
    assert type(restored) is fastlstm.LSTM
    assert (restored.proj_size, restored._all_weights) == (0, theirs._all_weights)
    assert restored._flat_weights_names == theirs._flat_weights_names
    assert [id(w) for w in restored._flat_weights] == [id(w) for w in restored.parameters()]
    assert_same(restored, theirs, X)
    copies = {
        "deepcopy": copy.deepcopy(restored),
        "pickle": pickle.loads(pickle.dumps(restored)),
        "float, then double": restored.float().double(),
    }
    for how, again in copies.items():
        torch.testing.assert_close(flat(again(X)), flat(theirs(X)), rtol=1e-6, atol=1e-6, msg=naming(how))
    assert vars(restored).keys() - {"_backend"} == vars(fastlstm.LSTM(3, 4)).keys()
