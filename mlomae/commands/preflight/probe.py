"""What runs on every host while `python -m mlomae preflight` asks.

The text of this file travels through ssh's stdin, so that a host on which the package is missing
can say so. It needs the standard library alone, and asks torch where there is one. Each line that
follows is a question, `{"ask": NAME, ...}`; each gets `{"answer": ...}` or `{"error": TEXT}`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

READY = "mlomae preflight probe"  # the first line, behind whatever a login prints
PACKAGES = ("mlomae", "torch", "deepspeed", "timm", "torchvision", "numpy", "safetensors")
EXTRAS = ("ffcv", "flash-attn")
CODE_PACKAGES = ("mlomae", "data_ffcv", "eval")  # of this repository, compared file by file
END_BYTES = 64 * 2**20  # a .beton's tables lie at its two ends
BLOCK_BYTES, NUM_BLOCKS = 2**20, 64  # spread evenly over what lies between
CONNECT_SECONDS = 5.0


def ask_clock() -> float:
    """Seconds since 1970."""
    return time.time()


def ask_facts(folder: str, python_path: list[str]) -> dict[str, Any]:
    """What a launch would find here: interpreter, packages, GPUs, memory.

    Args:
        folder: in which the launch runs.
        python_path: of the launch.
    """
    is_there = os.path.isdir(folder)
    if is_there:
        os.chdir(folder)
    sys.path[:0] = [folder, *python_path]
    names = {name: _version(name) for name in (*PACKAGES, *EXTRAS)}
    return {
        "folder": is_there,
        "python": platform.python_version(),
        "packages": names,
        "code": _code_digest(),
        "memory": _available_memory(),
        "shm": shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None,
        "address": _address(),
        **_nvidia_smi(),
        **_torch(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _code_digest() -> str | None:
    """A hash of this repository's code as Python would import it; None where it is not there."""
    digest, is_there = hashlib.sha256(), False
    for package in CODE_PACKAGES:
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            for file in sorted(Path(place).rglob("*.py")):
                is_there = True
                digest.update(f"{package}/{file.relative_to(place)}\n".encode())
                digest.update(file.read_bytes())
    return digest.hexdigest() if is_there else None


def _available_memory() -> int | None:
    """Bytes that new processes can have."""
    try:
        line = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return 1024 * int(line.group(1)) if line else None


def _address() -> str | None:
    """The address of this host that DeepSpeed would give to the others."""
    addresses = _output(["hostname", "-I"]).split()
    return addresses[0] if addresses else None


def _nvidia_smi() -> dict[str, Any]:
    """Name, bytes and used bytes of each GPU, and their driver."""
    query = "--query-gpu=name,memory.total,memory.used,driver_version"
    table = _output(["nvidia-smi", query, "--format=csv,noheader,nounits"])
    rows = [line.split(", ") for line in table.splitlines() if line.count(", ") == 3]
    gpus = [{"name": row[0], "memory": _mebibytes(row[1]), "used": _mebibytes(row[2])}
            for row in rows]  # fmt: skip
    return {"gpus": gpus, "driver": rows[0][3] if rows else None}


def _mebibytes(text: str) -> int | None:
    return int(text) * 2**20 if text.isdigit() else None  # "[N/A]" on GPUs that share memory


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _torch() -> dict[str, Any]:
    """What torch says about itself and its GPUs."""
    facts: dict[str, Any] = {"torch_error": None, "num_gpus": 0, "cuda": None, "nccl": None}
    try:
        import torch

        facts["num_gpus"] = torch.cuda.device_count()
        facts["cuda"] = torch.version.cuda
        if facts["cuda"]:
            version = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
            facts["nccl"] = ".".join(map(str, version))
    except Exception as error:  # a broken installation fails in every way there is
        facts["torch_error"] = f"{type(error).__name__}: {error}"
    return facts


def ask_data(paths: list[str], full: bool) -> list[dict[str, Any]]:
    """Size, number of files, and SHA-256 of what was read of each path.

    That is every byte if `full`; else both ends of a file and blocks between, and of a folder's
    files the names and sizes alone.
    """
    return [_data(Path(path), full) for path in paths]


