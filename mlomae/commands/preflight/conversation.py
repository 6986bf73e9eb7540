"""A conversation with the probe on one host, whose answers are data and never trusted."""

import asyncio
import json
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
)

from mlomae.commands.preflight import probe
from mlomae.errors import UserError

START_SECONDS = 60.0  # until Python answers, from a slow shared filesystem too
END_SECONDS = 10.0  # in which the probe may clean up
ANSWER_SECONDS = 300.0  # the first import of torch from such a filesystem takes minutes
_MAX_LINE = 2**20  # bytes of an answer
_MAX_GREETING = 1000  # lines which a login may print


def _printable(text: str) -> str:
    """Without control characters, which a terminal would obey."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


Text = Annotated[str, StringConstraints(max_length=1000), AfterValidator(_printable)]


class _Answer(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class HostGpu(_Answer):
    """A GPU as nvidia-smi names it; memory in bytes, None where it does not say."""

    name: Text
    memory: int | None
    used: int | None


class HostFacts(_Answer):
    """What a launch would find on a host; see `probe.ask_facts`."""

    folder: bool
    python: Text
    packages: dict[Text, Text | None]
    code: Text | None
    memory: int | None
    shm: int | None
    address: Text | None
    gpus: list[HostGpu]
    driver: Text | None
    torch_error: Text | None
    num_gpus: int
    cuda: Text | None
    nccl: Text | None


class Contents(_Answer):
    """What stands at a path: an error, or sizes in bytes and a SHA-256 of what was read."""

    error: Text | None = None
    size: int = 0
    num_bytes_read: int = 0
    num_files: int = 0
    digest: Text = ""


ANSWERS: dict[str, TypeAdapter[Any]] = {
    "clock": TypeAdapter(Annotated[float, Field(allow_inf_nan=False, strict=True)]),
    "facts": TypeAdapter(HostFacts),
    "data": TypeAdapter(list[Contents]),
    "write": TypeAdapter(Annotated[int, Field(strict=True)]),
    "look": TypeAdapter(list[Annotated[bool, Field(strict=True)]]),
    "listen": TypeAdapter(None),
    "connect": TypeAdapter(Annotated[bool, Field(strict=True)]),
}
_ERROR = TypeAdapter(Text)


class HostError(Exception):
    """A host tried to do what it was asked to, and could not; the text says why."""


class LostHost(Exception):
    """A host cannot be asked, or not any more.

    Attributes:
        check: the column that tells it.
        cell: the same in a word.
        sentence: what is wrong, and the fix.
    """

    def __init__(self, check: str, cell: str, sentence: str) -> None:
        super().__init__(sentence)
        self.check, self.cell, self.sentence = check, cell, sentence


class Conversation:
    """Questions to the probe on one host."""

    def __init__(self, process: asyncio.subprocess.Process, errors: IO[bytes]) -> None:
        self._process, self._errors = process, errors

    @classmethod
    async def start(cls, command: Sequence[str]) -> "Conversation":
        """Log in, and start the probe.

        Raises:
            UserError: the command's program is missing on this machine.
            LostHost: the host cannot be reached, or has no such interpreter.
        """
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - `end` closes it
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=pipe, stdout=pipe, stderr=errors, limit=_MAX_LINE
            )
        except FileNotFoundError:
            raise UserError(f"{command[0]} is missing on this machine: install it") from None
        conversation = cls(process, errors)
        source = Path(probe.__file__).read_bytes()
        try:
            conversation._write(b"%d\n%s" % (len(source), source))
            await asyncio.wait_for(conversation._skip_greeting(), START_SECONDS)
        except (OSError, ValueError, EOFError, asyncio.TimeoutError):
            await conversation.end()
            raise _explain(process.returncode, conversation.complaint()) from None
        return conversation

    async def ask(self, question: str, seconds: float | None = ANSWER_SECONDS, **more: Any) -> Any:
        """The answer to a question of `probe`, checked.

        Raises:
            HostError: the host could not do it.
            LostHost: no answer came, or none that makes sense.
        """
        try:
            self._write(json.dumps({"ask": question, **more}).encode() + b"\n")
            line = await asyncio.wait_for(self._readline(), seconds)
            answer = json.loads(line)
            if "error" in answer:
                raise HostError(_ERROR.validate_python(answer["error"]))
            return ANSWERS[question].validate_python(answer["answer"])
        except asyncio.TimeoutError:
            problem = f"gave no answer about its {question} for {seconds:g} s"
        except (OSError, EOFError):
            await self.end()
            problem = f"ended while asked about its {question} ({self.complaint()})"
        except (ValueError, TypeError, KeyError, RecursionError):
            problem = f"gave an answer about its {question} that makes no sense"
        raise LostHost("ssh", "lost", f"the connection {problem}: log in and look after the host")

    async def end(self) -> None:
        """Let the probe clean up and end; after `END_SECONDS`, end it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), END_SECONDS)
        except asyncio.TimeoutError:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    def complaint(self) -> str:
        """The last line that the host or ssh wrote to stderr."""
        self._errors.seek(0)
        lines = self._errors.read(_MAX_LINE).decode(errors="replace").strip().splitlines()
        return _printable(lines[-1][-300:]) if lines else "without a word"

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(data)

    async def _readline(self) -> bytes:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        return line

    async def _skip_greeting(self) -> None:
        for _ in range(_MAX_GREETING):
            if await self._readline() == probe.READY.encode() + b"\n":
                return
        raise ValueError("no end of the greeting")


_SSH_FIXES = {  # what ssh says: (cell, what is wrong and how to fix it)
    "Permission denied": ("no key", "it accepts no key: put yours there with ssh-copy-id"),
    "Host key verification failed": (
        "host key",
        "its host key is not known here, or another one: log in once by hand and compare the key",
    ),
    "Could not resolve hostname": (
        "unknown",
        "its name leads to no address: fix it in the hostfile, /etc/hosts or DNS",
    ),
    "Connection refused": ("refused", "no sshd answers: start it, or give its port in --ssh_port"),
}


def _explain(code: int | None, complaint: str) -> LostHost:
    """Why a conversation did not begin; ssh's exit code is 255."""
    if code in (126, 127):
        return LostHost(
            "python",
            "missing",
            f"the interpreter of this launch cannot be started there ({complaint}): install the "
            "environment at the same path on all hosts, or share its folder",
        )
    for text, (cell, sentence) in _SSH_FIXES.items():
        if text in complaint:
            return LostHost("ssh", cell, f"ssh failed ({complaint}): {sentence}")
    return LostHost(
        "ssh",
        "failed",
        f"ssh started no Python there ({complaint}): make `ssh HOST true` work without a question",
    )
