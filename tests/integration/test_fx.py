"""torch.fx treats an LSTM as one node, as for nn.LSTM: new, converted and patched modules, and cells."""

from __future__ import annotations

import copy
import operator
import pickle

import pytest
import torch
from torch import fx, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastlstm

from ..module_pairs import assert_same, data

X = data(5, 2, 3)
LENGTHS = torch.tensor([5, 2])


@fx.wrap
def pack(x, lengths):
    return pack_padded_sequence(x, lengths)


@fx.wrap
def pad(packed):
    return pad_packed_sequence(packed)[0]


class Tagger(nn.Module):
    """A model that calls an LSTM with and without a state, and a cell in a loop."""

    def __init__(self, lstm: type[nn.Module], cell: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.ModuleDict({"lstm": lstm(3, 4, 2, dropout=0.0, bidirectional=True, dtype=torch.float64)})
        self.cell = cell(8, 4, dtype=torch.float64)

    def forward(self, x):
        y, state = self.inner["lstm"](x)
        y, _ = self.inner["lstm"](x + y[..., :3], state)
        h, c = self.cell(y[0])
        return self.cell(input=y[1], hx=(h, c))[0] + y.sum()


class Packed(nn.Module):
    def __init__(self, lstm: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = lstm(3, 4, dtype=torch.float64)

    def forward(self, x, lengths):
        return pad(self.lstm(pack(x, lengths))[0])


def built(how: str) -> nn.Module:
    """Tagger with fastlstm's modules: built, converted or patched."""
    if how == "patched":
        with fastlstm.patch_torch():
            return Tagger(nn.LSTM, nn.LSTMCell)
    if how == "converted":
        return fastlstm.convert(Tagger(nn.LSTM, nn.LSTMCell))
    model = Tagger(fastlstm.LSTM, fastlstm.LSTMCell)
    return {"plain": lambda m: m, "copied": copy.deepcopy, "unpickled": lambda m: pickle.loads(pickle.dumps(m))}[how](
        model
    )


def nodes(traced: fx.GraphModule) -> list[tuple[str, str]]:
    return [(node.op, str(node.target)) for node in traced.graph.nodes]


@pytest.mark.parametrize("how", ["plain", "converted", "patched", "copied", "unpickled"])
def test_graph_equals_nn_lstms(how, backend):
    theirs = fx.symbolic_trace(Tagger(nn.LSTM, nn.LSTMCell))
    ours = fx.symbolic_trace(built(how))
    assert nodes(ours) == nodes(theirs)
    assert sum(op == "call_module" for op, _ in nodes(ours)) == 4
    assert type(ours.inner.lstm) is fastlstm.LSTM
    assert_same(ours, theirs, X)


def test_fx_graph_with_packed_input(backend):
    theirs, ours = (fx.symbolic_trace(Packed(cls)) for cls in (nn.LSTM, fastlstm.LSTM))
    assert nodes(ours) == nodes(theirs)
    for lengths in (LENGTHS, torch.tensor([3, 3])):
        assert_same(ours, theirs, X, lengths, case=f"lengths {lengths.tolist()}")


def test_graph_keeps_arguments_that_nn_lstm_lacks(backend):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = fastlstm.LSTM(3, 4, dtype=torch.float64)

        def forward(self, x, lengths, starts):
            return self.lstm(x, lengths=lengths, reset_mask=starts, return_cell_states=True)

    model, starts = Model(), X[..., 0] > 0.5
    traced = fx.symbolic_trace(model)
    assert nodes(traced)[3:-1] == [("call_module", "lstm")]
    assert_same(traced, model, X, LENGTHS, starts)


def test_hooks_run_once():
    """A trace into the module would record hooks' ops and run the hooks again."""
    models = [Packed(cls) for cls in (fastlstm.LSTM, nn.LSTM)]
    for model in models:
        model.lstm.register_forward_pre_hook(lambda m, args: (args[0]._replace(data=args[0].data * 3),))
        model.lstm.register_forward_hook(lambda m, args, out: (out[0]._replace(data=out[0].data * 2), out[1]))
    ours, theirs = map(fx.symbolic_trace, models)
    assert nodes(ours) == nodes(theirs)
    assert_same(ours, theirs, X, LENGTHS)


def test_call_without_traced_arguments_is_one_node(backend):
    """The node reads the module's weights, which may change after the trace."""

    class Model(nn.Module):
        def __init__(self, cls) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.lstm = cls(3, 4, dtype=torch.float64)
            self.register_buffer("start", X)

        def forward(self, x):
            return x + self.lstm(torch.ones(5, 2, 3, dtype=torch.float64))[0][..., :3]

    ours, theirs = (fx.symbolic_trace(Model(cls)) for cls in (fastlstm.LSTM, nn.LSTM))
    assert nodes(ours) == nodes(theirs)
    for model in (ours, theirs):
        with torch.no_grad():
            model.lstm.bias_hh_l0.fill_(0.5)
    assert_same(ours, theirs, X)


def test_custom_tracers():
    class Deeper(fx.Tracer):
        """A tracer as in torch's quantization and feature extractors, with additional leaves and recorded paths."""

        def __init__(self) -> None:
            super().__init__()
            self.calls: list[str] = []

        def is_leaf_module(self, module, name):
            return isinstance(module, nn.Dropout) or super().is_leaf_module(module, name)

        def call_module(self, module, forward, args, kwargs):
            self.calls.append(self.path_of_module(module))
            return super().call_module(module, forward, args, kwargs)

    class Everything(fx.Tracer):
        def is_leaf_module(self, module, name):
            return False

    results = []
    for model in (built("plain"), Tagger(nn.LSTM, nn.LSTMCell)):
        tracer = Deeper()
        results.append(([(n.op, str(n.target)) for n in tracer.trace(model).nodes], tracer.calls))
        with pytest.raises(fx.proxy.TraceError):
            Everything().trace(model)
    assert results[0] == results[1]


def test_fx_traces_into_subclasses():
    """As for subclasses of nn.LSTM, because their forward may differ."""

    class Doubled(fastlstm.LSTM):
        def forward(self, x):
            return 2 * x

    traced = fx.symbolic_trace(nn.ModuleDict({"only": Doubled(3, 4)})["only"])
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [operator.mul]
    assert Doubled(3, 4).__module__ == copy.deepcopy(Doubled(3, 4)).__module__ == __name__


def test_traced_model_can_be_copied_and_compiled(backend):
    if backend == "reference":
        pytest.skip("the reference unrolls the loop over T")
    torch._dynamo.reset()
    model = built("plain")
    traced = copy.deepcopy(fx.symbolic_trace(model))
    assert type(traced.inner.lstm) is fastlstm.LSTM
    compiled = torch.compile(traced, backend="aot_eager", fullgraph=True)
    results = [function(X) for function in (compiled, traced)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), list(traced.parameters())) for y in results))
    assert_same(traced, Tagger(nn.LSTM, nn.LSTMCell), X)
    again = fx.symbolic_trace(traced)
    assert nodes(again) == nodes(traced)


def test_converted_back_it_is_a_torch_module():
    lstm = fastlstm.convert(fastlstm.convert(nn.LSTM(3, 4)), to="torch")
    assert vars(lstm).keys() == vars(nn.LSTM(3, 4)).keys()
    assert lstm.__module__ == nn.LSTM.__module__
    assert fastlstm.LSTM.__module__ == "fastlstm.modules"
    assert "__module__" not in fastlstm.LSTM(3, 4).__getstate__() | fastlstm.LSTMCell(3, 4).__getstate__()
