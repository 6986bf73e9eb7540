"""The recipes of MAE-CT: that of all three steps, and those of the second and the third."""

from typing import Any, ClassVar, Literal, TypeVar

from pydantic import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from typing_extensions import Self

from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.recipe import (
    AugmentationRecipe,
    CheckpointRecipe,
    EncoderRecipe,
    ImagesRecipe,
    LevelRecipe,
    MaskingRecipe,
    ModelRecipe,
    MonitorRecipe,
    RunRecipe,
    SingleLevelRecipe,
)
from mlomae.recipe.section import (
    BelowOne,
    FilePath,
    FilePaths,
    Names,
    Refusal,
    Section,
    UpToOne,
)

R = TypeVar("R", bound=Section)

STEPS = ("pretrain", "head", "tune")


class NnclrRecipe(Section):
    """The contrastive head and its queue."""

    queue_size: PositiveInt = 65536
    """Earlier projections among which neighbours are looked up; each batch_size divides it."""
    queue_layout: Literal["replicated", "sharded"] = "replicated"
    """The whole queue on every rank, or a part on each: less memory, more communication."""
    projector_hidden_dim: PositiveInt = 2048
    """Width of the projector's two hidden layers."""
    projection_dim: PositiveInt = 256
    """Width of projections, predictions and the queue."""
    predictor_hidden_dim: PositiveInt = 4096
    """Width of the predictor's hidden layer."""


class ContrastRecipe(LevelRecipe):
    """Batches, optimizer and loss of a contrastive step."""

    num_views: Literal[2] = 2
    """Crops of each image in a batch; base_lr counts them."""
    second_augmentation: AugmentationRecipe | None = None
    """Augmentation of the second view; null takes the first one's."""
    temperature: PositiveFloat = 0.15
    """Divides the similarities of neighbours and predictions."""
    top_k: PositiveInt = 1
    """The neighbour is drawn among so many most similar queue entries; 1 takes the nearest."""

    @model_validator(mode="after")
    def _check_whole_batch(self) -> Self:
        if (count := self.gradient_accumulation_steps) > 1:
            problem = (
                f"is {count}, but batch norm and loss need the whole batch at once: use 1, and "
                "more ranks or a smaller batch_size"
            )
            raise Refusal("gradient_accumulation_steps", problem)
        return self


class TuneRecipe(ContrastRecipe):
    """Tuning of the upper blocks with the head; lr and weight_decay are the encoder's."""

    num_frozen_blocks: NonNegativeInt | None = None
    """Lowest blocks that stay as they are, with patch projection and class token; null for the
    lower half."""
    layer_decay: UpToOne = 0.65
    """Factor on the learning rate for each layer between a weight and the head; 1 is off."""
    head_base_lr: PositiveFloat | None = None
    """The head's peak learning rate at 256 crops per step; null takes base_lr."""
    head_weight_decay: NonNegativeFloat = 1e-5
    """Weight decay of the head."""
    ema_decay: BelowOne = 0.9999
    """What the average of the weights, which is saved, keeps of itself in each step."""
    target_ema_decay: BelowOne = 0.99
    """Likewise the average of the projector, which makes neighbours' queries and the queue."""

    @model_validator(mode="after")
    def _check_decay(self) -> Self:
        if self.decay_norm_and_bias:
            problem = "is true, but 1-D weights never decay in this step: remove it"
            raise Refusal("decay_norm_and_bias", problem)
        return self

    @property
    def head_lr(self) -> float:
        """The head's peak learning rate."""
        if self.head_base_lr is None:
            return self.lr
        return self.head_base_lr * self.batch_size * self.num_views / 256


class HeadRun(SingleLevelRecipe):
    """The second step: a head on the frozen encoder."""

    level_name: ClassVar = "head"
    activity: ClassVar = "this step"

    method: Literal["mae_ct_head"]
    """Train a contrastive head."""
    nnclr: NnclrRecipe = NnclrRecipe()
    head: ContrastRecipe

    @model_validator(mode="after")
    def _check_queue(self) -> Self:
        _check_queue(self.level_name, self.head, self.nnclr)
        return self


class TuneRun(SingleLevelRecipe):
    """The third step: the upper blocks of the encoder and the head."""

    level_name: ClassVar = "tune"
    activity: ClassVar = "this step"

    method: Literal["mae_ct_tune"]
    """Tune an encoder with a contrastive head."""
    head_from: FilePath
    """The head to start from: a file, or a run of the second step."""
    nnclr: NnclrRecipe = NnclrRecipe()
    tune: TuneRecipe

    @property
    def num_frozen_blocks(self) -> int:
        """Blocks that stay as they are."""
        num_blocks = self.tune.num_frozen_blocks
        return self.model.depth // 2 if num_blocks is None else num_blocks

    @model_validator(mode="after")
    def _check_tune(self) -> Self:
        _check_queue(self.level_name, self.tune, self.nnclr)
        if self.num_frozen_blocks >= self.model.depth:
            problem = (
                f"is {self.num_frozen_blocks}, but the encoder has {self.model.depth} blocks: "
                "leave one to tune"
            )
            raise Refusal("tune.num_frozen_blocks", problem)
        return self


