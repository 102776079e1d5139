"""What leaves a frozen module: state_dict, load_state_dict, copies and pickles."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fastlstm
from fastlstm.backends import native
from fastlstm.portable import quantized

from ..module_pairs import naming
from .forms import FORMS, NO_EXTENSION

pytestmark = pytest.mark.skipif(**NO_EXTENSION)


class Model(nn.Module):
    """x [T, B, 3] -> [B, 5]; both classes, all kinds of weights."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.lstm = nn.LSTM(3, 6, 2, bidirectional=True, proj_size=4, dtype=dtype)
        self.cell = nn.LSTMCell(8, 5, dtype=dtype)

    def forward(self, x):
        return self.cell(self.lstm(x)[0][-1])[0]


def frozen(form: str, seed: int = 0) -> Model:
    dtype, weights = FORMS[form]
    return fastlstm.freeze(Model(dtype, seed), weights)


def x_for(form: str) -> torch.Tensor:
    return torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1)).to(FORMS[form][0])


def assert_equal(a: nn.Module, b: nn.Module, form: str, case: object = "modules") -> None:
    """Equal results and equal state, to the bit."""
    torch.testing.assert_close(a(x_for(form)), b(x_for(form)), rtol=0, atol=0, msg=naming(case))
    states = a.state_dict(), b.state_dict()
    assert list(states[0]) == list(states[1]), case
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), (case, name)


