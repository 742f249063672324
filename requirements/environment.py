"""Makes `.venv` from the CPU lock file, and writes the lock files. Standard library only.

    python3.11 requirements/environment.py install      # what `make nightly` and `make test` do first
    python3.11 requirements/environment.py lock         # what `make lock` does
    python3.11 requirements/environment.py check        # ends with 2 where conrec does not run with this Python

Invariant: `.venv` is complete exactly when its stamp file holds the digest of the lock file it was made from; one
whose installation was killed has none and is made anew. The lock names every version, so pip resolves nothing
(`--no-deps`) and what requirements/overrides.txt leaves out stays out.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "complete"
LOG = VENV / "install.log"
CPU_LOCK = ROOT / "requirements" / "cpu.txt"
GPU_LOCK = ROOT / "requirements" / "gpu.txt"
OVERRIDES = ROOT / "requirements" / "overrides.txt"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SECONDS_BETWEEN_LINES = 15


class InstallError(Exception):
    """Something a person can mend; printed without a traceback."""


def install() -> None:
    """Creates or completes `.venv`; returns at once where it is complete."""
    if STAMP.exists() and STAMP.read_text() == digest():
        STAMP.touch()  # make compares times: a checkout may have made the lock file look newer
        return
    started = time.monotonic()
    if STAMP.exists():
        say("requirements have changed since .venv was made; installing the difference")
        STAMP.unlink()
    else:
        if VENV.exists():
            say("an installation into .venv was not finished; starting over")
            shutil.rmtree(VENV)
        say("creating .venv (first time only: some minutes, under 3 GB)")
        created = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True)
        if created.returncode:
            shutil.rmtree(VENV, ignore_errors=True)
            raise InstallError(f"{sys.executable} -m venv failed; install its venv package\n{created.stdout.strip()}")
    install_torch()
    pip_install("the lock file", ["-r", str(CPU_LOCK)], total=len(pins(CPU_LOCK)))
    # Editable, so that `conrec` and the workers that Ray starts run this checkout.
    pip_install("conrec", ["--no-build-isolation", "--editable", str(ROOT)])
    compile_bytecode()
    STAMP.write_text(digest())
    say(f"installed in {time.monotonic() - started:.0f} s")


def digest() -> str:
    """What `.venv` is made from: the lock file, and the project's own metadata, which its entry points come from."""
    return hashlib.sha256(CPU_LOCK.read_bytes() + json.dumps(project()).encode()).hexdigest()


def project() -> dict[str, Any]:
    """The table of that name in pyproject.toml."""
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])


def is_supported(version: tuple[int, ...]) -> bool:
    """Whether `requires-python`, written as `>=3.A,<3.B`, admits (major, minor)."""
    low, high = (tuple(map(int, bound)) for bound in re.findall(r"(\d+)\.(\d+)", project()["requires-python"]))
    return low <= version < high


def install_torch() -> None:
    """The CPU build of torch: from the sources pip is configured with, else from the PyTorch project's own index."""
    torch = next(pin for pin in pins(CPU_LOCK) if pin.startswith("torch=="))
    try:
        pip_install("torch", [torch])
        return
    except InstallError as error:
        configured = str(error)
    try:
        pip_install(f"torch from {TORCH_CPU_INDEX}", ["--index-url", TORCH_CPU_INDEX, torch])
    except InstallError as error:
        raise InstallError(
            f"{torch} is neither in the sources that pip is configured with nor at {TORCH_CPU_INDEX}; give pip one "
            f"that has it (pip config set global.find-links FOLDER)\nconfigured sources: {configured}\n"
            f"{TORCH_CPU_INDEX}: {error}"
        ) from None


def pip_install(what: str, arguments: list[str], total: int = 1) -> None:
    """One pip run; its output goes to the log, one short line now and then to the terminal."""
    command = [str(PYTHON), "-m", "pip", "install", "--no-deps", "--no-compile", "--progress-bar", "off", *arguments]
    collected = 0
    spoke = time.monotonic()
    lines: list[str] = []
    with (
        open(LOG, "a") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip,
    ):
        assert pip.stdout is not None
        for line in pip.stdout:
            log.write(line)
            lines.append(line.strip())
            collected += line.startswith(("Collecting ", "Processing ", "Requirement already"))
            if time.monotonic() - spoke > SECONDS_BETWEEN_LINES:
                spoke = time.monotonic()
                say(f"  {what}: {collected} of {total} fetched")
            if line.startswith("Installing collected packages") and total > 1:
                say(f"  {what}: {collected} of {total} fetched, unpacking")
    if pip.returncode:
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        raise InstallError("; ".join(errors[-1:] or lines[-3:]) + f" (log: {LOG})")