class PretrainStep(LevelRecipe):
    """The first step."""

    epochs: PositiveFloat
    """Passes over the training images in this step."""


class HeadStep(ContrastRecipe):
    """The second step."""

    epochs: PositiveFloat
    """Passes over the training images in this step."""


class TuneStep(TuneRecipe):
    """The third step."""

    epochs: PositiveFloat
    """Passes over the training images in this step."""


class MaeCtRecipe(Section):
    """All three steps; each runs in a folder below output_dir."""

    method: Literal["mae_ct"]
    """Pretrain an autoencoder, train a head on it, tune its upper half."""
    seed: NonNegativeInt = 0
    """Seed of every random draw: weights, data order, crops, masks, queue, neighbours."""
    output_dir: FilePath
    """Folder of the steps' folders pretrain, head and tune."""
    init_from: FilePaths = ()
    """Weights of a pretrained encoder, in place of the first step: published MAE and MAE-CT files,
    timm, Hugging Face, a run of this project."""
    init_from_expected: Names = ()
    """Names which may be missing from init_from or left over, with * for any text."""
    head_from: FilePath | None = None
    """Weights of a head, in place of the second step: a published file, or a run of that step."""
    model: ModelRecipe
    masking: MaskingRecipe = MaskingRecipe(network="random")
    data: ImagesRecipe
    nnclr: NnclrRecipe = NnclrRecipe()
    pretrain: PretrainStep | None = None
    head: HeadStep
    tune: TuneStep
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    monitor: MonitorRecipe = MonitorRecipe()

    def pretrain_run(self) -> PretrainingRecipe | None:
        """The first step's recipe; None where init_from stands in for it."""
        if self.init_from or self.pretrain is None:
            return None
        common = self._common("pretrain", self.pretrain)
        sections = {"model": self.model.model_dump(), "masking": self.masking.model_dump()}
        return _build(PretrainingRecipe, common | sections | {"method": "mae"})

    def head_run(self) -> HeadRun | None:
        """The second step's recipe; None where head_from stands in for it."""
        if self.head_from is not None:
            return None
        common = self._common("head", self.head) | self._encoder()
        return _build(HeadRun, common | {"method": "mae_ct_head"})

    def tune_run(self) -> TuneRun:
        """The third step's recipe."""
        common = self._common("tune", self.tune) | self._encoder()
        head_from = self.head_from or self.output_dir / "head"
        return _build(TuneRun, common | {"method": "mae_ct_tune", "head_from": head_from})

    def runs(self) -> dict[str, RunRecipe]:
        """The steps' recipes by name, without those that weights stand in for."""
        runs = (self.pretrain_run(), self.head_run(), self.tune_run())
        return {name: run for name, run in zip(STEPS, runs, strict=True) if run is not None}

    def _common(self, name: str, step: Any) -> dict[str, Any]:
        shared = self.model_dump(include={"seed", "data", "checkpoint", "monitor"})
        level = step.model_dump(exclude={"epochs"})
        place = {"output_dir": self.output_dir / name, "epochs": step.epochs}
        return shared | place | {name: level}

    def _encoder(self) -> dict[str, Any]:
        """What the steps on an encoder have in common."""
        return {
            "init_from": self.init_from or (self.output_dir / "pretrain",),
            "init_from_expected": self.init_from_expected,
            "model": self.model.model_dump(include=set(EncoderRecipe.model_fields)),
            "nnclr": self.nnclr.model_dump(),
        }

    @model_validator(mode="after")
    def _check_runs(self) -> Self:
        self.runs()
        return self

    @model_validator(mode="after")
    def _check_encoder(self) -> Self:
        if not self.init_from and self.pretrain is None:
            problem = "is missing: add it, or give the weights of a pretrained encoder in init_from"
            raise Refusal("pretrain", problem)
        if self.init_from_expected and not self.init_from:
            raise Refusal("init_from_expected", "is given without init_from: add or remove one")
        if self.masking.network not in ("random", "block"):
            problem = f"is {self.masking.network}, but nothing learns masks here: use random"
            raise Refusal("masking.network", problem)
        return self


def _build(schema: type[R], values: dict[str, Any]) -> R:
    """A step's recipe; its sections are called as those of the whole, so errors name the same."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        refusal = first.get("ctx", {}).get("error")
        if not isinstance(refusal, Refusal):
            raise
        raise Refusal(".".join([*map(str, first["loc"]), refusal.key]), refusal.problem) from None


def _check_queue(name: str, level: ContrastRecipe, nnclr: NnclrRecipe) -> None:
    """Refuse a batch that would be cut by the queue's end, and more neighbours than entries."""
    size, queue_size = level.batch_size, nnclr.queue_size
    if queue_size % size:
        below = max(n for n in range(1, size) if queue_size % n == 0)
        problem = f"is {size}, which does not divide nnclr.queue_size {queue_size}: use {below}"
        raise Refusal(f"{name}.batch_size", problem)
    if level.top_k > queue_size:
        problem = f"is {level.top_k}, but nnclr.queue_size is {queue_size}: lower it"
        raise Refusal(f"{name}.top_k", problem)
