"""What is wrong with the hosts of a survey, in a word for the table and in a sentence each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mlomae.commands.preflight.conversation import Contents, HostError, HostFacts
from mlomae.commands.preflight.probe import EXTRAS, PACKAGES
from mlomae.commands.preflight.survey import HostReport

CHECKS = (
    *("ssh", "python", "packages", "GPUs", "CUDA", "data"),
    *("output_dir", "space", "clock", "memory", "port"),
)
MAX_CLOCK_OFFSET = 2.0  # seconds; file times and logs of hosts further apart mislead
MIN_MEMORY_PER_SLOT = 2**30  # bytes; what a rank's imports take before it holds a weight
MIN_SHM = 2**30  # bytes; NCCL fails below, and containers often come with 64 MiB
MAX_GPU_USED = 2**30  # bytes; more belongs to somebody else's process


class Problem(NamedTuple):
    """What is wrong with a host.

    Attributes:
        check: the column.
        cell: what stands there.
        sentence: what is wrong and how to fix it, to be read behind the host's name.
    """

    check: str
    cell: str
    sentence: str


@dataclass(frozen=True)
class Needs:
    """What the recipe needs.

    Attributes:
        data: paths by recipe key.
        output_dir: None where it was not asked about.
        checkpoint_bytes: that have to fit below output_dir; None where they are not known.
        master_port: of the rendezvous.
    """

    data: Mapping[str, Path]
    output_dir: Path | None
    checkpoint_bytes: int | None
    master_port: int


def find_problems(reports: Sequence[HostReport], needs: Needs) -> list[list[Problem]]:
    """The problems of each host, compared with the first that answered."""
    reference = next((report for report in reports if report.facts is not None), None)
    problems = []
    for report in reports:
        lost = report.lost
        of_host = [] if lost is None else [Problem(lost.check, lost.cell, str(lost))]
        if report.facts is not None and reference is not None and reference.facts is not None:
            for check in _OF_FACTS:
                of_host += check(report, report.facts, reference.host.name, reference.facts)
        for of_needs in (_data, _output_dir, _port):
            of_host += of_needs(report, reports, needs)
        problems.append(of_host + list(_clock(report)))
    return problems


# --- what a launch would find -------------------------------------------------------------------

Problems = Iterator[Problem]


def _python(report: HostReport, facts: HostFacts, name: str, first: HostFacts) -> Problems:
    if facts.python != first.python:
        sentence = f"Python is {facts.python}, but {first.python} on {name}: make them equal"
        yield Problem("python", facts.python, sentence)


def _packages(report: HostReport, facts: HostFacts, name: str, first: HostFacts) -> Problems:
    if not facts.folder:
        yield Problem(
            "packages",
            "no folder",
            "the folder in which you launch is missing there: put the repository at the same path "
            "on all hosts, or share it",
        )
    for package in (*PACKAGES, *EXTRAS):
        version, wanted = facts.packages.get(package), first.packages.get(package)
        if version != wanted:
            sentence = (
                f"{package} is {version or 'missing'}, but {wanted or 'missing'} on {name}: "
                "install the same on all hosts"
            )
            yield Problem("packages", package, sentence)
        elif version is None and package in PACKAGES and not (package == "mlomae" and facts.code):
            yield Problem("packages", package, f"{package} is missing: install it on all hosts")
    if facts.code != first.code:
        sentence = f"the code of mlomae is not that on {name}: bring all hosts to one commit"
        yield Problem("packages", "code", sentence)
    if facts.torch_error is not None and facts.packages.get("torch"):
        sentence = f"torch cannot be imported ({facts.torch_error}): fix its installation"
        yield Problem("packages", "torch", sentence)


def _gpus(report: HostReport, facts: HostFacts, name: str, first: HostFacts) -> Problems:
    """On hosts without any GPU, slots are processes on the CPU."""
    if facts.num_gpus < len(facts.gpus) and facts.num_gpus < (report.host.slots or len(facts.gpus)):
        sentence = (
            f"nvidia-smi lists {len(facts.gpus)} GPUs, but torch sees {facts.num_gpus}: install a "
            "torch built for the driver's CUDA, or look for CUDA_VISIBLE_DEVICES"
        )
        yield Problem("GPUs", f"torch sees {facts.num_gpus}", sentence)
    elif (facts.num_gpus or first.num_gpus) and facts.num_gpus < (report.host.slots or 0):
        sentence = (
            f"the hostfile has slots={report.host.slots}, but there are {facts.num_gpus} GPUs: "
            "correct the line, or look for a failed GPU"
        )
        yield Problem("GPUs", f"{facts.num_gpus} of {report.host.slots}", sentence)
    kinds, wanted = describe_gpus(facts), describe_gpus(first)
    if kinds != wanted and facts.gpus and first.gpus:
        sentence = f"the GPUs are {kinds}, but {wanted} on {name}: use hosts with equal GPUs"
        yield Problem("GPUs", "differ", sentence)
    for number, gpu in enumerate(facts.gpus):
        if (gpu.used or 0) > MAX_GPU_USED:
            sentence = (
                f"{gib(gpu.used or 0)} of GPU {number} are in use: end the process that holds them"
            )
            yield Problem("GPUs", "in use", sentence)


def describe_gpus(facts: HostFacts) -> str:
    """Kinds of a host's GPUs."""
    kinds = {f"{gpu.name} of {gib(gpu.memory)}" if gpu.memory else gpu.name for gpu in facts.gpus}
    return " and ".join(sorted(kinds)) or "none"