def compile_bytecode() -> None:
    """Compiles on all cores what pip would compile on one: an import of vLLM takes 5 s of CPU with it, 12 without.

    Left out for the disk's sake: the libraries' own tests, and the five hundred models of transformers.
    """
    say("  compiling")
    packages = next(VENV.glob("lib/python*/site-packages"))
    command = [str(PYTHON), "-m", "compileall", "-q", "-j", "0", "-x", r"/tests/|/transformers/models/", str(packages)]
    with open(LOG, "a") as log:
        # Some packages ship templates that are no Python: a failure to compile them is none of the installation.
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)


def lock() -> None:
    """Writes requirements/cpu.txt and requirements/gpu.txt with uv, which is installed beside the build files."""
    tools = ROOT / "build" / "lock"
    uv = tools / "bin" / "uv"
    if not uv.exists():
        subprocess.run([sys.executable, "-m", "venv", str(tools)], check=True)
        subprocess.run([str(tools / "bin" / "python"), "-m", "pip", "install", "--quiet", "uv"], check=True)
    links, indexes = pip_sources()
    compile_cpu = ["--extra", "cpu", "--extra", "dev", "--extra", "examples", "--overrides", str(OVERRIDES), *links]
    try:
        uv_compile(uv, CPU_LOCK, [*compile_cpu, *indexes])
    except InstallError as error:
        if "torch" not in str(error):
            raise
        say(f"the configured sources hold no CPU torch; resolving with {TORCH_CPU_INDEX}")
        uv_compile(uv, CPU_LOCK, [*compile_cpu, *indexes, "--extra-index-url", TORCH_CPU_INDEX])
    # Without the configured folders of wheels: a CPU torch lying there would be taken for the CUDA build.
    uv_compile(uv, GPU_LOCK, ["--extra", "gpu", "--extra", "s3", "--extra", "gcs", *indexes])


def uv_compile(uv: Path, target: Path, arguments: list[str]) -> None:
    """Resolves pyproject.toml for 64-bit Linux and the oldest Python into one lock file, which serves all of them."""
    command = [
        *(str(uv), "pip", "compile", str(ROOT / "pyproject.toml"), "--quiet", "--no-header", "--no-annotate"),
        *("--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"),
        # Several indexes are one pool, as pip takes them; uv would stop at the first that knows the name.
        *("--index-strategy", "unsafe-best-match", "--output-file", str(target), "--upgrade", *arguments),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InstallError(f"{target.name}: {done.stderr.strip()}")
    say(f"{target.relative_to(ROOT)}: {len(pins(target))} packages")


def pip_sources() -> tuple[list[str], list[str]]:
    """uv's arguments for the folders of wheels and for the indexes that pip is configured with."""
    listing = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"^[^\s=]*\.([a-z-]+)='(.*)'$", listing, flags=re.MULTILINE):
        found.setdefault(key, []).extend(part for part in value.replace("\\n", " ").split())
    links = [part for value in dict.fromkeys(found.get("find-links", [])) for part in ("--find-links", value)]
    extra = [part for value in dict.fromkeys(found.get("extra-index-url", [])) for part in ("--extra-index-url", value)]
    index = [part for value in found.get("index-url", [])[:1] for part in ("--index-url", value)]
    return links, index + extra


def pins(path: Path) -> list[str]:
    """The `name==version` lines of a lock file."""
    return [line.strip() for line in path.read_text().splitlines() if "==" in line and not line.startswith("#")]


def say(text: str) -> None:
    """Short lines, at once, also into a pipe."""
    print(text, flush=True)


def main() -> int:
    """Runs the command named on the command line."""
    if not is_supported(sys.version_info[:2]):
        print(
            f"conrec needs Python {project()['requires-python']}; {sys.executable} is {sys.version.split()[0]}",
            file=sys.stderr,
        )
        return 2
    try:
        if (command := sys.argv[1]) != "check":
            {"install": install, "lock": lock}[command]()
    except InstallError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
