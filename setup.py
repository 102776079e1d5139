"""Builds fastlstm._C from csrc/ where that is possible, and installs pure Python where it is not.

FASTLSTM_BUILD chooses: "auto" (default: what the machine allows, said once), "python" (no extension), "cpu", "cuda"
(either of these fails if it cannot be built). CUDA needs nvcc and a CUDA build of torch, but no GPU. It is compiled
for TORCH_CUDA_ARCH_LIST, else for the GPUs of this machine, else for ARCHITECTURES. The extension works only with the
torch version it was built for; fastlstm/backends/native.py reads that version from the file before loading it.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
CHOICES = ("auto", "python", "cpu", "cuda")
ARCHITECTURES = "8.0;9.0a;10.0+PTX"  # Ampere, Hopper, Blackwell and, through PTX, what comes after

notes: list[str] = []  # for the user: what is left out of the build, and why


def print_notes() -> None:
    """Print the notes once. setup.py runs several times per installation; only the run that builds prints."""
    for note in notes:
        print(f"fastlstm: {note}", file=sys.stderr)
    notes.clear()


class BuildPy(build_py):
    """Runs in every installation, also in one without an extension."""

    def run(self) -> None:
        print_notes()
        super().run()


def why_no_extension() -> str:
    """Why the extension cannot be built here, "" if it can."""
    if sys.platform == "win32":
        return "csrc/ is written in the vector extensions of GCC and Clang, and torch's extensions need MSVC on Windows"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not importable at build time (pip install torch, then --no-build-isolation)"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        return f"there is no C++ compiler ({compiler})"
    return ""


def openmp() -> tuple[list[str], list[str], str]:
    """(compiler flags, linker flags, "") for OpenMP, or ([], [], why there is none).

    Apple's Clang ships no OpenMP runtime: torch's wheels for macOS contain LLVM's, which torch uses, and its header.
    """
    import torch

    compiler = os.environ.get("CXX", "c++").split()
    if sys.platform == "darwin":
        flags, link = ["-Xclang", "-fopenmp"], ["-lomp", "-Wl,-rpath,@loader_path/../torch/lib"]
    else:
        flags, link = ["-fopenmp"], ["-fopenmp"]
    check = [*compiler, *flags, f"-I{Path(torch.__file__).parent / 'include'}", "-fsyntax-only", "-x", "c++", "-"]
    if subprocess.run(check, input="#include <omp.h>\n", capture_output=True, text=True).returncode != 0:
        return [], [], f"{compiler[0]} finds no omp.h"
    return flags, link, ""


def set_cuda_home() -> None:
    """Tells torch where nvcc's toolkit is. It would take the folder above nvcc's, also where that nvcc is a wrapper."""
    if os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or shutil.which("nvcc") is None:
        return
    told = subprocess.run(["nvcc", "--dryrun", "-x", "cu", "-"], capture_output=True, text=True, input="").stderr
    found = re.search(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
    if found:
        os.environ["CUDA_HOME"] = str(Path(found[1].strip()).resolve())


def set_architectures() -> None:
    """torch compiles for the GPUs that it sees, and has no answer where it sees none."""
    import torch

    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = ARCHITECTURES


def why_no_cuda() -> str:
    """Why its CUDA part cannot be built here, "" if it can."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").exists():
        return f"nvcc was not found (CUDA_HOME={CUDA_HOME})"
    if not any(Path(CUDA_HOME).glob(folder + "include/cuda_runtime_api.h") for folder in ("", "targets/*/")):
        return f"the CUDA headers were not found (CUDA_HOME={CUDA_HOME})"
    return ""


def extensions(choice: str):
    """(ext_modules, cmdclass) for FASTLSTM_BUILD=choice."""
    if choice not in CHOICES:
        sys.exit(f"FASTLSTM_BUILD must be one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "python":
        return [], {}
    reason = why_no_extension()
    if reason:
        if choice != "auto":
            sys.exit(f"FASTLSTM_BUILD={choice}: {reason}")
        notes.append(f"installing as pure Python, because {reason}")
        return [], {"build_py": BuildPy}

    set_cuda_home()  # before torch's module looks for it
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    cuda = choice != "cpu"
    if cuda:
        reason = why_no_cuda()
        if reason and choice == "cuda":
            sys.exit(f"FASTLSTM_BUILD=cuda: {reason}")
        if reason:
            notes.append(f"building for CPU alone, because {reason}")
        cuda = not reason
    parallel, link, reason = openmp()
    if reason:
        notes.append(f"the CPU kernels will run on one thread, because {reason}")

    sources = [*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc" / "cpu").glob("*.cpp")]
    # No fast-math: NaN and inf must travel as in nn.LSTM. Contraction lets a*b+c become one FMA.
    cxx = ["-O3", "-g0", *parallel, "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
    # On every command line, so that ninja recompiles everything when torch changes.
    built_for = torch.__version__ + (f" with CUDA {torch.version.cuda}" if cuda else "")
    cxx.append(f'-DFASTLSTM_BUILT_FOR="{built_for}"')
    kind, flags = CppExtension, {"cxx": cxx}
    if cuda:
        set_architectures()
        sources += [*(ROOT / "csrc" / "cuda").glob("*.cpp"), *(ROOT / "csrc" / "cuda").glob("*.cu")]
        kind, flags = CUDAExtension, {"cxx": [*cxx, "-DFASTLSTM_CUDA"], "nvcc": ["-O3", "-lineinfo"]}
    extension = kind(
        "fastlstm._C",
        sorted(str(source.relative_to(ROOT)) for source in sources),
        include_dirs=[str(ROOT / "csrc")],
        depends=sorted(str(header.relative_to(ROOT)) for header in (ROOT / "csrc").rglob("*.*h")),
        extra_compile_args=flags,
        extra_link_args=link,
    )

    class Build(BuildExtension):
        """Without FASTLSTM_BUILD=cpu|cuda a failed build leaves a pure-Python install, and says so."""

        def run(self) -> None:
            print_notes()
            try:
                super().run()
            except Exception as error:
                if choice != "auto":
                    raise
                print(f"fastlstm: installing as pure Python, because the build failed: {error}", file=sys.stderr)
                self.extensions = []

        def build_extension(self, ext) -> None:
            built = Path(self.get_ext_fullpath(ext.name))
            if built.exists() and f"built for torch {built_for}\0".encode() not in built.read_bytes():
                self.force = True  # otherwise only modification times count
            super().build_extension(ext)

    return [extension], {"build_ext": Build, "build_py": BuildPy}


ext_modules, cmdclass = extensions(os.environ.get("FASTLSTM_BUILD", "auto"))
setup(ext_modules=ext_modules, cmdclass=cmdclass)
