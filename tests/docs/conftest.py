"""Small images and an untrained run, as the tests of training and of evaluations have them."""

from tests.eval.conftest import data as data
from tests.eval.conftest import run as run
from tests.pretraining.conftest import beton as beton
from tests.pretraining.conftest import module_setup as module_setup
from tests.pretraining.conftest import png_folder as png_folder
