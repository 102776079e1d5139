"""Drop-in replacement for torch.nn.LSTM: use `fastlstm.LSTM` instead, and change nothing else."""

from . import functional, reference
from .cell import LSTMCell
from .convert import convert, patch_torch
from .dispatch import use_backend
from .explain import Explanation, explain
from .freeze import freeze, thaw
from .frozen import FrozenLSTM, FrozenLSTMCell
from .modules import LSTM

__version__ = "0.1.0"

__all__ = [
    "LSTM",
    "Explanation",
    "FrozenLSTM",
    "FrozenLSTMCell",
    "LSTMCell",
    "convert",
    "explain",
    "freeze",
    "functional",
    "patch_torch",
    "reference",
    "thaw",
    "use_backend",
]
