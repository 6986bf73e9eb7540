"""Tiny images, and runs that nothing befell."""

from pathlib import Path

import pytest

from tests.faults.runs import Runs
from tests.pretraining.conftest import beton as beton
from tests.pretraining.conftest import png_folder as png_folder
from tests.ranks import warm_context


@pytest.fixture(scope="session")
def runs(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(warm_context(), tmp_path_factory.mktemp("runs"), beton)
