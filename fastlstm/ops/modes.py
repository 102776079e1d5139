"""What surrounds a call: a recording of its ops, a transform of torch.func, forward-mode AD."""

from __future__ import annotations

from torch._C import _is_tracing
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad
from torch.compiler import is_compiling


def recording() -> bool:
    """Return True if torch.compile or torch.jit.trace records a graph: sizes may be symbols or tensors."""
    return is_compiling() or _is_tracing()


def transform_active() -> bool:
    """Return True under a transform of torch.func (vmap, grad, jvp, functionalize, ...)."""
    return maybe_current_level() is not None


def forward_ad_active() -> bool:
    """Return True under forward-mode AD: torch.func.jvp or a dual level."""
    return forward_ad._current_level >= 0
