"""LSTM(recurrent_dropout=, zoneout=, layer_norm=) and LSTMCell: the modules, and the masks that they draw."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastlstm
from fastlstm.masks import Masks

VARIANTS = {
    "recurrent_dropout": {"recurrent_dropout": 0.4},
    "zoneout": {"zoneout": 0.3},
    "zoneout of h": {"zoneout": (0.3, 0.0)},
    "layer_norm": {"layer_norm": True},
    "all": {
        "recurrent_dropout": 0.4, "zoneout": (0.2, 0.1), "layer_norm": True, "num_layers": 2, "bidirectional": True,
        "proj_size": 5, "bias": False,
    },
}  # fmt: skip
every_variant = pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS)


def require(backend, **kwargs):
    """Skip the test, with the backend's reason, if it cannot run an LSTM of these arguments."""
    reason = fastlstm.explain(fastlstm.LSTM(4, 8, **kwargs), torch.zeros(1, 1, 4)).reasons.get(backend, "runs")
    if reason != "runs":
        pytest.skip(f"{backend}: {reason}")


@pytest.fixture(autouse=True)
def supported(request):
    if "backend" in request.fixturenames:
        kwargs = VARIANTS.get(request.getfixturevalue("name")) if "name" in request.fixturenames else None
        kwargs = request.getfixturevalue("kwargs") if "kwargs" in request.fixturenames else kwargs
        require(request.getfixturevalue("backend"), **(kwargs or {}))


@pytest.fixture
def drawn(monkeypatch):
    """The inputs of each layer, masks included, in the order of the calls."""
    calls, draw = [], Masks.draw

    def record(self, inputs):
        calls.append(draw(self, inputs))
        return calls[-1]

    monkeypatch.setattr(Masks, "draw", record)
    return calls


def lstm_of(dtype=torch.float64, **kwargs):
    torch.manual_seed(3)
    lstm = fastlstm.LSTM(4, 8, dtype=dtype, **kwargs)
    for name, parameter in lstm.named_parameters():
        if "_ln_" in name:  # not their initial 1 and 0
            nn.init.normal_(parameter)
    return lstm


# ---- Against loops that a user would write, with torch.nn's own modules.


def normalization(lstm, name, suffix):
    gain, bias = (getattr(lstm, f"{kind}_ln_{name}_{suffix}") for kind in ("weight", "bias"))
    norm = nn.LayerNorm(gain.shape[0], dtype=gain.dtype)
    norm.weight, norm.bias = nn.Parameter(gain.detach()), nn.Parameter(bias.detach())
    return norm


def has_norm(lstm):
    return any("_ln_" in name for name in lstm.state_dict())


def loop(lstm, x, mask=None, share_h=None, share_c=None):
    """One layer and direction as a loop over steps: Gal's mask, Krueger's zoneout, torch.nn.LayerNorm."""
    h = x.new_zeros(x.shape[1], 8)
    c, outputs = h.clone(), []
    for t, x_t in enumerate(x):
        entering = h if mask is None else h * mask
        of_x, of_h = x_t @ lstm.weight_ih_l0.t(), entering @ lstm.weight_hh_l0.t()
        if has_norm(lstm):
            of_x, of_h = normalization(lstm, "ih", "l0")(of_x), normalization(lstm, "hh", "l0")(of_h)
        i, f, g, o = (of_x + of_h + lstm.bias_ih_l0 + lstm.bias_hh_l0).chunk(4, 1)
        new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        new_h = o.sigmoid() * (normalization(lstm, "c", "l0")(new_c) if has_norm(lstm) else new_c).tanh()
        kept_h, kept_c = (0.0 if share is None else share[t].double() for share in (share_h, share_c))
        h, c = kept_h * h + (1 - kept_h) * new_h, kept_c * c + (1 - kept_c) * new_c
        outputs.append(h)
    return torch.stack(outputs), (h[None], c[None])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["recurrent_dropout", "zoneout", "zoneout of h", "layer_norm"])
def test_equals_a_loop_of_steps(name, training, backend, drawn):
    kwargs = VARIANTS[name]
    lstm, x = lstm_of(**kwargs).train(training), torch.randn(9, 5, 4, dtype=torch.float64)
    output, states = lstm(x)
    mask = share_h = share_c = None
    if drawn:
        _, _, _, _, _, _, mask, share_h, share_c = drawn[0]
        mask = None if mask is None else mask[0, 0]
        share_h, share_c = (None if share is None else share[0] for share in (share_h, share_c))
    if not training and "zoneout" in kwargs:
        z_h, z_c = fastlstm.masks.zoneout_pair(kwargs["zoneout"])
        share_h, share_c = (torch.full((9, 5, 8), z, dtype=torch.float64) for z in (z_h, z_c))
    expected, expected_states = loop(lstm, x, mask, share_h, share_c)
    torch.testing.assert_close((output, states), (expected, expected_states))


