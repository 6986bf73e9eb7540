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
    HostError,
    HostFacts,
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
class HostReport:
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
    facts: HostFacts | None = None
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


async def survey(hosts: Sequence[Host], questions: Questions) -> list[HostReport]:
    """Ask all hosts, and leave nothing behind there.

    Raises:
        UserError: there is no ssh on this machine.
    """
    reports = [HostReport(host) for host in hosts]
    try:
        await _all(_start(report, questions.ssh_port) for report in reports)
        await _all(_ask_clock(report) for report in reports)
        await _all(_ask_facts(report, questions) for report in reports)
        await _all(_ask_data(report, questions) for report in reports if questions.data)
        if questions.output_dir is not None:
            await _ask_output_dir(reports, str(questions.output_dir))
        await _ask_port(reports, questions)
    finally:
        await _all(
            report.conversation.end() for report in reports if report.conversation is not None
        )
    return reports


async def _all(asked: Any) -> list[Any]:
    return await asyncio.gather(*asked)


async def _start(report: HostReport, ssh_port: int | None) -> None:
    host = report.host
    command = local_command() if host.slots is None else ssh_command(host.name, ssh_port)
    try:
        report.conversation = await Conversation.start(command)
    except LostHost as error:
        report.lost = error


async def _ask_clock(report: HostReport) -> None:
    """Keep the reading with the shortest way there and back, whose middle is where it was taken."""
    readings = []
    for _ in range(_NUM_CLOCK_READINGS):
        before = time.time()
        reading = await report.ask("clock")
        after = time.time()
        if isinstance(reading, float):
            readings.append(((after - before) / 2, reading - (before + after) / 2))
    if readings:
        uncertainty, offset = min(readings)
        report.clock = offset, uncertainty


async def _ask_facts(report: HostReport, questions: Questions) -> None:
    facts = await report.ask(
        "facts", folder=str(questions.folder), python_path=list(questions.python_path)
    )
    report.facts = facts if isinstance(facts, HostFacts) else None
    if isinstance(facts, HostError):
        report.lost = LostHost("python", "failed", f"Python does not work there ({facts}): fix it")


async def _ask_data(report: HostReport, questions: Questions) -> None:
    paths, full = [str(path) for path in questions.data], questions.full_checksum
    seconds = {"seconds": None} if full else {}  # a file of 150 GB takes its time
    contents = await report.ask("data", paths=paths, full=full, **seconds)
    if isinstance(contents, HostError):
        contents = [Contents(error=str(contents))] * len(paths)
    if contents is not None and len(contents) != len(paths):
        report.lost = LostHost("data", "lost", "it answered about other data: look after the host")
        return
    report.data = contents or []


async def _ask_output_dir(reports: Sequence[HostReport], output_dir: str) -> None:
    """Write a file on every host, and then look for the first one's."""
    tokens = [f".preflight_{secrets.token_hex(8)}" for _ in reports]

    async def write(report: HostReport, token: str) -> None:
        report.free = await report.ask("write", output_dir=output_dir, token=token)

    async def look(report: HostReport, token: str) -> None:
        seen = await report.ask("look", output_dir=output_dir, tokens=[token])
        report.shares_output_dir = seen[0] if isinstance(seen, list) and seen else None

    await _all(write(report, token) for report, token in zip(reports, tokens, strict=True))
    writers = [report for report in reports if isinstance(report.free, int)]
    if writers:
        token = tokens[reports.index(writers[0])]
        await _all(look(report, token) for report in writers)


async def _ask_port(reports: Sequence[HostReport], questions: Questions) -> None:
    """Open the first host's port for a moment, and connect to it from the others."""
    first, *others = reports
    port, word = questions.master_port, secrets.token_hex(16)
    answer = await first.ask("listen", port=port, word=word)
    if first.conversation is None:
        return
    address = questions.master_addr or (first.facts and first.facts.address)
    first.port = answer if isinstance(answer, HostError) else bool(address) or not others
    if not address or isinstance(answer, HostError):
        return

    async def connect(report: HostReport) -> None:
        report.port = await report.ask("connect", address=address, port=port, word=word)

    await _all(connect(report) for report in others)
