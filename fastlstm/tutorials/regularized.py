"""python -m fastlstm.tutorials.regularized: recurrent dropout, zoneout and layer normalization against overfitting.

One layer learns to predict characters of a text so short that the plain layer learns it by heart: its loss on the text
goes down while its loss on held-out text goes up. Recurrent dropout and zoneout prevent that; layer normalization
learns more in fewer updates. Each trains from the same seed with equally many updates.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import fastlstm
from fastlstm.tutorials import plots
from fastlstm.tutorials.char_model import BATCH, LENGTH, help_texts
from fastlstm.tutorials.common import Check, missing_packages

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "recurrent_dropout": {"recurrent_dropout": 0.3},
    "zoneout": {"zoneout": 0.1},
    "layer_norm": {"layer_norm": True},
}
HIDDEN = 128
CHARACTERS, HELD_OUT = 12_000, 8_000
LEARNING_RATE = 1e-2
EPOCHS, QUICK_EPOCHS = 80, 30


@dataclass
class Curves:
    """Mean cross-entropy of each epoch, in nats per character."""

    training: list[float] = field(default_factory=list)  # with the option's masks
    held_out: list[float] = field(default_factory=list)


class Texts:
    """The training text and the held-out one as labels, and what they are one-hot in."""

    def __init__(self) -> None:
        training, held_out = help_texts()
        training, held_out = training[: CHARACTERS + 1], held_out[: HELD_OUT + 1]
        label = {character: k for k, character in enumerate(sorted(set(training + held_out)))}
        self.characters = len(label)
        self.training, self.held_out = (torch.tensor([label[c] for c in text]) for text in (training, held_out))


class Model(nn.Module):
    """Labels [B, T] -> logits of the next character [B, T, C]."""

    def __init__(self, characters: int, **options: Any) -> None:
        super().__init__()
        self.characters = characters
        self.lstm = fastlstm.LSTM(characters, HIDDEN, batch_first=True, **options)
        self.head = nn.Linear(HIDDEN, characters)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(F.one_hot(labels, self.characters).float())[0])

    def loss(self, labels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self(labels).flatten(0, 1), targets.flatten())


def train(texts: Texts, option: str, epochs: int, seed: int = 0) -> Iterator[Curves]:
    """Train a model with the option, and yield its curves after every epoch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, curves = Model(texts.characters, **OPTIONS[option]), Curves()
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        inputs, targets = (labels.unfold(0, LENGTH, LENGTH) for labels in (texts.training[:-1], texts.training[1:]))
        for _ in range(epochs):
            losses = []
            for rows in torch.randperm(len(inputs)).split(BATCH):
                loss = model.train().loss(inputs[rows], targets[rows])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                losses.append(loss.item())
            curves.training.append(sum(losses) / len(losses))
            with torch.no_grad():
                rows, next_rows = (labels.view(16, -1) for labels in (texts.held_out[:-1], texts.held_out[1:]))
                curves.held_out.append(model.eval().loss(rows, next_rows).item())
            yield curves


def checks(curves: dict[str, Curves]) -> list[Check]:
    """Held-out loss against the plain layer's, after equally many updates: at the end where the option regularizes."""
    held_out = {option: own.held_out for option, own in curves.items()}
    return [
        *(
            Check(f"{option}: held-out loss at the end", held_out[option][-1], held_out["plain"][-1])
            for option in ("recurrent_dropout", "zoneout")
        ),
        Check("layer_norm: held-out loss at its best", min(held_out["layer_norm"]), min(held_out["plain"])),
    ]


def plot(curves: dict[str, Curves], folder: Path) -> Path:
    figure, axes = plots.new_figure(1, 2, size=(10, 4.2))
    for axis, kind in zip(axes, ("training", "held_out"), strict=True):
        for option, own in curves.items():
            axis.plot(range(1, len(own.training) + 1), getattr(own, kind), label=option.replace("_", " "))
        title = "Training text" if kind == "training" else "Held-out text"
        axis.set(xlabel="epoch", ylabel="cross-entropy, nats per character", title=title)
    axes[0].legend()
    return plots.save(figure, folder / "regularized.png")


def main(arguments: list[str] | None = None) -> int:
    """Train with every option, print and plot the curves; 1 if a bar was missed, 2 if packages are missing."""
    parser = argparse.ArgumentParser(prog="python -m fastlstm.tutorials.regularized", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_EPOCHS} epochs in place of {EPOCHS}")
    parser.add_argument("--plots", type=Path, default=Path("tutorial_plots"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU")
    parsed = parser.parse_args(arguments)
    missing = missing_packages([])
    if missing:
        print(f"the tutorials need {', '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    torch.set_num_threads(parsed.threads)
    texts = Texts()
    curves: dict[str, Curves] = {}
    epochs = QUICK_EPOCHS if parsed.quick else EPOCHS
    for option in OPTIONS:
        own = curves[option] = list(train(texts, option, epochs, parsed.seed))[-1]
        print(
            f"{option:<18} training {own.training[-1]:.3f}, held out {own.held_out[-1]:.3f}, "
            f"at its best {min(own.held_out):.3f}"
        )
    found = checks(curves)
    for check in found:
        print(f"{'pass' if check.passed else 'MISS'} {check}")
    with plots.style():
        print(f"plot: {plot(curves, parsed.plots)}")
    return 0 if all(check.passed for check in found) else 1


if __name__ == "__main__":
    sys.exit(main())