@pytest.mark.parametrize(
    "kwargs", [{"layer_norm": True}, {"zoneout": 0.25}, {"layer_norm": True, "zoneout": (0.25, 0.5), "bias": False}]
)
def test_cell_equals_a_layer_of_one_step(kwargs, backend):
    lstm = lstm_of(**kwargs).eval()
    cell = fastlstm.LSTMCell(4, 8, dtype=torch.float64, **kwargs).eval()
    cell.load_state_dict({name.removesuffix("_l0"): w for name, w in lstm.state_dict().items()})
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    state = None
    for x_t in x:
        state = cell(x_t, state)
    torch.testing.assert_close(state[0], lstm(x)[0][-1])
    unbatched = cell(x[0, 0])
    torch.testing.assert_close(unbatched[0], lstm(x[:1, 0])[0][0])


def test_repr_of_a_cell():
    cell = fastlstm.LSTMCell(4, 8, False, zoneout=[0.25, 0.5], layer_norm=True)
    assert repr(cell) == "LSTMCell(4, 8, bias=False, zoneout=(0.25, 0.5), layer_norm=True)"


# ---- The modules.


def test_off_is_the_plain_layer():
    """Options at zero change neither state_dict nor results nor the path of a call."""
    torch.manual_seed(1)
    plain = fastlstm.LSTM(4, 8, 2)
    torch.manual_seed(1)
    off = fastlstm.LSTM(4, 8, 2, recurrent_dropout=0.0, zoneout=(0, 0), layer_norm=False)
    assert off.__dict__.keys() == plain.__dict__.keys()
    assert repr(off) == repr(plain)
    x = torch.randn(5, 3, 4)
    for name, value in plain.state_dict().items():
        assert torch.equal(off.state_dict()[name], value)
    assert torch.equal(off(x)[0], plain(x)[0])


def test_recurrent_dropout_has_no_effect_in_evaluation():
    lstm, x = fastlstm.LSTM(4, 8, recurrent_dropout=0.5).eval(), torch.randn(5, 3, 4)
    plain = fastlstm.LSTM(4, 8)
    plain.load_state_dict(lstm.state_dict())
    assert torch.equal(lstm(x)[0], plain(x)[0])


def test_attributes_of_a_subclass_are_its_own():
    """Code written for nn.LSTM may use the options' names for something else."""

    class Own(fastlstm.LSTM):
        zoneout = 0.9

        def __init__(self) -> None:
            super().__init__(4, 8)
            self.layer_norm, self.recurrent_dropout = nn.LayerNorm(8), 0.5

        def forward(self, x):
            return self.layer_norm(super().forward(x)[0])

    own, x = Own(), torch.randn(5, 3, 4)
    plain = fastlstm.LSTM(4, 8)
    plain.load_state_dict(own.state_dict(), strict=False)
    assert torch.equal(own(x), own.layer_norm(plain(x)[0]))
    theirs = nn.LSTM(4, 8)
    theirs.layer_norm, theirs.zoneout = nn.LayerNorm(8), 0.5
    ours = fastlstm.convert(theirs)
    assert isinstance(ours.layer_norm, nn.LayerNorm)
    assert torch.equal(ours(x)[0], ours(x, lengths=[5, 5, 5])[0])


def test_options_given_by_a_subclass():
    class Zoned(fastlstm.LSTM):
        def __init__(self, *args) -> None:
            super().__init__(*args, zoneout=0.5)

    zoned, x = Zoned(4, 8), torch.randn(5, 3, 4)
    assert not torch.equal(zoned(x)[0], zoned(x)[0])
    with pytest.warns(UserWarning, match="leaves subclasses"):
        fastlstm.convert(nn.Sequential(zoned), to="torch")