def _data(path: Path, full: bool) -> dict[str, Any]:
    contents = _Contents(full)
    try:
        if path.is_dir():
            contents.add_folder(path)
        else:
            contents.add_file(path, path.name)
            side = path.with_name(f"{path.name}.json")  # the class names of a .beton
            if side.is_file():
                contents.add_file(side, side.name)
    except OSError as error:
        return {"error": _reason(error)}
    return {
        "size": contents.size,
        "num_bytes_read": contents.num_bytes_read,
        "num_files": contents.num_files,
        "digest": contents.digest.hexdigest(),
    }


class _Contents:
    """Sums up files, each by name, size and bytes."""

    def __init__(self, full: bool) -> None:
        self.full = full
        self.digest = hashlib.sha256()
        self.size = self.num_bytes_read = self.num_files = 0

    def add_folder(self, folder: Path) -> None:
        for place, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
            folders.sort()
            for file in (Path(place, name) for name in sorted(names)):
                self.add_file(file, str(file.relative_to(folder)), only_size=not self.full)

    def add_file(self, path: Path, name: str, only_size: bool = False) -> None:
        size = path.stat().st_size
        self.size, self.num_files = self.size + size, self.num_files + 1
        self.digest.update(f"{name}\n{size}\n".encode("utf-8", "surrogateescape"))
        if only_size:
            return
        with path.open("rb") as file:
            for start, stop in _spans(size, self.full):
                for block in _blocks(file, start, stop):
                    self.digest.update(block)
                    self.num_bytes_read += len(block)


def _spans(size: int, full: bool) -> list[tuple[int, int]]:
    """What to read of a file, from byte to byte: all of a small one."""
    between = size - 2 * END_BYTES
    if full or between <= NUM_BLOCKS * BLOCK_BYTES:
        return [(0, size)]
    starts = [END_BYTES + between * i // NUM_BLOCKS for i in range(NUM_BLOCKS)]
    blocks = [(start, start + BLOCK_BYTES) for start in starts]
    return [(0, END_BYTES), *blocks, (size - END_BYTES, size)]


def _blocks(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    file.seek(start)
    while start < stop:
        block = file.read(min(BLOCK_BYTES, stop - start))
        if not block:
            return
        yield block
        start += len(block)


def _raise(error: OSError) -> None:
    raise error


# --- the output folder, and the way between hosts ----------------------------------------------

_tokens: list[Path] = []  # files to remove at the end


def ask_write(output_dir: str, token: str) -> int:
    """Write a file where output_dir is or would be made; returns the free bytes there."""
    folder = next(place for place in _with_parents(output_dir) if place.exists())
    path = folder / token
    _tokens.append(path)
    with path.open("wb") as file:
        file.write(b"x" * 4096)
        file.flush()
        os.fsync(file.fileno())
    return shutil.disk_usage(folder).free


def ask_look(output_dir: str, tokens: list[str]) -> list[bool]:
    """Which files of other hosts' `ask_write` are seen here."""
    places = _with_parents(output_dir)
    return [any((place / token).exists() for place in places) for token in tokens]


def _with_parents(folder: str) -> list[Path]:
    path = Path(os.path.abspath(folder))
    return [path, *path.parents]


def ask_listen(port: int, word: str) -> None:
    """Answer with the word whoever connects to a port of this host, until the end."""
    if socket.has_dualstack_ipv6():
        server = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        server = socket.create_server(("", port))
    threading.Thread(target=_serve, args=(server, word.encode()), daemon=True).start()


def _serve(server: socket.socket, word: bytes) -> None:
    while True:
        connection, _ = server.accept()
        with connection:
            connection.sendall(word)


def ask_connect(address: str, port: int, word: str) -> bool:
    """Whether the host at the address is the one that listens with this word."""
    with socket.create_connection((address, port), CONNECT_SECONDS) as connection:
        return connection.recv(len(word)) == word.encode()


ASKED = (ask_clock, ask_facts, ask_data, ask_write, ask_look, ask_listen, ask_connect)
QUESTIONS = {function.__name__[len("ask_") :]: function for function in ASKED}


def _reason(error: OSError) -> str:
    number = error.errno or 0
    return os.strerror(number) if number > 0 else str(error)


def main() -> None:
    """Answer until the questions end."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    print(f"\n{READY}", file=answers, flush=True)
    try:
        for line in sys.stdin.buffer:
            question = json.loads(line)
            answer: dict[str, Any]
            try:
                answer = {"answer": QUESTIONS[question.pop("ask")](**question)}
            except OSError as error:
                answer = {"error": _reason(error)}
            except Exception as error:  # for who asked, who can do more about it
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers, flush=True)
    finally:
        for token in _tokens:
            token.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
