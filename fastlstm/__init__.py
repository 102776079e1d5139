"""Drop-in replacement for torch.nn.LSTM: use `fastlstm.LSTM` instead, and change nothing else."""

from . import functional, reference
from .convert import convert, patch_torch
from .dispatch import use_backend
from .explain import Explanation, explain
from .modules import LSTM, LSTMCell

__version__ = "0.1.0"

__all__ = [
    "LSTM",
    "Explanation",
    "LSTMCell",
    "convert",
    "explain",
    "functional",
    "patch_torch",
    "reference",
    "use_backend",
]
