"""SASS of a kernel: `disassemble`, and `Step`, the time loop of a persistent kernel."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s+/\*")
BRANCH = re.compile(r"\bBRA\b.*?\b0x([0-9a-f]+)$")


def cuobjdump() -> str | None:
    """Path of cuobjdump: the CUDA toolkit's, or the one in Triton's wheel."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = find_spec("triton")
    inside = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    return str(inside) if inside and inside.exists() else None


def disassemble(cubin: Path) -> list[tuple[int, str]]:
    """(address, instruction with its predicate) of the one kernel in `cubin`."""
    tool = cuobjdump()
    assert tool is not None
    text = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    found = [(int(match[1], 16), match[2]) for match in map(LINE.match, text.splitlines()) if match]
    assert found, text
    return found


def polls(text: str) -> bool:
    """Returns true if an instruction polls for a state: a load of a flag, or a test of an mbarrier's phase."""
    return "SYNCS.PHASECHK" in text or ("LDG" in text and "STRONG.GPU" in text and ".128" not in text)


def sends(text: str) -> bool:
    """Returns true if it sends a state: the fence before a flag store, or a remote store."""
    return "MEMBAR" in text or "STAS" in text


def shortest_loop(instructions: list[tuple[int, str]], *has: Callable[[str], bool]) -> list[str]:
    """From the target of a backward branch to the branch, with an instruction of each kind in `has`."""
    loops = []
    for address, text in instructions:
        target = BRANCH.search(text)
        if target and int(target[1], 16) < address:
            body = [t for a, t in instructions if int(target[1], 16) <= a <= address]
            if all(any(map(is_it, body)) for is_it in has):
                loops.append(body)
    assert loops, "no loop has all of these instructions"
    return min(loops, key=len)


@dataclass
class Step:
    """The instructions of one iteration of the time loop, by address."""

    code: list[str]

    @classmethod
    def of(cls, instructions: list[tuple[int, str]]) -> Step:
        """The shortest loop that polls, sends and has a barrier."""
        return cls(shortest_loop(instructions, polls, sends, lambda text: "BAR.SYNC" in text))

    def after_last_poll(self) -> list[str]:
        """The instructions after the last poll, up to the one that sends the state."""
        start = max(k for k, text in enumerate(self.code) if polls(text))
        return self.code[start + 1 : self.where(sends, start) + 1]

    def where(self, is_it: Callable[[str], bool], start: int = 0) -> int:
        return next(k for k in range(start, len(self.code)) if is_it(self.code[k]))


def barriers(code: list[str]) -> list[int]:
    return [k for k, text in enumerate(code) if "BAR.SYNC" in text]
