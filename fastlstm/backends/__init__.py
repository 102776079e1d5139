"""The implementations of the contract in fastlstm/ops/schema.py, best first. A new one is a module and a line here.

Each has NAME and supports(call) -> None or the reason why not, and defines the ops fastlstm::<NAME>_layer and
fastlstm::<NAME>_layer_backward when imported.
"""

from __future__ import annotations

from types import ModuleType

from . import eager, native, triton

# Interpreted, Triton is for tests: last, so that "auto" never takes it.
_PREFERENCE = (native, eager, triton) if triton.INTERPRETED else (native, triton, eager)
BACKENDS: dict[str, ModuleType] = {module.NAME: module for module in _PREFERENCE}
