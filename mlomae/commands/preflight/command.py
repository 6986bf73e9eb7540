"""`python -m mlomae preflight`: whether the hosts of a launch are alike and fit the recipe.

    python -m mlomae preflight --hostfile H [--recipe R] [--deepspeed_config D] [key=value ...]

One ssh to each host starts a probe there, by the same path of Python as here. Until it ends, the
probe keeps one small file in output_dir, and that of the first host opens the rendezvous port.
"""

import asyncio
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from mlomae.commands.preflight.checks import (
    CHECKS,
    Needs,
    Problem,
    describe_gpus,
    find_problems,
    gib,
)
from mlomae.commands.preflight.hosts import Host, is_host_name, read_hostfile
from mlomae.commands.preflight.recipe import read_needs
from mlomae.commands.preflight.survey import HostReport, Questions, survey
from mlomae.errors import UserError

_HERE = "this machine"
_LOG_WIDTH = 200  # of a file or a pipe: a row stays on one line


@dataclass(frozen=True)
class PreflightRequest:
    """The flags of the command."""

    hostfile: str | None = None
    recipe: str | None = None
    deepspeed_config: str | None = None
    output_dir: str | None = None
    full_checksum: bool = False
    master_addr: str | None = None
    master_port: int = 29500
    ssh_port: int | None = None
    overrides: Sequence[str] = ()


def main(request: PreflightRequest) -> int:
    """Print table and sentences, and return the exit code.

    0: all is well. 2: a host has a problem, or bad input.
    """
    width = None if sys.stdout.isatty() else _LOG_WIDTH
    console = Console(highlight=False, markup=False, emoji=False, width=width)
    try:
        hosts, needs, questions = _prepare(request)
        reports = asyncio.run(survey(hosts, questions))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    problems = find_problems(reports, needs)
    console.print(_table(reports, problems, needs))
    for line in _notes(reports, needs, request):
        console.print(line, soft_wrap=True)
    sentences = _sentences(reports, problems)
    for sentence in sentences:
        console.print(f"\n{sentence}.", soft_wrap=True)
    if not sentences:
        console.print("\nAll is well.")
    return 2 if sentences else 0


def _prepare(request: PreflightRequest) -> tuple[list[Host], Needs, Questions]:
    """Read what the flags name.

    Raises:
        UserError: something of it is wrong.
    """
    if request.master_addr is not None and not is_host_name(request.master_addr):
        raise UserError(f"--master_addr {request.master_addr!r} is no host name or IPv4 address")
    for flag in ("master_port", "ssh_port"):
        port = getattr(request, flag)
        if port is not None and not 0 < port < 2**16:
            raise UserError(f"--{flag} is {port}: give a number from 1 to 65535")
    hosts = [Host("localhost")] if request.hostfile is None else read_hostfile(request.hostfile)
    needs = _needs(request, hosts)
    questions = Questions(
        folder=Path.cwd(),
        python_path=[path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path],
        data=list(needs.data.values()),
        output_dir=needs.output_dir,
        full_checksum=request.full_checksum,
        master_addr=request.master_addr,
        master_port=request.master_port,
        ssh_port=request.ssh_port,
    )
    return hosts, needs, questions


def _needs(request: PreflightRequest, hosts: Sequence[Host]) -> Needs:
    if request.recipe is not None:
        slots = [host.slots for host in hosts if host.slots is not None]
        return read_needs(
            request.recipe,
            request.overrides,
            request.deepspeed_config,
            request.output_dir,
            sum(slots) if slots else None,
            request.master_port,
        )
    ignored = [*request.overrides]
    if request.deepspeed_config is not None:
        ignored.append(f"--deepspeed_config {request.deepspeed_config}")
    if ignored:
        raise UserError(f"{ignored[0]} is given without a recipe: give one in --recipe, too")
    folder = None if request.output_dir is None else Path(request.output_dir).absolute()
    return Needs({}, folder, None, request.master_port)


def _table(
    reports: Sequence[HostReport], problems: Sequence[Sequence[Problem]], needs: Needs
) -> Table:
    table = Table(box=MARKDOWN)
    for column in ("host", *CHECKS):
        table.add_column(column, overflow="fold")
    for report, of_host in zip(reports, problems, strict=True):
        cells = _good_cells(report, needs)
        wrong: dict[str, dict[str, None]] = defaultdict(dict)
        for problem in of_host:
            wrong[problem.check][problem.cell] = None
        cells |= {check: ", ".join(words) for check, words in wrong.items()}
        style = "red" if of_host else None
        table.add_row(report.host.name, *(cells.get(check, "-") for check in CHECKS), style=style)
    return table


