"""What all hosts are asked, at the same time, and what each of them answered."""

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlomae.commands.preflight.conversation import (
    Contents,
    Conversation,
    Facts,
    HostError,
    LostHost,
)
from mlomae.commands.preflight.hosts import Host, local_command, ssh_command

_NUM_CLOCK_READINGS = 5


@dataclass(frozen=True)
class Questions:
    """What to look at.

    Attributes:
        python_path: folders in which the launch looks for modules, beside the working folder.
        data: absolute paths.
        output_dir: absolute; None asks nothing about it.
        full_checksum: read every byte of the data.
        master_addr: where the first host is to be reached; None for the first that it names.
        master_port: of the rendezvous.
        ssh_port: of all hosts; None leaves it to ssh.
    """

    folder: Path
    python_path: Sequence[str]
    data: Sequence[Path]
    output_dir: Path | None
    full_checksum: bool
    master_addr: str | None
    master_port: int
    ssh_port: int | None


@dataclass
class Found:
    """What is known about a host; an exception stands where an answer was to be.

    Attributes:
        lost: why the host cannot be asked, or not any more.
        clock: (seconds ahead of this machine, how far off that may be).
        data: of each path.
        free: bytes on the disk of output_dir.
        shares_output_dir: whether it sees what the first host that could wrote there.
        port: of the first host, whether it was opened and its address is known; of others, whether
            what answers at that address is the first host.
    """

    host: Host
    lost: LostHost | None = None
    clock: tuple[float, float] | None = None
    facts: Facts | None = None
    data: list[Contents] = field(default_factory=list)
    free: int | HostError | None = None
    shares_output_dir: bool | None = None
    port: bool | HostError | None = None
    conversation: Conversation | None = None

    async def ask(self, question: str, **more: Any) -> Any:
        """An answer, what went wrong with it, or None where the host is lost."""
        if self.conversation is None:
            return None
        try:
            return await self.conversation.ask(question, **more)
        except HostError as error:
            return error
        except LostHost as error:
            self.lost, conversation, self.conversation = error, self.conversation, None
            await conversation.end()
            return None


async def survey(hosts: Sequence[Host], questions: Questions) -> list[Found]:
    """Ask all hosts, and leave nothing behind there.

    Raises:
        UserError: there is no ssh on this machine.
    """
    found = [Found(host) for host in hosts]
    try:
        await _all(_start(one, questions.ssh_port) for one in found)
        await _all(_ask_clock(one) for one in found)
        await _all(_ask_facts(one, questions) for one in found)
        await _all(_ask_data(one, questions) for one in found if questions.data)
        if questions.output_dir is not None:
            await _ask_output_dir(found, str(questions.output_dir))
        await _ask_port(found, questions)
    finally:
        await _all(one.conversation.end() for one in found if one.conversation is not None)
    return found


async def _all(asked: Any) -> list[Any]:
    return await asyncio.gather(*asked)


async def _start(found: Found, ssh_port: int | None) -> None:
    host = found.host
    command = local_command() if host.slots is None else ssh_command(host.name, ssh_port)
    try:
        found.conversation = await Conversation.start(command)
    except LostHost as error:
        found.lost = error


async def _ask_clock(found: Found) -> None:
    """Keep the reading with the shortest way there and back, whose middle is where it was taken."""
    readings = []
    for _ in range(_NUM_CLOCK_READINGS):
        before = time.time()
        reading = await found.ask("clock")
        after = time.time()
        if isinstance(reading, float):
            readings.append(((after - before) / 2, reading - (before + after) / 2))
    if readings:
        uncertainty, offset = min(readings)
        found.clock = offset, uncertainty


async def _ask_facts(found: Found, questions: Questions) -> None:
    facts = await found.ask(
        "facts", folder=str(questions.folder), python_path=list(questions.python_path)
    )
    found.facts = facts if isinstance(facts, Facts) else None
    if isinstance(facts, HostError):
        found.lost = LostHost("python", "failed", f"Python does not work there ({facts}): mend it")


async def _ask_data(found: Found, questions: Questions) -> None:
    paths, full = [str(path) for path in questions.data], questions.full_checksum
    seconds = {"seconds": None} if full else {}  # a file of 150 GB takes its time
    contents = await found.ask("data", paths=paths, full=full, **seconds)
    if isinstance(contents, HostError):
        contents = [Contents(error=str(contents))] * len(paths)
    if contents is not None and len(contents) != len(paths):
        found.lost = LostHost("data", "lost", "it answered about other data: look after the host")
        return
    found.data = contents or []


async def _ask_output_dir(found: Sequence[Found], output_dir: str) -> None:
    """Write a file on every host, and then look for the first one's."""
    tokens = [f".preflight_{secrets.token_hex(8)}" for _ in found]

    async def write(one: Found, token: str) -> None:
        one.free = await one.ask("write", output_dir=output_dir, token=token)

    async def look(one: Found, token: str) -> None:
        seen = await one.ask("look", output_dir=output_dir, tokens=[token])
        one.shares_output_dir = seen[0] if isinstance(seen, list) and seen else None

    await _all(write(one, token) for one, token in zip(found, tokens, strict=True))
    writers = [one for one in found if isinstance(one.free, int)]
    if writers:
        token = tokens[found.index(writers[0])]
        await _all(look(one, token) for one in writers)


async def _ask_port(found: Sequence[Found], questions: Questions) -> None:
    """Open the first host's port for a moment, and connect to it from the others."""
    first, *others = found
    port, word = questions.master_port, secrets.token_hex(16)
    told = await first.ask("listen", port=port, word=word)
    if first.conversation is None:
        return
    address = questions.master_addr or (first.facts and first.facts.address)
    first.port = told if isinstance(told, HostError) else bool(address) or not others
    if not address or isinstance(told, HostError):
        return

    async def connect(one: Found) -> None:
        one.port = await one.ask("connect", address=address, port=port, word=word)

    await _all(connect(one) for one in others)
