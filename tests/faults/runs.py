"""Runs of the tiny MLO-MAE that faults befall, and what they must leave."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

from tests.faults.ranks import Fault, Launch, launched
from tests.runs import Setup, contents, metrics_rows

NUM_CYCLES, STEPS_PER_CYCLE = 6, 2
SAVING = ("checkpoint.interval_epochs=0.5", "checkpoint.keep=3")  # an epoch has two cycles


class Runs:
    """Launches into folders below one folder.

    Attributes:
        folder: of all runs.
        beton: their images.
    """

    def __init__(self, server: Any, folder: Path, beton: Path) -> None:
        self.folder = folder
        self.beton = beton
        self.setup = Setup(folder, beton)
        self._server = server
        self._config = cache(self.setup.config)  # a second launch must not write it once more
        self.undisturbed = cache(self._undisturbed)

    def launch(
        self,
        run: str,
        *overrides: str,
        stage: int = 2,
        faults: Mapping[int, Sequence[Fault]] | None = None,
        num_cycles: int = NUM_CYCLES,
        resume: bool = False,
    ) -> AbstractContextManager[Launch]:
        """Ranks that train into `run`, saving after every cycle, and keep the newest three."""
        config = self._config(stage)
        arguments = ["--recipe", self.setup.recipe, "--deepspeed_config", config]
        arguments += ["--resume"] * resume
        arguments += [f"output_dir={self.folder / run}", f"epochs={num_cycles / 2}"]
        return launched(self._server, self.folder, [*arguments, *SAVING, *overrides], faults)

    def finish(self, run: str, *overrides: str, **options: Any) -> str:
        """Resume a run to its end, and give what its ranks said."""
        with self.launch(run, *overrides, resume=True, **options) as launch:
            assert launch.finish() == [0, 0], launch.output
            return launch.output

    def _undisturbed(self, stage: int, num_cycles: int = NUM_CYCLES) -> Path:
        run = f"undisturbed{stage}_{num_cycles}"
        self.finish(run, stage=stage, num_cycles=num_cycles)
        return self.folder / run

    def assert_equal(self, run: str, stage: int = 2, num_cycles: int = NUM_CYCLES) -> None:
        """The run has ended with the bits and metrics of one that nothing befell."""
        whole, newest = self.undisturbed(stage, num_cycles), step_name(num_cycles)
        found = contents(self.folder / run / "checkpoints" / newest)
        assert len(found) > 100
        assert found == contents(whole / "checkpoints" / newest)
        assert [r["cycle"] for r in metrics_rows(self.folder / run)] == list(
            range(1, num_cycles + 1)
        )
        assert metrics_rows(self.folder / run) == metrics_rows(whole)
        assert (self.folder / run / "summary.json").exists()
        assert not list((self.folder / run / "checkpoints").glob("*.tmp"))

    def newest(self, run: str) -> int:
        """Cycles in the newest complete checkpoint of a run; 0 without any."""
        names = (path.name for path in (self.folder / run / "checkpoints").glob("step_*"))
        steps = [int(name.removeprefix("step_")) for name in names if name[5:].isdigit()]
        return max(steps, default=0) // STEPS_PER_CYCLE


def step_name(cycle: int) -> str:
    """Folder of the checkpoint after a cycle."""
    return f"step_{cycle * STEPS_PER_CYCLE:08d}"
