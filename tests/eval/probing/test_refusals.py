"""What a linear probe refuses, in one sentence and before any work."""

import pytest
import torch
import yaml
from safetensors.torch import save_file

from eval.frozen.encoders import of_weights
from eval.probing.program import LinearProbeProgram
from mlomae.errors import UserError
from mlomae.training.program import check_job, make_job
from tests.eval.probing.runs import SIZES, ProbeSetup, write_images


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> ProbeSetup:
    setup = ProbeSetup(tmp_path_factory.mktemp("refusals"))
    write_images(setup.folder / "renamed", 6, seed=2)
    (setup.folder / "renamed/class1").rename(setup.folder / "renamed/a_dog")
    write_images(setup.folder / "single", 3, seed=3)
    tensors = {f"layer.1.running_{name}": torch.ones(16) for name in ("mean", "var")}
    tensors |= {"layer.2.0.weight": torch.ones(3, 16), "layer.2.0.bias": torch.ones(3)}
    save_file(tensors, setup.folder / "probe.safetensors")
    return setup


def check(setup, protocol, *overrides, stage=0):
    launch = setup.launch("run", protocol, *overrides, stage=stage)
    program = LinearProbeProgram()
    names = (launch[name] for name in ("recipe", "deepspeed_config", "resume", "overrides"))
    check_job(program, make_job(program.schema, *names))


@pytest.mark.parametrize("protocol", ["mae", "mae_ct", "held_out"])
def test_what_fits_is_not_refused(setup, protocol):
    check(setup, protocol)


CASES = {
    "stage": ("mae", {"stage": 2}, "zero2.json: zero_optimization.stage is 2, but probe.optimizer"),
    "rates": ("mae", "probe.base_lrs=[0.1, 0.2]", "probe.base_lrs holds 2 rates"),
    "twice": ("mae_ct", "probe.base_lrs=[0.1, 0.1]", "probe.base_lrs holds a rate twice"),
    "clipping": ("mae_ct", "probe.gradient_clipping=1.0", "probe.gradient_clipping is set, but a"),
    "fraction": ("mae", "data.held_out_fraction=0.2", "data.held_out_fraction is set, but"),
    "no weights": ("mae", "init_from=[]", "init_from is missing"),
    "classes": ("mae", "data.num_classes=4", "data.num_classes is 4, but data.train"),
    "names": ("mae", "data.test={}/renamed", "the class 'class0' of data.train"),
    "batch": ("held_out", "probe.batch_size=90", "probe.batch_size is 90, but there are 81 images"),
    "none held out": (
        "held_out",
        "data.train={}/single",
        "single has 3 images of 3 classes, too few to hold some out",
    ),
    "width": ("mae", "model.embed_dim=32", "model.embed_dim=16"),
    "heads": ("mae", "init_from={}/probe.safetensors", "holds a probe head"),
}


@pytest.mark.parametrize("case", CASES)
def test_refuses_in_one_sentence(setup, case):
    protocol, change, expected = CASES[case]
    stage = change["stage"] if isinstance(change, dict) else 0
    overrides = [] if isinstance(change, dict) else [change.format(setup.folder)]
    with pytest.raises(UserError) as caught:
        check(setup, protocol, *overrides, stage=stage)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_evaluations_find_no_encoder_in_a_probe(setup):
    with pytest.raises(UserError, match=r"probe.safetensors holds no encoder"):
        of_weights([setup.folder / "probe.safetensors"])


def test_warns_when_the_encoder_saw_other_pixels(setup, caplog):
    run = setup.folder / "a_run"
    run.mkdir()
    save_file(torch.load(setup.encoder)["model"], run / "model.safetensors")
    settings = {"method": "mae", "model": SIZES | {"global_pool": "token", "image_size": [8, 8]}}
    pixels = {"mean": [0.5, 0.5, 0.5], "std": [0.229, 0.224, 0.225]}
    (run / "recipe.yaml").write_text(yaml.safe_dump(settings | {"data": pixels}))
    check(setup, "mae", f"init_from={run}")
    (message,) = [r.getMessage() for r in caplog.records if "was trained with" in r.getMessage()]
    assert "mean [0.5, 0.5, 0.5], but data.mean is [0.485, 0.456, 0.406]" in message