def _good_cells(report: HostReport, needs: Needs) -> dict[str, str]:
    """What stands in the table where there is no problem, for what was checked."""
    cells: dict[str, str] = {}
    if report.lost is None:
        cells["ssh"] = "ok" if report.host.slots is not None else "-"
    if (facts := report.facts) is not None:
        cells |= {"python": "ok", "packages": "ok", "CUDA": "ok" if facts.cuda else "none"}
        cells["GPUs"] = f"ok {facts.num_gpus}" if facts.num_gpus else "none"
        cells["memory"] = f"ok {gib(facts.memory)}" if facts.memory is not None else "?"
    if report.data:
        cells["data"] = "ok"
    if isinstance(report.free, int):
        cells |= {"output_dir": "ok", "space": f"ok {gib(report.free)}"}
        if needs.checkpoint_bytes is None:
            cells["space"] = gib(report.free)
    if report.clock is not None:
        cells["clock"] = f"ok {round(report.clock[0], 2) + 0.0:.2f} s"
    if report.port is True:
        cells["port"] = "ok"
    return cells


def _notes(reports: Sequence[HostReport], needs: Needs, request: PreflightRequest) -> list[str]:
    """What the table compares, and what it leaves out."""
    notes = []
    first = next((report for report in reports if report.facts is not None), None)
    if first is not None and first.facts is not None:
        facts = first.facts
        have = [f"{name} {version}" for name, version in facts.packages.items() if version]
        gpus = f"{facts.num_gpus} GPUs ({describe_gpus(facts)}), " if facts.num_gpus else ""
        if gpus:
            gpus += f"driver {facts.driver}, CUDA {facts.cuda}, NCCL {facts.nccl}, "
        code = f"code {facts.code[:8]}" if facts.code else "no code of mlomae"
        what = f"{gpus}Python {facts.python}, {', '.join(have)}, {code}"
        notes.append(f"{first.host.name} has {what}.")
        if not any(report.facts.num_gpus for report in reports if report.facts is not None):
            notes.append("No host has a GPU: slots are processes on the CPU.")
    notes += _notes_on_data(reports, needs, request.full_checksum)
    if needs.checkpoint_bytes is not None:
        notes.append(f"Checkpoints take about {gib(needs.checkpoint_bytes)} below output_dir.")
    if not request.recipe:
        rest = "data and space for checkpoints" if needs.output_dir else "data and output_dir"
        notes.append(f"Not checked without --recipe: {rest}.")
    elif needs.checkpoint_bytes is None:
        notes.append("Not checked for this kind of recipe: its keys, and space for checkpoints.")
    return notes


def _notes_on_data(reports: Sequence[HostReport], needs: Needs, full: bool) -> list[str]:
    """How much of the data was compared."""
    notes = []
    for number, (key, path) in enumerate(needs.data.items()):
        contents = next((report.data[number] for report in reports if report.data), None)
        if contents is None or contents.error is not None:
            continue
        by = "by size and SHA-256 of all bytes"
        if contents.num_bytes_read < contents.size:
            share = f"{gib(contents.num_bytes_read)} of {gib(contents.size)}"
            by = f"by names, sizes and SHA-256 of {share}; --full_checksum compares all bytes"
        files = "1 file" if contents.num_files == 1 else f"{contents.num_files} files"
        notes.append(f"{key} {path}: {files}, compared {by}.")
    return notes


def _sentences(reports: Sequence[HostReport], problems: Sequence[Sequence[Problem]]) -> list[str]:
    """One for each problem, with the hosts that have it before it."""
    hosts: dict[str, dict[str, None]] = defaultdict(dict)
    for report, of_host in zip(reports, problems, strict=True):
        for problem in of_host:
            hosts[problem.sentence][report.host.name] = None
    if len(reports) > 1 and shutil.which("pdsh") is None:
        hosts[
            "pdsh is missing, with which deepspeed starts the other hosts: install it (apt install "
            "pdsh), or give deepspeed another --launcher"
        ][_HERE] = None
    return [f"{', '.join(names)}: {sentence}" for sentence, names in hosts.items()]
