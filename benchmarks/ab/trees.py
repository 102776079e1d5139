"""Source trees to compare: the working tree, and any git revision built under build/ab/."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.machine import ROOT, commit

CACHE = ROOT / "build" / "ab"


class TreeError(Exception):
    """A revision that does not exist or cannot be built; the message is for the user."""


@dataclass(frozen=True)
class Tree:
    """A folder to import fastlstm from, and what to call it."""

    path: Path
    commit: str  # short hash, "-dirty" with uncommitted changes


def _git(*words: str, cwd: Path = ROOT) -> str:
    """Raises TreeError with git's message."""
    try:
        done = subprocess.run(["git", *words], cwd=cwd, capture_output=True, text=True, check=True)
    except OSError as error:
        raise TreeError(f"git cannot be run: {error}") from error
    except subprocess.CalledProcessError as error:
        raise TreeError(f"git {words[0]}: {error.stderr.strip() or error}") from error
    return done.stdout.strip()


def resolve(revision: str) -> str:
    """Full hash of the commit that `revision` names. Raises TreeError if there is none."""
    try:
        return _git("rev-parse", "--verify", "--quiet", "--end-of-options", revision + "^{commit}")
    except TreeError as error:
        raise TreeError(f"unknown revision {revision!r}: git finds no such commit in this repository") from error


def working_tree() -> Tree:
    return Tree(ROOT, commit())


def stale_extension(tree: Path) -> str:
    """Why the extension of a tree may not be what its sources say, "" if nothing is known against it.

    By modification times, as setup.py decides what to compile.
    """
    built = [path for path in (tree / "fastlstm").glob("_C.*") if path.suffix in (".so", ".pyd")]
    if not built:
        return "fastlstm has no extension there"
    sources = [tree / "setup.py", *(path for path in (tree / "csrc").rglob("*.*") if path.is_file())]
    newest = max((path for path in sources if path.exists()), key=lambda path: path.stat().st_mtime)
    if newest.stat().st_mtime > max(path.stat().st_mtime for path in built):
        return f"its extension is older than {newest.relative_to(tree).as_posix()}"
    return ""


def _build_id() -> dict[str, str]:
    """What a build depends on besides the commit."""
    return {"torch": torch.__version__, "python": platform.python_version(), "build": _build_kind()}


def _build_kind() -> str:
    return os.environ.get("FASTLSTM_BUILD", "cpu")


def built(revision: str, say: Callable[[str], None] = lambda text: None) -> Tree:
    """The tree of a revision with its extension, compiled on first use and reused afterwards.

    FASTLSTM_BUILD is passed on, "cpu" by default. build/ab/<commit>.json marks a finished build, <commit>.log holds the
    compiler's output. Raises TreeError if the revision is unknown or its build fails.
    """
    full = resolve(revision)
    short = full[:12]
    tree, marker, log = CACHE / short, CACHE / f"{short}.json", CACHE / f"{short}.log"
    wanted = _build_id()
    if tree.is_dir() and marker.exists() and json.loads(marker.read_text()) == wanted:
        return Tree(tree, short)
    marker.unlink(missing_ok=True)
    _check_out(full, tree)
    say(f"building {short}: once, some minutes")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    with log.open("w") as out:
        done = subprocess.run(
            command, cwd=tree, env=os.environ | {"FASTLSTM_BUILD": _build_kind()}, stdout=out, stderr=subprocess.STDOUT
        )
    if done.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise TreeError(f"{short} does not build: {last[0]} (build/ab/{log.name} has all of it)")
    marker.write_text(json.dumps(wanted) + "\n")
    return Tree(tree, short)


def _check_out(full: str, tree: Path) -> None:
    """A worktree of a commit. One left by an interrupted build is reused, with its compiled objects."""
    if (tree / ".git").exists():
        try:
            if _git("rev-parse", "HEAD", cwd=tree) == full:
                return
        except TreeError:
            pass  # its registration is gone
    shutil.rmtree(tree, ignore_errors=True)
    tree.parent.mkdir(parents=True, exist_ok=True)
    _git("worktree", "prune")  # the registration of a folder that `make clean` has deleted
    _git("worktree", "add", "--quiet", "--detach", str(tree), full)
