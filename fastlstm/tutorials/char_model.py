"""Character model: one-hot characters of Python's help texts in, the next character out, and text sampled from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlstm.tutorials import plots
from fastlstm.tutorials.common import Check, History, Implementation, Tutorial

BATCH = 32
LENGTH = 50  # characters that one training sequence predicts
PROMPT = "The "


def help_texts() -> tuple[str, str]:
    """Python's help texts as (training, held out), about 420 and 40 thousand characters.

    The topics quote each other at length, so a plain cut would test on text that was trained on: paragraphs of the last
    tenth that stand in the training part too are left out.
    """
    from pydoc_data.topics import topics

    text = "\n".join(topics.values())
    cut = len(text) * 9 // 10
    training = text[:cut]
    seen = set(training.split("\n\n"))
    return training, "\n\n".join(paragraph for paragraph in text[cut:].split("\n\n") if paragraph not in seen)


class CharModel(nn.Module):
    """One-hot characters [B, T, C], state or None -> logits of the next character [B * T, C], state."""

    def __init__(self, impl: Implementation, characters: int) -> None:
        super().__init__()
        self.lstm = impl.LSTM(characters, 100, num_layers=2, batch_first=True)
        self.head = nn.Linear(100, characters)

    def forward(self, one_hot: Tensor, state=None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        output, state = self.lstm(one_hot, state)
        return self.head(output.reshape(-1, output.shape[-1])), state


class CharacterModel(Tutorial):
    name = "char_model"
    title = "Character model"
    timing_block = 10

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        training, held_out = help_texts()
        self.full_epochs = 5
        self.epochs = 1 if self.quick else self.full_epochs
        self.characters = sorted(set(training + held_out))
        self.training, self.held_out = self.encode(training), self.encode(held_out)
        self.batches = (len(self.training) - 1) // LENGTH // BATCH
        self.updates = self.epochs * self.batches

    def encode(self, text: str) -> Tensor:
        """text -> labels [len(text)] int64, each character's place in `self.characters`."""
        label = {character: k for k, character in enumerate(self.characters)}
        return torch.tensor([label[character] for character in text], device=self.device)

    def one_hot(self, labels: Tensor) -> Tensor:
        """[B, T] -> [B, T, C] in the model's dtype."""
        return F.one_hot(labels, len(self.characters)).to(self.dtype)

    def make_model(self, impl: Implementation) -> nn.Module:
        return CharModel(impl, len(self.characters))

    def train(self, model: nn.Module, history: History | None = None) -> Iterator[float]:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.full_epochs * self.batches)
        generator = self.generator()
        inputs = self.training[:-1].unfold(0, LENGTH, LENGTH)
        targets = self.training[1:].unfold(0, LENGTH, LENGTH)
        for _ in range(self.epochs):
            order = torch.randperm(len(inputs), generator=generator).to(self.device)
            for rows in order[: self.batches * BATCH].split(BATCH):
                logits, _ = model(self.one_hot(inputs[rows]))
                loss = F.cross_entropy(logits, targets[rows].flatten())
                optimizer.zero_grad()
                loss.backward()
                # Steep early updates otherwise blow up now and then at this learning rate.
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                if history is not None:
                    history["training"].append(loss.item())
                yield loss.item()
            if history is not None:
                history["held out"].append(self.evaluate(model))

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """(cross-entropy in nats, share of characters guessed right) over the held-out text, read as 16 long rows."""
        length = (len(self.held_out) - 1) // 16
        inputs = self.held_out[: 16 * length].view(16, length)
        targets = self.held_out[1 : 16 * length + 1]
        logits, _ = model(self.one_hot(inputs))
        return F.cross_entropy(logits, targets).item(), (logits.argmax(-1) == targets).double().mean().item()

    @torch.no_grad()
    def sample(self, model: nn.Module, length: int = 400, temperature: float = 0.7) -> str:
        """`length` characters after PROMPT, each drawn from the model's distribution sharpened by `temperature`."""
        generator = self.generator()
        labels = self.encode(PROMPT)
        text, state = PROMPT, None
        for _ in range(length):
            logits, state = model(self.one_hot(labels.unsqueeze(0)), state)
            odds = F.softmax(logits[-1].double().cpu() / temperature, dim=-1)
            drawn = torch.multinomial(odds, 1, generator=generator)
            text += self.characters[int(drawn)]
            labels = drawn.to(self.device)
        return text

    def checks(self, model: nn.Module, history: History) -> list[Check]:
        return [Check("held-out accuracy", history["held out"][-1][1], 0.35 if self.quick else 0.45, below=False)]

    def notes(self, model: nn.Module, impl: Implementation) -> list[str]:
        commonest = (self.held_out == self.held_out.mode().values).double().mean().item()
        return [
            f"always guessing the commonest character would be right {commonest:.1%} of the time",
            f"sampled text:\n{self.sample(model)}",
        ]

    def plot(self, model: nn.Module, history: History, folder: Path) -> list[Path]:
        figure, (losses, accuracy) = plots.new_figure(1, 2, size=(10, 4.2))
        entropy, right = zip(*history["held out"], strict=True)
        ends = [self.batches * (epoch + 1) for epoch in range(len(right))]
        losses.plot(history["training"], color=plots.BLUE, linewidth=0.8, label="training, every batch")
        losses.plot(ends, entropy, "o-", color=plots.ORANGE, label="held-out text")
        losses.set(xlabel="update", ylabel="cross-entropy, nats per character", title="Loss")
        losses.legend()
        accuracy.plot(range(1, len(right) + 1), [100 * share for share in right], "o-", color=plots.ORANGE)
        accuracy.axhline(100 * self.checks(model, history)[0].bar, color=plots.GREY, linestyle="--", linewidth=1)
        plots.count_epochs(accuracy)
        accuracy.set(ylabel="% right", title="Next character, held-out text")
        return [plots.save(figure, folder / f"{self.name}.png")]