def _cuda(report: HostReport, facts: HostFacts, name: str, first: HostFacts) -> Problems:
    titles = {"driver": "the GPU driver", "cuda": "torch's CUDA", "nccl": "torch's NCCL"}
    for key, title in titles.items():
        version, wanted = getattr(facts, key), getattr(first, key)
        if version != wanted:
            sentence = (
                f"{title} is {version or 'missing'}, but {wanted or 'missing'} on {name}: install "
                "the same on all hosts"
            )
            yield Problem("CUDA", key, sentence)


def _memory(report: HostReport, facts: HostFacts, name: str, first: HostFacts) -> Problems:
    needed = MIN_MEMORY_PER_SLOT * (report.host.slots or 1)
    if facts.memory is not None and facts.memory < needed:
        sentence = (
            f"{gib(facts.memory)} of memory are free, but {report.host.slots or 1} processes take "
            f"at least {gib(needed)}: end what else runs there"
        )
        yield Problem("memory", gib(facts.memory), sentence)
    if facts.num_gpus > 1 and facts.shm is not None and facts.shm < MIN_SHM:
        sentence = (
            f"/dev/shm has {gib(facts.shm)} free, but NCCL should have {gib(MIN_SHM)}: enlarge it "
            "(in Docker --shm-size or --ipc=host), or remove what fills it"
        )
        yield Problem("memory", "/dev/shm", sentence)


_OF_FACTS: tuple[Callable[[HostReport, HostFacts, str, HostFacts], Problems], ...] = (
    *(_python, _packages, _gpus, _cuda, _memory),
)


# --- data, folders, clock, port -----------------------------------------------------------------


def _data(report: HostReport, reports: Sequence[HostReport], needs: Needs) -> Problems:
    for number, (key, path) in enumerate(needs.data.items() if report.data else ()):
        contents = report.data[number]
        if contents.error is not None:
            sentence = (
                f"{key} {path} cannot be read ({contents.error}): copy it to the same path on all "
                "hosts, or share its folder"
            )
            yield Problem("data", "missing", sentence)
            continue
        name, wanted = next(
            (other.host.name, other.data[number])
            for other in reports
            if other.data and other.data[number].error is None
        )
        if difference := _difference(contents, wanted):
            sentence = f"{key} {path} {difference} on {name}: copy the right one to all hosts"
            yield Problem("data", "differs", sentence)


def _difference(contents: Contents, wanted: Contents) -> str | None:
    for title in ("num_files", "size"):
        a, b = getattr(contents, title), getattr(wanted, title)
        if a != b:
            unit = {"num_files": "files", "size": "bytes"}[title]
            return f"has {a} {unit}, but {b}"
    if contents.digest != wanted.digest:
        return "has the same size, but not the same content as"
    return None


def _output_dir(report: HostReport, reports: Sequence[HostReport], needs: Needs) -> Problems:
    if isinstance(report.free, HostError):
        sentence = (
            f"output_dir {needs.output_dir} cannot be written ({report.free}): choose another, or "
            "fix its rights or space"
        )
        yield Problem("output_dir", "no write", sentence)
    if report.shares_output_dir is False:
        name = next(other.host.name for other in reports if isinstance(other.free, int))
        sentence = (
            f"output_dir {needs.output_dir} is not the same folder as on {name}: choose one on a "
            "filesystem that all hosts share"
        )
        yield Problem("output_dir", "not shared", sentence)
    needed = needs.checkpoint_bytes
    if isinstance(report.free, int) and needed is not None and report.free < needed:
        sentence = (
            f"output_dir {needs.output_dir} has {gib(report.free)} free, but the recipe's "
            f"checkpoints take about {gib(needed)}: free some space, or choose another output_dir"
        )
        yield Problem("space", gib(report.free), sentence)


def _clock(report: HostReport) -> Problems:
    if report.clock is None:
        return
    offset, uncertainty = report.clock
    if abs(offset) - uncertainty > MAX_CLOCK_OFFSET:
        direction = "ahead of" if offset > 0 else "behind"
        sentence = (
            f"the clock is {abs(offset):.1f} s {direction} this machine's: let chrony or another "
            "NTP client set it"
        )
        yield Problem("clock", f"{offset:+.0f} s", sentence)


def _port(report: HostReport, reports: Sequence[HostReport], needs: Needs) -> Problems:
    first, port = reports[0], needs.master_port
    if report is first:
        if isinstance(report.port, HostError):
            sentence = (
                f"port {port} cannot be opened ({report.port}): end what uses it, or give another "
                "--master_port here and to deepspeed"
            )
            yield Problem("port", "not free", sentence)
        elif report.port is False:
            sentence = "`hostname -I` names no address there: give one in --master_addr"
            yield Problem("port", "no address", sentence)
    elif isinstance(report.port, HostError) or report.port is False:
        reason = "another machine answers" if report.port is False else str(report.port)
        sentence = (
            f"port {port} of {first.host.name} is not reached ({reason}): open the firewall "
            "between the hosts, or give the address of the right network in --master_addr here "
            "and to deepspeed"
        )
        yield Problem("port", "closed", sentence)


def gib(num_bytes: int) -> str:
    """A number of bytes for a person."""
    return f"{num_bytes / 2**30:.{0 if num_bytes >= 10 * 2**30 else 2}f} GiB"
