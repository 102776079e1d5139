"""The public models: `MODELS`, each with its package, sizes and a training and an inference call.

Their packages are the extra "models"; each is imported by its own `build` alone. Weights are random from one seed
unless the package ships them, and so is the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Results = dict[str, Tensor]


@dataclass
class Workload:
    """A module and how it is called. `inputs` is any nesting of tensors (pytree), which the gate casts to float64.

    train: the loss that a training step differentiates; runs in train mode.
    infer: the results of one inference call; runs in eval mode under no_grad.
    """

    module: nn.Module
    inputs: Any
    train: Callable[[Any, Any], Tensor]
    infer: Callable[[Any, Any], Results]


@dataclass(frozen=True)
class Model:
    """name and sizes make up the case's name; package: the distribution to install, imported by `build`."""

    name: str
    sizes: str
    package: str
    build: Callable[[], Workload]

    @property
    def case(self) -> str:
        return f"{self.name}, {self.sizes}"


def open_unmix() -> Workload:
    """Music separation: a bidirectional LSTM between linear layers over spectrogram frames."""
    from openunmix.model import OpenUnmix

    module = OpenUnmix(nb_bins=2049, max_bin=1487)
    mixture, target = torch.rand(2, 16, 2, 2049, 255)
    return Workload(
        module,
        (mixture, target),
        lambda model, data: F.mse_loss(model(data[0]), data[1]),
        lambda model, data: {"spectrogram": model(data[0][:1])},
    )


def hybrid_demucs() -> Workload:
    """Music separation: convolutions over waveform and spectrogram, small LSTMs in the innermost residual branches."""
    from demucs.hdemucs import HDemucs

    module = HDemucs(["drums", "bass", "other", "vocals"])
    mixture = 0.1 * torch.randn(1, 2, 2 * 44100)
    sources = 0.1 * torch.randn(1, 4, 2, 2 * 44100)
    return Workload(
        module,
        (mixture, sources),
        lambda model, data: F.l1_loss(model(data[0]), data[1]),
        lambda model, data: {"sources": model(data[0])},
    )


def voice_encoder() -> Workload:
    """Speaker embeddings: three LSTM layers and a linear one, with the weights that the package ships."""
    from resemblyzer import VoiceEncoder

    module = VoiceEncoder("cpu", verbose=False)
    mels = torch.rand(64, 160, 40)

    def speakers_apart(model: Any, mels: Tensor) -> Tensor:
        """Cross entropy of the similarities to the centroids of 8 speakers, 8 utterances each."""
        embeddings = model(mels)
        centroids = embeddings.view(8, 8, -1).mean(1)
        return F.cross_entropy(10 * embeddings @ centroids.T, torch.arange(8).repeat_interleave(8))

    return Workload(module, mels, speakers_apart, lambda model, mels: {"embeddings": model(mels[:8])})


def tacotron2() -> Workload:
    """Speech synthesis: a bidirectional LSTM over text, two LSTMCells and attention in a loop over frames."""
    from torchaudio.models import Tacotron2

    B, characters, frames = 8, 80, 100
    module = Tacotron2(decoder_max_step=frames, gate_threshold=1.0)  # random weights say nothing about where to stop
    tokens = torch.randint(0, 148, (B, characters))
    lengths = torch.full((B,), characters)
    mels, mel_lengths = torch.randn(B, 80, frames), torch.full((B,), frames)

    def loss(model: Any, data: tuple[Tensor, ...]) -> Tensor:
        tokens, lengths, mels, mel_lengths = data
        before, after, gates, _ = model(tokens, lengths, mels, mel_lengths)
        ends = torch.zeros_like(gates)
        ends[:, -1] = 1
        return F.mse_loss(before, mels) + F.mse_loss(after, mels) + F.binary_cross_entropy_with_logits(gates, ends)

    def synthesize(model: Any, data: tuple[Tensor, ...]) -> Results:
        return {"mels": model.infer(data[0][:1], data[1][:1])[0]}

    return Workload(module, (tokens, lengths, mels, mel_lengths), loss, synthesize)


