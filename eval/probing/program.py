"""The linear-probe program: heads on an engine, and the frozen encoder beside it."""

import torch

from eval.probing.heads import LinearHeads, head_groups, probe_loss
from eval.probing.images import ProbeImages, find_images
from eval.probing.recipe import LEVEL, ProbeRecipe
from eval.probing.task import LinearProbe
from mlomae.errors import UserError
from mlomae.foreign import check_weights, load_weights
from mlomae.models import MaskedAutoencoder
from mlomae.training.program import Job, Program
from mlomae.training.task import count_cycles
from mlomae.training.vit import warn_of_other_pixels


class LinearProbeProgram(Program[ProbeRecipe]):
    """Linear heads on a frozen encoder.

    Attributes:
        images: once `check` has looked at them.
    """

    schema = ProbeRecipe
    images: ProbeImages

    def module(self, recipe: ProbeRecipe, name: str) -> LinearHeads:
        """The untrained heads."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            num_heads = len(recipe.probe.base_lrs)
            return LinearHeads(recipe.model.embed_dim, recipe.data.num_classes, num_heads)

    def check(self, job: Job[ProbeRecipe]) -> None:
        """LARS must find whole tensors, images and encoder must fit the recipe."""
        recipe = job.recipe
        stage = job.deepspeed_config.get("zero_optimization", {}).get("stage", 0)
        if recipe.probe.optimizer == "lars" and stage:
            raise UserError(
                f"{job.config_name}: zero_optimization.stage is {stage}, but probe.optimizer lars "
                "needs whole tensors, which are cut from stage 1 on: use stage 0"
            )
        self.images = find_images(recipe)
        with torch.device("meta"):
            encoder = _build_encoder(recipe)
        expected = recipe.init_from_expected
        check_weights(encoder, recipe.init_from, expected=expected, parts="encoder")
        warn_of_other_pixels(recipe)

    def build(self, job: Job[ProbeRecipe]) -> LinearProbe:
        """The heads' engine, and the encoder beside it."""
        recipe, heads = job.recipe, self.module(job.recipe, LEVEL)
        encoder = _build_encoder(recipe)
        expected = recipe.init_from_expected
        loaded = load_weights(encoder, recipe.init_from, expected=expected, parts="encoder")
        level = job.build_level(
            LEVEL,
            heads,
            loss=probe_loss,
            num_cycles=count_cycles(recipe, self.images.num_images),
            param_groups=head_groups(heads, recipe.probe),
        )
        files, dtype = loaded.files, job.compute_dtype
        return LinearProbe(recipe, level, self.images, encoder, files, dtype)


def _build_encoder(recipe: ProbeRecipe) -> MaskedAutoencoder:
    """The untrained encoder of the recipe, with next to no decoder."""
    of_no_use = {"preset", "drop_path_rate", "activation_checkpointing"}  # in a frozen encoder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # what init_from_expected leaves out is alike on all ranks
        return MaskedAutoencoder(
            **recipe.model.model_dump(exclude=of_no_use),
            decoder_embed_dim=4,
            decoder_depth=1,
            decoder_num_heads=1,
        )
