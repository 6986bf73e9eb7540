"""Launches on the two hosts of hosts.sh: their files, what a person types, and the ranks."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from data_ffcv.convert import convert
from tests.ranks import ROOT

HOSTS = ROOT / "tests" / "multinode" / "hosts.sh"
CANNOT = 77  # exit code of hosts.sh where a machine cannot have such hosts

# The ranks of both hosts get these, as a user's ~/.deepspeed_env gives them.
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
# The quickstart's model on 200 images of noise: eight cycles of its two steps.
OVERRIDES = [
    "pretrain.batch_size=16",
    "classifier.batch_size=8",
    "mask.batch_size=8",
    "epochs=1.6",
    "checkpoint.interval_epochs=0.4",
    "monitor.log_interval=1",
    "monitor.picture_interval_epochs=100",
]


class Cluster:
    """A folder of hosts.sh, with the training images on the own disk of each host.

    Raises:
        AssertionError: the hosts can be made here, but do not work.

    Attributes:
        reason: why this machine cannot have the hosts, else empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tried = self.run("true")
        self.reason = tried.stderr.strip() if tried.returncode == CANNOT else ""
        assert self.reason or tried.returncode == 0, tried.stderr

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a short command on node-a."""
        started = ["bash", str(HOSTS), str(self.folder), *command]
        return subprocess.run(started, cwd=ROOT, capture_output=True, text=True, timeout=60)

    def add_images(self) -> None:
        """Convert 200 images of 10 classes, and copy the file to both hosts."""
        rng, png = np.random.default_rng(0), self.folder / "png"
        for number in range(200):
            home = png / f"class{number % 10}"
            home.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(home / f"{number}.png")
        convert("imagefolder", png, self.folder / "train.beton")
        for host in ("node-a", "node-b"):
            shutil.copy(self.folder / "train.beton", self.folder / host)

    def arguments(self, run: str, stage: int, *more: str, beton: str = "local") -> list[str]:
        """Arguments of launch/pretrain.py for a run into the folder `run`."""
        config = self.folder / f"zero{stage}.json"
        values = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
        config.write_text(json.dumps(values | {"steps_per_print": 10**9}))
        recipe = ["--recipe", "quickstart_mlo_mae", "--deepspeed_config", str(config)]
        images = f"data.train={self.folder / beton / 'train.beton'}"
        return [*recipe, images, f"output_dir={self.folder / run}", *OVERRIDES, *more]

    def deepspeed(self, slots: int, arguments: list[str]) -> list[str]:
        """`deepspeed --hostfile ...` for so many slots on each host."""
        hostfile = self.folder / f"hostfile{slots}"
        hostfile.write_text(f"node-a slots={slots}\nnode-b slots={slots}\n")
        return ["deepspeed", "--hostfile", str(hostfile), "launch/pretrain.py", *arguments]

    @contextmanager
    def launched(self, *command: str) -> Iterator["Launch"]:
        """A command that runs on node-a; nothing of it outlives the context."""
        (self.folder / "environment").write_text(
            "".join(f"{key}={value}\n" for key, value in ENVIRONMENT.items())
        )
        log = self.folder / f"log{len(list(self.folder.glob('log*')))}.txt"
        strangers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE")
        environment = {key: value for key, value in os.environ.items() if key not in strangers}
        environment |= ENVIRONMENT | {
            "DS_ENV_FILE": str(self.folder / "environment"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["bash", str(HOSTS), str(self.folder), *command],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        try:
            yield Launch(process, log)
        finally:
            process.kill()
            process.wait(10)


class Launch:
    """A command on node-a, and the ranks that it started on both hosts."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log

    @property
    def output(self) -> str:
        """What the command and the ranks have said so far."""
        return self.log.read_text(errors="replace")

    def wait(self, timeout: float = 240) -> int:
        """The exit code of the command."""
        return self.process.wait(timeout)

    def wait_until(self, condition: Callable[[], bool], timeout: float = 240) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"ended too early\n{self.output}"
            assert time.monotonic() < deadline, f"timed out\n{self.output}"
            time.sleep(0.02)

    def wait_for_cycles(self, run: Path, num_cycles: int) -> None:
        """Wait until a run has done so many cycles."""
        metrics = run / "metrics.jsonl"
        self.wait_until(
            lambda: metrics.exists() and len(metrics.read_bytes().split(b"\n")) > num_cycles
        )

    def processes(self) -> list[psutil.Process]:
        """Everything on both hosts, as this machine sees it."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def find(self, *command: str) -> list[psutil.Process]:
        """The processes of both hosts whose command line holds these words in a row."""
        words = "\0".join(("", *command, ""))
        return [p for p in self.processes() if words in "\0".join(("", *_command_line(p), ""))]

    def ranks(self) -> dict[int, psutil.Process]:
        """The training processes by rank."""
        found = self.find("-u", "launch/pretrain.py")
        return {int(process.environ()["RANK"]): process for process in found}


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return []