def test_default_device(backend):
    """Masks are made where the input is."""
    lstm, x = lstm_of(zoneout=0.3, recurrent_dropout=0.3), torch.randn(5, 3, 4, dtype=torch.float64)
    with torch.device("meta"):
        assert lstm(x)[0].device.type == "cpu"


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@every_variant
def test_trace_draws_masks_at_every_call(kwargs):
    lstm, x = lstm_of(**kwargs), torch.randn(5, 3, 4, dtype=torch.float64)
    traced = torch.jit.trace(lstm, (x,), check_trace=False)
    assert torch.equal(traced(x)[0], traced(x)[0]) == (kwargs.keys() == {"layer_norm"})
    traced = torch.jit.trace(lstm.eval(), (x,))
    torch.testing.assert_close(traced(x)[0], lstm(x)[0])


@every_variant
def test_names_of_weights(kwargs):
    lstm = fastlstm.LSTM(4, 8, **kwargs)
    kinds = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if lstm.bias else [])]
    if has_norm(lstm):
        kinds += [f"{kind}_ln_{of}" for of in ("ih", "hh", "c") for kind in ("weight", "bias")]
    kinds += ["weight_hr"] if lstm.proj_size else []
    places = [f"l{k}{d}" for k in range(lstm.num_layers) for d in ("", "_reverse")[: 1 + lstm.bidirectional]]
    names = [f"{kind}_{place}" for place in places for kind in kinds]
    assert lstm._flat_weights_names == names
    assert sorted(lstm.state_dict()) == sorted(names)
    assert [id(w) for w in lstm._flat_weights] == [id(getattr(lstm, name)) for name in names]


def test_initial_values():
    """Matrices and biases are drawn as without layer normalization, also after reset_parameters."""
    torch.manual_seed(2)
    plain = fastlstm.LSTM(4, 8, 2).state_dict()
    torch.manual_seed(2)
    lstm = fastlstm.LSTM(4, 8, 2, layer_norm=True)
    for name, value in plain.items():
        assert torch.equal(lstm.state_dict()[name], value)
    nn.init.normal_(lstm.weight_ln_c_l0)
    lstm.reset_parameters()
    for name, value in lstm.named_parameters():
        if "_ln_" in name:
            assert torch.equal(value, torch.full_like(value, float(name.startswith("weight")))), name
    cell = fastlstm.LSTMCell(4, 8, layer_norm=True)
    assert cell.weight_ln_ih.shape == (32,)
    assert cell.bias_ln_c.tolist() == [0.0] * 8


@every_variant
def test_copies_and_pickles(kwargs):
    lstm, x = lstm_of(**kwargs).eval(), torch.randn(5, 3, 4, dtype=torch.float64)
    for other in (copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm))):
        assert repr(other) == repr(lstm)
        assert torch.equal(other(x)[0], lstm(x)[0])
    again = fastlstm.LSTM(4, 8, dtype=torch.float64, **kwargs).eval()
    again.load_state_dict(lstm.state_dict())
    assert torch.equal(again(x)[0], lstm(x)[0])


def test_repr():
    lstm = fastlstm.LSTM(4, 8, recurrent_dropout=0.1, zoneout=[0.2, 0], layer_norm=True)
    assert repr(lstm) == "LSTM(4, 8, recurrent_dropout=0.1, zoneout=(0.2, 0.0), layer_norm=True)"


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"recurrent_dropout": 1.5}, ValueError, r"recurrent_dropout should be a number in range \[0, 1\]"),
        ({"recurrent_dropout": True}, ValueError, r"recurrent_dropout should be a number .* got True"),
        ({"recurrent_dropout": float("nan")}, ValueError, "recurrent_dropout should be a number"),
        ({"zoneout": -0.1}, ValueError, "zoneout should be a number"),
        ({"zoneout": (0.1, 2.0)}, ValueError, r"zoneout\[1\] should be a number"),
        ({"zoneout": (0.1,)}, ValueError, r"pair \(z_h, z_c\), got 1 numbers"),
        ({"zoneout": "0.1"}, ValueError, "zoneout should be a number .* got '0.1'"),
    ],
)
def test_arguments_that_are_refused(kwargs, error, text):
    with pytest.raises(error, match=text):
        fastlstm.LSTM(4, 8, **kwargs)


@every_variant
def test_convert_and_freeze_refuse(kwargs):
    model = nn.Sequential(fastlstm.LSTM(4, 8), fastlstm.LSTM(8, 8, **kwargs))
    with pytest.raises(ValueError, match=r"1 has .*which torch\.nn\.LSTM cannot compute"):
        fastlstm.convert(model, to="torch")
    assert type(model[0]) is fastlstm.LSTM  # nothing has changed
    assert fastlstm.convert(model) is model
    if kwargs.keys() == {"recurrent_dropout"}:
        frozen = fastlstm.freeze(copy.deepcopy(model))
        x = torch.randn(5, 3, 8)
        torch.testing.assert_close(frozen[1](x)[0], model[1].eval()(x)[0])
        assert fastlstm.thaw(frozen)[1]._variant.recurrent_dropout == 0.4
    else:
        with pytest.raises(ValueError, match="which a frozen layer does not compute"):
            fastlstm.freeze(model)
        assert type(model[0]) is fastlstm.LSTM


