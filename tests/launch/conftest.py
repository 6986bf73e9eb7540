"""The images and recipes of the pretraining tests."""

from tests.pretraining.conftest import beton as beton
from tests.pretraining.conftest import module_setup as module_setup
from tests.pretraining.conftest import png_folder as png_folder
from tests.pretraining.conftest import setup as setup
