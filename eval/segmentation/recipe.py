"""The keys of a recipe that trains a segmentation network on a pretrained encoder."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from typing_extensions import Self

from mlomae.recipe import EncoderRecipe, ImagesRecipe, LevelRecipe, SingleLevelRecipe
from mlomae.recipe.section import BelowOne, Betas, FilePath, Refusal, Section, Sides, UpToOne

LEVEL = "segmentation"

_PRESETS: dict[str, dict[str, Any]] = {
    "standard": {"channels": 512, "dropout": 0.1, "auxiliary_weight": 0.4},
    "tutorial": {"dropout": 0.0, "auxiliary_weight": 0.0},
}


class SegmentationEncoderRecipe(EncoderRecipe):
    """The encoder; image_size is that of training crops and of inference's window."""

    layer_scale: PositiveFloat | None = None
    """Initial value of a trained factor on each channel of a block's two branches; null has no such
    factors."""


class HeadRecipe(Section):
    """UperNet's neck and head."""

    preset: Literal["standard", "tutorial"] = "standard"
    """mmseg's head behind BEiT's neck, or PyTorch-Adventures' version of both; fills the rest."""
    channels: PositiveInt | None = None
    """Width of the head; tutorial has the encoder's and takes no other."""
    dropout: BelowOne
    """Dropout probability of whole channels before the last layer; standard only."""
    auxiliary_weight: NonNegativeFloat
    """Weight of the auxiliary head's loss; 0 leaves that head out."""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        preset = values.get("preset", "standard") if isinstance(values, dict) else None
        if preset not in _PRESETS:
            return values
        settings = {key: value for key, value in values.items() if value is not None}
        return {**_PRESETS[preset], **settings}

    @model_validator(mode="after")
    def _check_preset(self) -> Self:
        if self.preset == "tutorial":
            for key, nothing in (("channels", None), ("dropout", 0)):
                if getattr(self, key) != nothing:
                    problem = f"is {getattr(self, key)}, but preset tutorial has none: remove it"
                    raise Refusal(key, problem)
        return self


class SegmentationImagesRecipe(ImagesRecipe):
    """Images with a mask each; files of `python -m data_ffcv.convert segmentation`."""

    test: FilePath
    """The images that mIoU is counted on."""
    num_classes: Annotated[int, Field(ge=2, le=255)]
    """Number of classes of both; pixels of value 255 count nowhere."""


class SegmentationLevelRecipe(LevelRecipe):
    """Batches and optimizer."""

    betas: Betas = (0.9, 0.999)
    """Decay rates of the two moments; adamw only."""
    layer_decay: UpToOne = 1.0
    """Factor on the learning rate for each layer between a weight and the head; 1 is off."""


class InferenceRecipe(Section):
    """How whole images are segmented."""

    mode: Literal["slide", "whole"] = "slide"
    """Windows of the crop's size whose logits are averaged, or the image in one pass."""
    resize: PositiveInt | None = None
    """Length that the shorter side gets before, in the image's own aspect; null keeps the size."""
    stride: Sides | None = None
    """From one window to the next, [vertical, horizontal] or one number; null is two thirds of the
    crop. slide only."""


class SegmentationRecipe(SingleLevelRecipe):
    """UperNet on an encoder."""

    level_name: ClassVar = LEVEL
    activity: ClassVar = "segmentation"

    method: Literal["segmentation"]
    """Train encoder, neck and head on masks."""
    model: SegmentationEncoderRecipe
    head: HeadRecipe
    data: SegmentationImagesRecipe
    segmentation: SegmentationLevelRecipe
    inference: InferenceRecipe = InferenceRecipe()

    @property
    def stride(self) -> tuple[int, int]:
        """Of inference's windows, vertical and horizontal."""
        height, width = (side * 2 // 3 for side in self.model.image_size)
        return self.inference.stride or (height, width)

    @model_validator(mode="before")
    @classmethod
    def _fill_head(cls, values: Any) -> Any:
        return {"head": {}, **values} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        if self.model.depth < 4:
            problem = f"is {self.model.depth}, but UperNet takes features of four blocks: use more"
            raise Refusal("model.depth", problem)
        if min(self.model.grid_size) < 2:
            problem = "has a side of one patch, and UperNet halves the grid: enlarge it"
            raise Refusal("model.image_size", problem)
        if self.model.embed_dim % 4 and self.head.preset == "tutorial":
            problem = f"is {self.model.embed_dim}: give preset tutorial a multiple of 4"
            raise Refusal("model.embed_dim", problem)
        return self

    @model_validator(mode="after")
    def _check_inference(self) -> Self:
        if self.inference.mode == "whole" and self.inference.stride is not None:
            raise Refusal("inference.stride", "is given, but mode whole has none: remove it")
        if any(s > w for s, w in zip(self.stride, self.model.image_size, strict=True)):
            problem = (
                f"is {list(self.stride)}, larger than the window of {list(self.model.image_size)} "
                "pixels (model.image_size), which leaves gaps: lower it"
            )
            raise Refusal("inference.stride", problem)
        return self

    @model_validator(mode="after")
    def _check_accumulation(self) -> Self:
        num_parts = self.segmentation.gradient_accumulation_steps
        if num_parts == self.segmentation.batch_size:
            problem = (
                f"is {num_parts}, which leaves one image for each batch "
                "norm, too few: lower it, or raise batch_size"
            )
            raise Refusal(f"{LEVEL}.gradient_accumulation_steps", problem)
        return self