@pytest.mark.parametrize("form", FORMS)
def test_state_dict(form):
    """Names and order are those of nn.LSTM, scales follow; the values are the weights in the form."""
    dtype, weights = FORMS[form]
    stored, state = Model(dtype).state_dict(), frozen(form).state_dict()
    assert [name for name in state if not name.endswith("_scale")] == list(stored)
    matrices = [name for name, value in stored.items() if value.dim() == 2]
    scales = sorted(f"{name}_scale" for name in matrices) if form == "int8" else []
    assert sorted(name for name in state if name.endswith("_scale")) == scales
    for name, value in stored.items():
        if value.dim() == 1 or weights is None:
            assert torch.equal(state[name], value), name
            assert state[name].dtype == dtype, name
        elif weights == torch.bfloat16:
            assert torch.equal(state[name], value.bfloat16()), name
        else:
            q, scale = quantized(value)
            assert torch.equal(state[name], q), name
            assert torch.equal(state[f"{name}_scale"], scale), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_load_state_dict(form, assign):
    module, other = frozen(form), frozen(form, seed=1)
    assert not torch.equal(module(x_for(form)), other(x_for(form)))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    result = other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_equal(module, other, form)
    # The cell alone, as the root.
    other = frozen(form, seed=1)
    other.cell.load_state_dict(module.cell.state_dict())
    assert torch.equal(
        other.cell(torch.ones(2, 8).to(FORMS[form][0]))[0], module.cell(torch.ones(2, 8).to(FORMS[form][0]))[0]
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_float_state_is_brought_into_the_form(form, source):
    """As if the module had been frozen with these weights in its dtype."""
    dtype, weights = FORMS[form]
    state = Model(source, seed=1).state_dict()
    module = frozen(form)
    module.load_state_dict(state)
    model = Model(dtype)
    model.load_state_dict(state)
    assert_equal(module, fastlstm.freeze(model, weights), form)


@pytest.mark.parametrize("form", FORMS)
def test_part_of_a_state_not_strict(form):
    """Tensors that are there are loaded, the others stay, and missing keys are named; unexpected ones as well."""
    module, other = frozen(form), frozen(form, seed=1)
    taken = {"lstm.weight_hh_l1", "lstm.bias_ih_l0_reverse", "cell.weight_ih"}
    state = module.state_dict()
    expected = other.state_dict()
    part = {}
    for name in state:
        if name.removesuffix("_scale") in taken:
            part[name] = expected[name] = state[name]
    result = other.load_state_dict({**part, "lstm.of_the_future": torch.zeros(1)}, strict=False)
    assert set(result.missing_keys) == set(Model().state_dict()) - taken
    assert result.unexpected_keys == ["lstm.of_the_future"]
    for name, value in other.state_dict().items():
        assert torch.equal(value, expected[name]), name
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "lstm.of_the_future"'):
        other.load_state_dict({**state, "lstm.of_the_future": torch.zeros(1)})
    del state["lstm.weight_hh_l1"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "lstm.weight_hh_l1"'):
        other.load_state_dict(state)


def without(name: str):
    return lambda state: state.pop(name)


def with_value(name: str, value: object):
    return lambda state: state.update({name: value})


SCALE = "lstm.weight_hh_l1_scale"
REFUSED = {
    "wrong shape": (
        with_value("lstm.weight_hh_l1", torch.zeros(24, 5)),
        "size mismatch for lstm.weight_hh_l1: copying",
    ),
    "wrong shape of a bias": (with_value("lstm.bias_hh_l1", torch.zeros(23)), "size mismatch for lstm.bias_hh_l1"),
    "wrong shape of the cell": (with_value("cell.weight_ih", torch.zeros(20, 7)), "size mismatch for cell.weight_ih"),
    "no tensor": (with_value("lstm.weight_hh_l1", "weights"), "lstm.weight_hh_l1 must be a tensor, got str"),
    "no scale": (without(SCALE), rf"{SCALE} must be \[24\], one for each row of int8 weights, got NoneType"),
    "wrong scale": (with_value(SCALE, torch.zeros(23)), rf"{SCALE} must be \[24\], .* got \[23\]"),
    "scale a number": (with_value(SCALE, 1.0), rf"{SCALE} must be \[24\], .* got float"),
    "scale of a bias": (
        with_value("lstm.bias_hh_l1_scale", torch.zeros(24)),
        'Unexpected key.*"lstm.bias_hh_l1_scale"',
    ),
}


ONLY_INT8 = ("no scale", "wrong scale", "scale a number")


@pytest.mark.parametrize(
    ("form", "name"),
    [(form, name) for form in FORMS for name in REFUSED if form == "int8" or name not in ONLY_INT8],
)
def test_refused_state(form, name):
    """By RuntimeError, which names the tensor; the other tensors' layer is left as it was."""
    change, message = REFUSED[name]
    module, other = frozen(form), frozen(form, seed=1)
    state = module.state_dict()
    change(state)
    before = other.lstm.state_dict()
    with pytest.raises(RuntimeError, match=message):
        other.load_state_dict(state)
    if "cell" not in name and name != "scale of a bias":
        for key in ("weight_hh_l1", "bias_hh_l1", "weight_ih_l1"):
            assert torch.equal(other.lstm.state_dict()[key], before[key]), key
    assert other(x_for(form)).isfinite().all()


@pytest.mark.parametrize("form", [form for form in FORMS if form != "int8"])
def test_int8_state_is_refused_by_other_forms(form):
    expected = r"lstm\.weight_ih_l0: the state_dict is of int8 weights, and this module was frozen with .* ones"
    with pytest.raises(RuntimeError, match=expected):
        frozen(form).load_state_dict(frozen("int8").state_dict())


def test_int8_state_is_refused_by_torchs_classes():
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_ih_l0_scale"):
        Model().load_state_dict(frozen("int8").state_dict())


def test_leftover_scales_of_float_weights_are_unexpected():
    state = frozen("int8").state_dict()
    state.update(Model().state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*cell\.weight_hh_scale"):
        frozen("int8").load_state_dict(state)


@pytest.mark.parametrize("form", FORMS)
def test_copies(form):
    module, file = frozen(form), io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(module),
        "torch.save": torch.load(file, weights_only=False),
        **{f"pickle {k}": pickle.loads(pickle.dumps(module, k)) for k in range(pickle.HIGHEST_PROTOCOL + 1)},
    }
    with fastlstm.patch_torch():
        copies["pickle under the patch"] = pickle.loads(pickle.dumps(module))
    for name, other in copies.items():
        assert_equal(module, other, form, name)
        assert repr(other) == repr(module), name
        assert vars(other.lstm).keys() == vars(module.lstm).keys(), name
        again = copy.deepcopy(other)
        other.load_state_dict(frozen(form, seed=1).state_dict())  # has weights of its own
        assert_equal(module, again, form, name)
    assert torch.equal(copy.copy(module.lstm)(x_for(form))[0], module.lstm(x_for(form))[0])


@pytest.mark.parametrize("form", FORMS)
def test_pickle_holds_no_layout_of_this_cpu(form):
    """Its size is that of the weights: nothing is padded to vectors, and nothing is there twice."""
    state = frozen(form).lstm.__getstate__()
    assert not any(name.startswith("packed") for name in state["_buffers"])
    lstm = fastlstm.freeze(fastlstm.LSTM(100, 129, dtype=FORMS[form][0]), FORMS[form][1])
    expected = sum(t.nbytes for t in lstm.state_dict().values())
    assert expected < len(pickle.dumps(lstm)) < expected + 5000


@pytest.mark.parametrize("cls", ["lstm", "cell"])
def test_buffers_and_hooks_of_the_user(cls):
    """Buffers are saved and loaded, hooks of the state run, as in an unfrozen module."""
    modules = []
    for seed in (0, 1):
        module = getattr(frozen("int8", seed), cls)
        module.register_buffer("steps", torch.tensor(seed))
        module.register_buffer("cache", torch.tensor(seed), persistent=False)
        modules.append(module)
    first, second = modules
    calls = []
    hooks = [
        second.register_load_state_dict_pre_hook(lambda *_: calls.append("pre")),
        second.register_load_state_dict_post_hook(lambda *_: calls.append("post")),
        first.register_state_dict_post_hook(lambda *_: calls.append("state")),
    ]
    assert "steps" in first.state_dict()
    assert "cache" not in first.state_dict()
    second.load_state_dict(first.state_dict())
    assert calls == ["state"] * 3 + ["pre", "post"]
    assert (second.steps, second.cache) == (0, 1)
    x = torch.randn(2, 2, 3) if cls == "lstm" else torch.randn(2, 8)
    assert torch.equal(first(x)[0], second(x)[0])
    for hook in hooks:  # a local function has no pickle
        hook.remove()
    again = pickle.loads(pickle.dumps(second))
    assert (again.steps, again.cache) == (0, 1)
    assert torch.equal(again(x)[0], second(x)[0])
    with pytest.raises(RuntimeError, match=r'Missing key.*"steps"'):
        first.load_state_dict({name: t for name, t in first.state_dict().items() if name != "steps"})


@pytest.mark.parametrize("form", FORMS)
def test_moves_change_nothing(form):
    """Dtypes are those of freezing: the weights are bytes."""
    module = frozen(form)
    expected = module(x_for(form))
    moves = {
        "half": lambda: module.half(),
        "bfloat16": lambda: module.to(torch.bfloat16),
        "double": lambda: module.double(),
        "float": lambda: module.float(),
        "cpu": lambda: module.cpu(),
        "channels_last": lambda: module.to(memory_format=torch.channels_last),
        "eval": lambda: module.eval(),
        "train": lambda: module.train(),
        "requires_grad_": lambda: module.requires_grad_(),
        "zero_grad": lambda: module.zero_grad(),
        "share_memory": lambda: module.share_memory(),
        "flatten_parameters": lambda: module.lstm.flatten_parameters(),
        "reset_parameters": lambda: module.lstm.reset_parameters(),
    }
    for name, move in moves.items():
        move()
        torch.testing.assert_close(module(x_for(form)), expected, rtol=0, atol=0, msg=naming(name))
    assert all(buffer.is_shared() for buffer in module.buffers())
    assert_equal(module, frozen(form), form)


def test_weights_moved_elsewhere_are_refused():
    """Also by the general path, where the op of a tensor on meta would return uninitialized memory."""
    module = frozen("int8").to("meta")
    calls = {
        "lstm": lambda: module.lstm(torch.zeros(4, 2, 3)),
        "lstm with lengths": lambda: module.lstm(torch.zeros(4, 2, 3), lengths=[4, 2]),
        "cell": lambda: module.cell(torch.zeros(2, 8)),
        "unbatched cell": lambda: module.cell(torch.zeros(8)),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match="on meta"):
            pytest.fail(f"{name} returned {call()}")


class Elsewhere(torch.Tensor):
    """Bytes on a device other than cpu, whose index alone is pretended."""

    bytes: torch.Tensor

    @staticmethod
    def __new__(cls, of):
        made = torch.Tensor._make_wrapper_subclass(cls, of.shape, dtype=of.dtype, device="cuda:0")
        made.bytes = of
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func in (torch.ops.aten._to_copy.default, torch.ops.aten.detach.default), func
        return args[0].bytes if func is torch.ops.aten._to_copy.default else cls(args[0].bytes)


@pytest.mark.parametrize("form", FORMS)
def test_weights_on_another_device_are_read(form):
    """state_dict and pickles of a model that was moved; a call names the device."""
    module, moved = frozen(form), frozen(form)
    for child in (moved.lstm, moved.cell):
        for name in list(child._buffers):
            child._buffers[name] = Elsewhere(child._buffers[name])
    for name, value in module.state_dict().items():
        assert torch.equal(moved.state_dict()[name], value), name
    assert_equal(pickle.loads(pickle.dumps(moved)), module, form)
    for call in (lambda: moved.lstm(x_for(form), lengths=[4, 2]), lambda: moved.cell(torch.ones(8).to(FORMS[form][0]))):
        with pytest.raises(RuntimeError, match="a frozen layer runs on cpu, got weights on cuda:0"):
            call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", FORMS)
def test_weights_on_a_gpu(form):
    module, moved = frozen(form), frozen(form).cuda()
    for name, value in module.state_dict().items():
        assert torch.equal(moved.state_dict()[name], value), name
    assert_equal(copy.deepcopy(moved).cpu(), module, form)
    with pytest.raises(RuntimeError, match="a frozen layer runs on cpu, got weights on cuda:0"):
        moved(x_for(form))
    moved.load_state_dict(frozen(form, seed=1).state_dict())
    assert all(buffer.is_cuda for buffer in moved.buffers())
    assert_equal(copy.deepcopy(moved).cpu(), frozen(form, seed=1), form)
    assert all(w.is_cuda for w in fastlstm.thaw(moved).parameters())


def test_weights_moved_to_meta_are_gone():
    module = frozen("int8").to("meta")
    calls = {
        "state_dict": module.state_dict,
        "load_state_dict": lambda: module.load_state_dict(frozen("int8").state_dict()),
        "pickle": lambda: pickle.dumps(module),
        "thaw": lambda: fastlstm.thaw(module),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match="moved to meta has no weights any more: freeze the model again"):
            pytest.fail(f"{name} returned {call()}")


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_int8_state_into_an_unfrozen_model(dtype, assign, strict):
    """Integers times scales, as thaw gives, never the integers; other modules and keys are as before."""
    state = frozen("int8").state_dict()
    state["cell.weight_hh"] = Model().cell.weight_hh.detach()  # floats may be among them
    del state["cell.weight_hh_scale"]
    module = fastlstm.convert(Model(dtype, seed=1))
    before = dict(state)
    result = module.load_state_dict(state, strict=strict, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert state.keys() == before.keys()
    thawed = dict(fastlstm.thaw(frozen("int8")).named_parameters())
    for name, w in module.named_parameters():
        expected = thawed[name] if name != "cell.weight_hh" else before[name]
        assert torch.equal(w, expected.to(w.dtype)), name
        if "weight" in name and name != "cell.weight_hh":
            assert w.dtype == dtype, name
    # The layers alone, as the root, and a scale that does not fit.
    for child in ("lstm", "cell"):
        own = getattr(frozen("int8"), child).state_dict()
        layer = getattr(fastlstm.convert(Model(seed=1)), child)
        layer.load_state_dict(own, strict=strict, assign=assign)
        assert all(torch.equal(w, thawed[f"{child}.{name}"]) for name, w in layer.named_parameters())
        name = next(key for key in own if key.endswith("_scale"))
        with pytest.raises(RuntimeError, match=rf'Unexpected key\(s\) in state_dict: "{name}"'):
            layer.load_state_dict({**own, name: torch.zeros(1)})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inference", [False, True], ids=["", "inference mode"])
def test_deepcopy_copies_the_packed_bytes(form, inference, monkeypatch):
    """It neither unpacks nor packs, shares nothing, and keeps what is shared inside the model."""
    with torch.inference_mode(inference):
        module = frozen(form)
    module.again, module.lstm.note = module.lstm, ["mine"]
    expected = module(x_for(form))
    with monkeypatch.context() as patch:
        patch.setattr(native, "extension", None)
        copied = copy.deepcopy(module)
        of_layer = copy.deepcopy(module.lstm)
    assert copied.again is copied.lstm
    assert copied.lstm.note == module.lstm.note
    assert copied.lstm.note is not module.lstm.note
    addresses = [{b.data_ptr() for b in m.buffers()} for m in (module, copied, of_layer)]
    assert not addresses[0] & addresses[1]
    assert not addresses[0] & addresses[2]
    assert torch.equal(copied(x_for(form)), expected)
    assert torch.equal(of_layer(x_for(form))[0], copied.lstm(x_for(form))[0])
    assert [type(m) for m in copied.modules()] == [type(m) for m in module.modules()]
    assert vars(copied.lstm).keys() == vars(module.lstm).keys()
    assert isinstance(copied.lstm, fastlstm.FrozenLSTM)


@pytest.mark.parametrize("form", FORMS)
def test_state_dict_returns_copies(form):
    module = frozen(form)
    expected, state = module(x_for(form)), module.state_dict()
    for value in state.values():
        value.zero_()
    assert torch.equal(module(x_for(form)), expected)
    assert any(value.any() for value in module.state_dict().values())
