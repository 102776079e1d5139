"""Copying, saving, replacing and rewriting a module's weights: fastlstm.LSTM stays equal to nn.LSTM."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune

import fastlstm

from ..module_pairs import assert_same, data, module_pair, naming

X = data(5, 2, 3)
OPTIONS = {"num_layers": 2, "bidirectional": True, "proj_size": 2}


def test_deepcopy():
    ours, theirs = module_pair(**OPTIONS)
    ours(X)
    copied = copy.deepcopy(ours)
    with torch.no_grad():
        for weight in ours.parameters():
            weight.zero_()
    assert_same(copied, theirs, X)
    assert not ours(X)[0].any()


def test_pickle():
    ours, theirs = module_pair(**OPTIONS)
    restored = pickle.loads(pickle.dumps(ours))
    assert type(restored) is fastlstm.LSTM
    assert [id(w) for w in restored._flat_weights] == [id(w) for w in restored.parameters()]
    assert_same(restored, theirs, X)


def test_save_and_load_of_the_module():
    ours, theirs = module_pair(**OPTIONS)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=False), theirs, X)


def test_pickles_from_before_proj_size():
    ours, theirs = module_pair()
    state = ours.__getstate__()
    assert "_flat_weight_refs" not in state
    state = {name: value for name, value in copy.deepcopy(state).items() if name != "proj_size"}
    restored = fastlstm.LSTM.__new__(fastlstm.LSTM)
    restored.__setstate__(state)
    assert restored.proj_size == 0
    assert_same(restored, theirs, X)


def test_pickles_from_before_weight_names():
    ours, theirs = module_pair(num_layers=2, bidirectional=True)
    state = copy.deepcopy(ours.__getstate__())
    state["all_weights"] = [[None]]
    del state["_flat_weights_names"], state["_flat_weights"], state["_all_weights"]
    restored = fastlstm.LSTM.__new__(fastlstm.LSTM)
    restored.__setstate__(state)
    assert restored._all_weights == ours._all_weights
    assert_same(restored, theirs, X)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("into", ["fastlstm", "torch"])
def test_load_state_dict_both_ways(into, assign):
    ours, theirs = module_pair(**OPTIONS)
    source, target = (theirs, ours) if into == "fastlstm" else (ours, theirs)
    with torch.no_grad():
        for weight in target.parameters():
            weight.zero_()
    state = copy.deepcopy(source.state_dict())
    assert str(target.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    assert_same(ours, theirs, X)
    if assign:
        assert target.weight_ih_l0.data_ptr() == state["weight_ih_l0"].data_ptr()


def test_load_state_dict_names_what_is_missing():
    ours, theirs = module_pair()
    state = fastlstm.LSTM(3, 4, bias=False, dtype=torch.float64).state_dict()
    with pytest.raises(RuntimeError) as expected:
        theirs.load_state_dict(state)
    with pytest.raises(RuntimeError) as got:
        ours.load_state_dict(state)
    assert str(got.value) == str(expected.value)


def test_share_memory():
    ours, theirs = module_pair(**OPTIONS)
    ours.share_memory()
    assert all(w.is_shared() for w in ours._flat_weights)
    assert_same(ours, theirs, X)


def test_meta_to_empty_reset():
    made = []
    for cls in (fastlstm.LSTM, nn.LSTM):
        module = cls(3, 4, **OPTIONS, device="meta", dtype=torch.float64)
        assert module(X.to("meta"))[0].shape == (5, 2, 4), cls
        module.to_empty(device="cpu")
        torch.manual_seed(1)
        module.reset_parameters()
        made.append(module)
    assert_same(*made, X)


def test_functional_call():
    ours, theirs = module_pair(**OPTIONS)
    other = {name: (w.detach() * 2).requires_grad_() for name, w in theirs.named_parameters()}
    expected = torch.autograd.grad(functional_call(theirs, other, (X,))[0].square().sum(), list(other.values()))
    got = torch.autograd.grad(functional_call(ours, other, (X,))[0].square().sum(), list(other.values()))
    torch.testing.assert_close(got, expected)
    assert_same(ours, theirs, X)  # and the module's weights are restored


@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l1_reverse", "weight_hr_l0"])
@pytest.mark.parametrize(
    "norm",
    [
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
    ],
    ids=["weight_norm", "orthogonal", "old weight_norm", "old spectral_norm"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_norms(norm, name):
    pair = module_pair(**OPTIONS)
    for module in pair:
        torch.manual_seed(5)  # spectral_norm draws its vectors
        norm(module, name)
    for _ in range(2):
        assert_same(*pair, X)


def test_spectral_norm():
    """Each read of the weight in training runs a step of power iteration, several per call in nn.LSTM."""
    pair = module_pair(**OPTIONS)
    for module in pair:
        torch.manual_seed(5)
        parametrizations.spectral_norm(module, "weight_hh_l0")
        module.eval()
    assert_same(*pair, X)
    ours = pair[0].train()
    vector = ours.parametrizations.weight_hh_l0[0]._u
    before = vector.clone()
    ours(X)
    assert not torch.equal(vector, before)


def test_custom_parametrization_and_its_removal():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    pair = module_pair()
    plain = pair[0](X)[0]
    for module in pair:
        parametrize.register_parametrization(module, "weight_hh_l0", Double())
    assert_same(*pair, X)
    assert not torch.equal(pair[0](X)[0], plain)
    for module in pair:
        parametrize.remove_parametrizations(module, "weight_hh_l0", leave_parametrized=True)
    assert_same(*pair, X)


def test_prune():
    pair = module_pair()
    for module in pair:
        prune.l1_unstructured(module, "weight_hh_l0", amount=0.5)
    assert_same(*pair, X)
    for module in pair:
        with torch.no_grad():
            module.weight_hh_l0_orig.mul_(3)  # as in an optimizer's step
    assert_same(*pair, X)
    for module in pair:
        prune.remove(module, "weight_hh_l0")
    assert_same(*pair, X)
    assert int((pair[0].weight_hh_l0 == 0).sum()) == 32


def test_data_assignment_and_writes_without_version_bump():
    pair = module_pair()
    assert_same(*pair, X)
    before = pair[0](X)[0]
    for module in pair:
        module.weight_hh_l0.data = torch.ones(16, 4, dtype=torch.float64)
        module.weight_ih_l0.data.mul_(2)
        module.bias_ih_l0.detach().numpy()[:] = 0.25
    assert_same(*pair, X)
    assert not torch.allclose(pair[0](X)[0], before)


def test_frozen_weight():
    pair = module_pair(num_layers=2)
    for module in pair:
        module.weight_hh_l0.requires_grad_(False)
        module.bias_ih_l1.requires_grad_(False)
    assert_same(*pair, X)
    assert pair[0].weight_hh_l0.grad is None


def test_plain_tensor_in_place_of_a_parameter():
    pair = module_pair()
    for module in pair:
        base = nn.Parameter(torch.full((4,), 0.5, dtype=torch.float64))
        del module.weight_hh_l0
        module.base = base
        module.weight_hh_l0 = base.expand(16, 4)
    assert_same(*pair, X)
    assert pair[0].base.grad is not None


def test_hooks():
    pair, seen = module_pair(), ([], [])
    for module, notes in zip(pair, seen, strict=True):
        module.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
        module.register_forward_hook(lambda m, args, out, notes=notes: notes.append(out[0].detach()))
        module.register_full_backward_hook(lambda m, gi, go, notes=notes: notes.extend([*gi, *go]))
        module.weight_hh_l0.register_hook(lambda grad: grad * 10)
        x = X.clone().requires_grad_()
        output, _ = module(x)
        output.square().sum().backward()
        notes += [x.grad, module.weight_hh_l0.grad]
    assert len(seen[0]) == len(seen[1]) > 4
    for mine, yours in zip(*seen, strict=True):
        assert (mine is None) == (yours is None)
        if yours is not None:
            torch.testing.assert_close(mine, yours)


def test_optimizer_steps():
    pair, losses = module_pair(num_layers=2), ([], [])
    for module, found in zip(pair, losses, strict=True):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        for _ in range(5):
            loss = (module(X)[0] - 0.3).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_distributed_wrappers(wrap, tmp_path):
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    ours, theirs = module_pair(num_layers=2)
    expected = theirs(X)[0]
    expected.square().sum().backward()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        if wrap == "ddp":
            output = nn.parallel.DistributedDataParallel(ours)(X)[0]
        else:
            mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
            distributed.fsdp.fully_shard(ours, mesh=mesh)
            output = ours(X)[0]
        torch.testing.assert_close(output, expected)
        output.square().sum().backward()
        for name, weight in ours.named_parameters():
            grad = weight.grad.full_tensor() if wrap == "fsdp" else weight.grad
            torch.testing.assert_close(grad, getattr(theirs, name).grad, msg=naming(name))
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_final_states_may_be_changed_in_place(layers, dtype, backend):
    """As in nn.LSTM: truncated backpropagation masks them before the next chunk."""

    def gradients(module):
        output, (h_n, c_n) = module(X.to(dtype))
        h_n.mul_(0.5)
        c_n.mul_(2)
        return torch.autograd.grad(output.sum() + h_n.sum() + c_n.sum(), list(module.parameters()))

    ours, theirs = module_pair(num_layers=layers, dtype=dtype)
    close = {} if dtype == torch.float64 else {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(gradients(ours), gradients(theirs), **close)
