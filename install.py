"""What every target of the Makefile needs first: a virtual environment, its packages, and `csrc` compiled meanwhile.

    python install.py --venv .venv --torch 2.13.0

Compiling needs no more than pybind11 and ninja, so it runs beside the installation of the rest. Where one of the two
fails, and at Ctrl-C, the other is ended; a failure is one line below the message of the program that failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
# Python compiles a module when it is first imported. pip would compile all ten thousand files of the packages, which
# takes longer than unpacking them; so these, which every run imports, are imported once beside the compiler instead.
# Nothing depends on it but how long the first start takes.
FIRST_IMPORTS = (
    "import matplotlib.figure, peft, pynvml, rich.progress, sklearn.datasets, sklearn.model_selection, sklearn.svm, "
    "torch, transformers, tyro; from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline"
)


class StepError(Exception):
    """What failed, in a few words."""


async def succeeds(command: list[str], show_errors: bool = True, **environment: str) -> bool:
    """Whether a program ends with status 0; it is ended, and all it started, if this is cancelled."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stderr=None if show_errors else subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C reaches this program alone, which then ends the others in order
    )
    try:
        return await process.wait() == 0
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            await process.wait()


class Environment:
    """The virtual environment in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = str(folder / "bin" / "python")

    def exists(self) -> bool:
        """Whether it is there; pip is the last that venv writes."""
        return all((self.folder / "bin" / name).exists() for name in ("python", "pip"))

    def requirements(self) -> list[str]:
        """Packages that pyproject.toml names, those of development too."""
        code = (
            "try: import tomllib\n"
            "except ImportError: from pip._vendor import tomli as tomllib\n"  # Python 3.10
            "project = tomllib.load(open('pyproject.toml', 'rb'))['project']\n"
            "print('\\n'.join(project['dependencies'] + project['optional-dependencies']['dev']))"
        )
        done = subprocess.run([self.python, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise StepError("reading pyproject.toml")
        return done.stdout.splitlines()

    async def pip_installs(self, *arguments: str, show_errors: bool = True) -> bool:
        """Whether pip installs; it says nothing but its errors."""
        quiet = ["-m", "pip", "--disable-pip-version-check", "-q", "-q", "install", "--no-compile"]
        return await succeeds([self.python, *quiet, *arguments], show_errors)

    async def install_torch(self, version: str) -> bool:
        """Whether torch is there. Without an NVIDIA driver a CPU build is asked for first, from the configured index,
        then from PyTorch's own."""
        if shutil.which("nvidia-smi") is None:
            cpu = f"torch=={version}+cpu"
            pytorch = ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]
            for options in ([], ["--retries", "1", "--timeout", "15", *pytorch]):
                if await self.pip_installs(cpu, *options, show_errors=False):
                    return True
        return await self.pip_installs(f"torch=={version}")

    async def install_packages(self, torch: str) -> None:
        """torch once a version, then the rest."""
        stamp = self.folder / f".torch-{torch}"
        if not stamp.exists():
            if not await self.install_torch(torch):
                raise StepError(f"installing torch {torch}")
            stamp.touch()
        if not await self.pip_installs(*self.requirements()):
            raise StepError("installing the packages of pyproject.toml")
        await succeeds([self.python, "-c", FIRST_IMPORTS], show_errors=False, PYTHONDONTWRITEBYTECODE="")

    async def compile_module(self) -> None:
        """`flowgrpo_fast/_C*.so`."""
        if not await succeeds([self.python, "setup.py", "--quiet", "build_ext", "--inplace"]):
            raise StepError("compiling csrc")


async def both(first: asyncio.Future, second: asyncio.Future) -> None:
    """Waits for two tasks; where one fails the other is cancelled and has ended when the failure is raised."""
    try:
        await asyncio.gather(first, second)
    finally:
        for task in (first, second):
            task.cancel()
        await asyncio.gather(first, second, return_exceptions=True)


async def set_up(environment: Environment, torch: str) -> None:
    """All of it, with a line a phase."""
    start = time.monotonic()
    this = asyncio.current_task()
    assert this is not None
    for ending in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(ending, this.cancel)
    if not environment.exists():
        print(f"set-up: a virtual environment in {environment.folder}, with pybind11 and ninja", flush=True)
        if not await succeeds([sys.executable, "-m", "venv", str(environment.folder)]):
            raise StepError(f"python -m venv {environment.folder}")
    if not await environment.pip_installs("setuptools>=77", "pybind11>=3.0", "ninja>=1.11"):
        raise StepError("installing setuptools, pybind11 and ninja")
    print("set-up: installing packages and compiling csrc side by side (about a minute)", flush=True)
    packages = asyncio.ensure_future(environment.install_packages(torch))
    await both(packages, asyncio.ensure_future(environment.compile_module()))
    if not await environment.pip_installs("--no-deps", "--no-build-isolation", "--editable", "."):
        raise StepError("installing flowgrpo_fast itself")
    print(f"set-up: done in {time.monotonic() - start:.0f} s", flush=True)


def main() -> int:
    """Exit status: 0 all is there, 1 a step failed, 130 interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--torch", required=True)
    arguments = parser.parse_args()
    try:
        asyncio.run(set_up(Environment(arguments.venv), arguments.torch))
    except StepError as step:
        print(f"set-up failed: {step}; the message is above", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("set-up: interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
