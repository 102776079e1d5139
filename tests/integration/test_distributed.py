"""Two gloo processes train as one: DDP, FSDP2, sharded checkpoints; and Lightning's Trainer where it is installed."""

from __future__ import annotations

import os

import pytest
import torch
from torch import distributed, nn
from torch.distributed import checkpoint

import fastlstm

from ..device import TEST_DEVICE
from ..module_pairs import data

if not distributed.is_available() or not distributed.is_gloo_available():
    pytest.skip("requires torch with gloo", allow_module_level=True)

WORLD, B, T, STEPS = 2, 6, 5, 3
X, TARGET = data(T, B, 3), data(T, B, 2, seed=1)
LENGTHS = torch.tensor([5, 1, 3, 0, 2, 5])


class Tagger(nn.Module):
    """x [T, B, 3] -> [T, B, 2]."""

    def __init__(self, recompute: bool | int = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = fastlstm.LSTM(3, 8, 2, bidirectional=True, proj_size=4, dtype=torch.float64)
        self.lstm.recompute = recompute
        self.head = nn.Linear(8, 2, dtype=torch.float64)

    def forward(self, x, lengths):
        return self.head(self.lstm(x, lengths=lengths)[0])


def train(model, rows):
    """Run a few steps of Adam on `rows` of the batch; return the model."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model(X[:, rows], LENGTHS[rows]) - TARGET[:, rows]).pow(2).mean().backward()
        optimizer.step()
    return model


def sharded(model):
    mesh = distributed.device_mesh.init_device_mesh("cpu", (WORLD,))
    for part in (model.lstm, model):
        distributed.fsdp.fully_shard(part, mesh=mesh)
    return model


def full(model):
    return {name: getattr(w, "full_tensor", lambda w=w: w)().detach().clone() for name, w in model.named_parameters()}


def work(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD)
    rows = slice(rank * B // WORLD, (rank + 1) * B // WORLD)
    results = {}
    results["ddp"] = full(train(nn.parallel.DistributedDataParallel(Tagger()), rows).module)
    model = train(sharded(Tagger()), rows)
    results["fsdp"] = full(model)
    results["fsdp with recompute"] = full(train(sharded(Tagger(recompute=2)), rows))
    checkpoint.save(model.state_dict(), checkpoint_id=folder / "sharded")
    restored = sharded(Tagger())
    state = restored.state_dict()
    checkpoint.load(state, checkpoint_id=folder / "sharded")
    restored.load_state_dict(state)
    results["restored"] = full(restored)
    local = model.lstm.weight_ih_l0.to_local()
    results["shard"] = {"rows": torch.tensor(local.shape[0])}
    torch.save(results, folder / f"found{rank}.pt")
    distributed.barrier()
    # Without the interpreter's own end: gloo's threads outlive destroy_process_group(), and one that asks for the GIL
    # meanwhile terminates the process.
    os._exit(0)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(work, (folder,), nprocs=WORLD)
    return folder, [torch.load(folder / f"found{rank}.pt") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone():
    return full(train(Tagger(), slice(0, B)))


@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp with recompute", "restored"])
def test_two_processes_equal_one(how, found, alone):
    for results in found[1]:
        assert results[how].keys() == alone.keys()
        for name, weight in alone.items():
            torch.testing.assert_close(results[how][name], weight, rtol=1e-6, atol=1e-8, msg=f"{how}: {name}")


def test_sharded_weights_train(found, alone):
    assert all(int(results["shard"]["rows"]) == 4 * 8 // WORLD for results in found[1])
    assert not torch.allclose(alone["lstm.weight_hh_l0"], dict(Tagger().named_parameters())["lstm.weight_hh_l0"])


def test_sharded_checkpoint_loads_in_one_process(found, alone):
    """Also into nn.LSTM, which has equal names and shapes."""
    model = fastlstm.convert(Tagger(), to="torch")
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    state = model.state_dict()
    checkpoint.load(state, checkpoint_id=found[0] / "sharded", no_dist=True)
    model.load_state_dict(state)
    assert type(model.lstm) is nn.LSTM
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), alone[name], rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("recompute", [False, 2])
def test_activation_checkpointing_replays_dropout(use_reentrant, recompute, backend):
    """The second forward pass draws the first one's masks, because checkpoint restores the random state."""
    gradients = []
    for wrapped in (False, True):
        torch.manual_seed(3)
        lstm = fastlstm.LSTM(3, 4, 3, dropout=0.5, dtype=TEST_DEVICE.dtype)
        lstm.recompute = recompute
        x = data(T, 2, 3).requires_grad_()
        torch.manual_seed(4)
        if wrapped:
            output = torch.utils.checkpoint.checkpoint(lstm, x, use_reentrant=use_reentrant)[0]
        else:
            output, _ = lstm(x)
        torch.randn(5)  # advances the random state before backward
        output.pow(2).sum().backward()
        gradients.append([output.detach(), x.grad, *(w.grad for w in lstm.parameters())])
    torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Tagger()

        def training_step(self, batch, _):
            x, lengths, target = batch
            out = self.model(x.transpose(0, 1), lengths).transpose(0, 1)
            return (out - target).pow(2).mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.05)

    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(X.transpose(0, 1), LENGTHS, TARGET.transpose(0, 1)), batch_size=B
    )
    module = Lit()
    trainer = lightning.Trainer(
        max_epochs=STEPS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, loader)
    expected = full(train(Tagger(), slice(0, B)))
    torch.testing.assert_close(full(module.model), expected)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    restored = Lit.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    torch.testing.assert_close(full(restored.model), expected)