@every_variant
def test_explain(kwargs):
    lstm, x = fastlstm.LSTM(4, 8, **kwargs), torch.randn(5, 3, 4)
    explanation = fastlstm.explain(lstm, x)
    assert explanation.backend in ("native", "eager")
    assert explanation.reasons["triton"] != "runs"
    if explanation.backend == "native":
        by_rows = "layer normalization by whole rows"
        assert (by_rows in explanation.forward) == (by_rows in explanation.backward) == ("layer_norm" in kwargs)
    with fastlstm.use_backend("eager"):
        assert fastlstm.explain(lstm, x).backend == "eager"


# ---- Other forms of input, transforms, precision.


@every_variant
def test_packed_sequence(kwargs, backend):
    lstm = lstm_of(**kwargs).eval()
    x, lengths = torch.randn(7, 4, 4, dtype=torch.float64), [3, 7, 1, 5]
    padded, states = lstm(x, lengths=lengths)
    packed, packed_states = lstm(pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False))
    torch.testing.assert_close(pad_packed_sequence(packed)[0], padded)
    torch.testing.assert_close(packed_states, states)
    lstm.train()
    output, _ = lstm(pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False))
    assert output.data.shape == (16, padded.shape[2])


@every_variant
def test_batch_first_unbatched_cells(kwargs, backend):
    lstm, x = lstm_of(**kwargs).eval(), torch.randn(7, 4, 4, dtype=torch.float64)
    output, _, cells = lstm(x, return_cell_states=True)
    lstm.batch_first = True
    turned = lstm(x.transpose(0, 1), return_cell_states=True)
    torch.testing.assert_close((turned[0].transpose(0, 1), turned[2].transpose(0, 1)), (output, cells))
    alone, _ = lstm(x[:, 1])
    torch.testing.assert_close(alone, output[:, 1])


@every_variant
def test_autocast(kwargs, backend):
    lstm, x = lstm_of(torch.float32, **kwargs), torch.randn(7, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        output, _ = lstm(x)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in lstm.parameters())
    torch.manual_seed(1)
    torch.testing.assert_close(output.float(), lstm(x)[0], rtol=0.1, atol=0.1)


@every_variant
def test_gradients_per_sample(kwargs, backend):
    lstm = lstm_of(**kwargs).eval()
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in lstm.named_parameters()}

    def loss(parameters, sample):
        return torch.func.functional_call(lstm, parameters, (sample,))[0].pow(2).sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(parameters, x)
    for b in range(3):
        alone = torch.autograd.grad(loss(dict(lstm.named_parameters()), x[:, b]), list(lstm.parameters()))
        for name, grad in zip(parameters, alone, strict=True):
            torch.testing.assert_close(found[name][b], grad, msg=lambda text, name=name: f"{name}: {text}")


def test_masks_under_vmap():
    """As torch.nn.Dropout: an error, or masks of their own, or the same ones."""
    lstm, x = lstm_of(recurrent_dropout=0.5, zoneout=0.3), torch.randn(1, 5, 2, 4, dtype=torch.float64)
    same = x.expand(3, 5, 2, 4)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda x: lstm(x)[0])(same)
    first, second, _ = torch.func.vmap(lambda x: lstm(x)[0], randomness="different")(same)
    assert not torch.equal(first, second)
    first, second, _ = torch.func.vmap(lambda x: lstm(x)[0], randomness="same")(same)
    torch.testing.assert_close(first, second)


@every_variant
def test_forward_ad(kwargs, backend):
    lstm, x = lstm_of(**kwargs).eval(), torch.randn(4, 2, 4, dtype=torch.float64)
    tangent = torch.randn_like(x)
    _, found = torch.func.jvp(lambda x: lstm(x)[0], (x,), (tangent,))
    step = 1e-6
    numeric = (lstm(x + step * tangent)[0] - lstm(x - step * tangent)[0]) / (2 * step)
    torch.testing.assert_close(found, numeric, rtol=1e-5, atol=1e-7)