def recurrent_ppo() -> Workload:
    """Reinforcement learning: an actor's and a critic's LSTM, one step per action, whole rollouts in training."""
    from gymnasium import spaces
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
    from sb3_contrib.common.recurrent.type_aliases import RNNStates
    from stable_baselines3.common.utils import ConstantSchedule

    class Policy(RecurrentActorCriticPolicy):
        def extract_features(self, *args: Any) -> Any:
            """The features in the weights' dtype: the package casts observations to float32, also in a float64 copy."""
            features: Any = super().extract_features(*args)
            return features.to(self.value_net.weight.dtype)

    T, B, features, actions = 128, 8, 24, 4
    observations = spaces.Box(-math.inf, math.inf, (features,))
    module = Policy(observations, spaces.Box(-1, 1, (actions,)), ConstantSchedule(3e-4))
    zeros = torch.zeros(1, B, 256)
    starts = torch.zeros(B, T)
    starts[:, 0] = 1
    starts[torch.arange(B), torch.randint(1, T, (B,))] = 1  # one episode of every environment ends inside
    rollout = {
        "observations": torch.randn(B * T, features),
        "actions": torch.randn(B * T, actions),
        "advantages": torch.randn(B * T),
        "starts": starts.flatten(),
        "states": RNNStates((zeros, zeros), (zeros, zeros)),
    }

    def loss(model: Any, data: dict[str, Any]) -> Tensor:
        values, log_prob, entropy = model.evaluate_actions(
            data["observations"], data["actions"], data["states"], data["starts"]
        )
        gain = (data["advantages"] * (log_prob - log_prob.detach()).exp()).mean()
        return 0.5 * (values.flatten() - data["advantages"]).pow(2).mean() - gain - 0.01 * entropy.mean()

    def act(model: Any, data: dict[str, Any]) -> Results:
        step = data["observations"][:B], data["states"], data["starts"][::T]
        actions, values, log_prob, _ = model(*step, deterministic=True)
        return {"actions": actions, "values": values, "log_prob": log_prob}

    return Workload(module, rollout, loss, act)


def rainfall_runoff() -> Workload:
    """Hydrology: one LSTM layer over a year of daily weather, and a linear head."""
    from neuralhydrology.modelzoo.cudalstm import CudaLSTM
    from neuralhydrology.utils.config import Config

    T, B = 365, 256
    weather = [f"weather_{k}" for k in range(5)]
    config = {
        "model": "cudalstm",
        "head": "regression",
        "hidden_size": 128,
        "initial_forget_bias": 3,
        "output_dropout": 0.4,
        "seq_length": T,
        "predict_last_n": 1,
        "dynamic_inputs": weather,
        "static_attributes": [f"attribute_{k}" for k in range(27)],
        "target_variables": ["discharge"],
    }
    module = CudaLSTM(Config(config))
    data = {
        "x_d": {name: torch.randn(B, T, 1) for name in weather},
        "x_s": torch.randn(B, 27),
        "y": torch.randn(B, 1),
    }

    def loss(model: Any, data: dict[str, Any]) -> Tensor:
        return F.mse_loss(model(data)["y_hat"][:, -1], data["y"])

    return Workload(module, data, loss, lambda model, data: {"discharge": model(data)["y_hat"][:, -1]})


def crdnn() -> Workload:
    """Speech recognition: convolutions, four bidirectional LSTM layers, and linear ones, over filter banks."""
    from speechbrain.lobes.models.CRDNN import CRDNN
    from speechbrain.nnet.RNN import LSTM

    B, frames, states = 4, 400, 40
    model = CRDNN(input_shape=[B, frames, 40], rnn_class=LSTM, rnn_layers=4, rnn_neurons=512, time_pooling=True)
    module = nn.Sequential(model, nn.Linear(512, states))
    features, labels = torch.randn(B, frames, 40), torch.randint(0, states, (B, frames // 2))

    def loss(model: Any, data: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(data[0]).flatten(0, 1), data[1].flatten())

    return Workload(module, (features, labels), loss, lambda model, data: {"scores": model(data[0][:1])})


MODELS = (
    Model("Resemblyzer", "64 x 1.6 s", "Resemblyzer", voice_encoder),
    Model("neuralhydrology CudaLSTM", "256 x 365 days, H=128", "neuralhydrology", rainfall_runoff),
    Model("open-unmix", "16 x 6 s", "openunmix", open_unmix),
    Model("Recurrent PPO", "8 x 128 steps, H=256", "sb3-contrib", recurrent_ppo),
    Model("SpeechBrain CRDNN", "4 x 4 s, H=512", "speechbrain", crdnn),
    Model("Tacotron 2", "8 x 100 frames, H=1024", "torchaudio", tacotron2),
    Model("Hybrid Demucs", "2 s", "demucs", hybrid_demucs),
)
