"""What an exported folder says about itself: model card, measurements, and how to load it."""

import json
from pathlib import Path
from typing import Any

from mlomae.checkpoint.folders import MASKING_FILE, MODEL_FILE
from mlomae.commands.export.formats import ONNX_FILE, Exported, timm_architecture
from mlomae.foreign.layouts import DECODER_NAMES
from mlomae.models import MaskedAutoencoder
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.training.monitor import METRICS_FILE, read_metrics
from mlomae.training.report import SUMMARY_FILE
from mlomae.training.result import RESULT_FILE, table_row

LIBRARIES = {"timm": "timm", "hf": "transformers", "safetensors": "mlomae", "onnx": "onnx"}
CONTENTS = {
    "timm": "The encoder, for timm's `VisionTransformer`. The decoder is not in it.",
    "hf": "Encoder and decoder, for Transformers' `ViTMAEForPreTraining`, `ViTMAEModel` and, the "
    "encoder alone, `ViTModel`.",
    "safetensors": "Encoder and decoder under the names of facebookresearch/mae.",
    "onnx": "The encoder as a graph: images `[batch, channels, height, width]` to features "
    "`[batch, width]`, for batches of any size. It was compared with onnxruntime on random images "
    "when it was written.",
}
METHODS = {
    "random": "MAE (arXiv 2111.06377), random masks",
    "block": "MAE (arXiv 2111.06377), random masks in blocks (as arXiv 2106.08254)",
    "mlp": "MLO-MAE (arXiv 2402.18128), learned masks",
    "light": "MLO-MAE (arXiv 2402.18128), learned masks",
}
NOTES = {
    "timm": [
        "`local-dir:` takes image size, mean and standard deviation from `config.json`. The other "
        "two ways give the same weights; `checkpoint_path` leaves timm's own mean and standard "
        "deviation in the model's `pretrained_cfg`, which are not those of this training.",
    ],
    "hf": [
        "There is no pooler in a masked autoencoder: `add_pooling_layer=False` keeps `ViTModel` "
        "from inventing one with random weights. It reports the decoder's names as unexpected and "
        "the model type `vit_mae` as another one than its own; both are as they should be.",
        "`ViTMAEModel` and `ViTMAEForPreTraining` hide patches in evaluation too; `ViTModel` sees "
        "the whole image.",
        "`ViTImageProcessor` squeezes the whole image into the square, without a crop. For the "
        "crop that is usual in evaluation, resize the shorter side to 256/224 of the image size "
        "and cut out the centre.",
    ],
    "safetensors": [],
    "onnx": [],
}


def load_lines(format: str, exported: Exported, folder: Path) -> str:
    """Python that loads the folder."""
    if format == "timm":
        return _timm_lines(exported, folder)
    if format == "hf":
        path = _quoted(folder)
        return (
            "from transformers import ViTImageProcessor, ViTMAEForPreTraining, ViTModel\n"
            f"processor = ViTImageProcessor.from_pretrained({path})\n"
            f"autoencoder = ViTMAEForPreTraining.from_pretrained({path})\n"
            f"encoder = ViTModel.from_pretrained({path}, add_pooling_layer=False)"
        )
    if format == "onnx":
        return (
            "import onnxruntime\n"
            f"session = onnxruntime.InferenceSession({_quoted(folder / ONNX_FILE)})\n"
            '(features,) = session.run(None, {"images": images})  # float32, normalised'
        )
    lines = "from safetensors.torch import load_file\n"
    lines += f"autoencoder = load_file({_quoted(folder / MODEL_FILE)})"
    if exported.recipe.method == "mlo_mae":
        lines += f"\nmasking_network = load_file({_quoted(folder / MASKING_FILE)})"
    return lines


def _timm_lines(exported: Exported, folder: Path) -> str:
    architecture, model_args = timm_architecture(exported)
    file, data = _quoted(folder / MODEL_FILE), exported.recipe.data
    return (
        "import timm\n"
        f"encoder = timm.create_model({_quoted(folder, 'local-dir:')}, pretrained=True)\n"
        "\n# or by timm's name of the architecture\n"
        f"model_args = {json.dumps({'num_classes': 0, **model_args}).replace('false', 'False')}\n"
        f'overlay = {{"file": {file}, "custom_load": False, "num_classes": 0,\n'
        f'           "mean": {data.mean}, "std": {data.std}}}\n'
        f'encoder = timm.create_model("{architecture}", pretrained=True,\n'
        "                            pretrained_cfg_overlay=overlay, **model_args)\n"
        "\n# or as a file of weights\n"
        f'encoder = timm.create_model("{architecture}", checkpoint_path={file}, **model_args)'
    )


def _quoted(path: Path, prefix: str = "") -> str:
    """A path as a Python string."""
    return json.dumps(f"{prefix}{path}", ensure_ascii=False)


# --- measurements ------------------------------------------------------------------------------


def read_measurements(checkpoint: Path) -> dict[str, Any]:
    """What the run measured of this checkpoint, and nothing else.

    Returns:
        `summary` (of the run's end), `last_record` (of metrics.jsonl, up to this checkpoint) and
        `evaluations` (of this checkpoint, by folder), as far as they exist.
    """
    run = run_folder(checkpoint)
    state = _read_json(checkpoint / "state.json") or {}
    cycle = state.get("progress", {}).get("cycle", float("inf"))
    measured: dict[str, Any] = {"checkpoint": checkpoint.name}
    summary = _read_json(run / SUMMARY_FILE)
    steps = state.get("levels", {}).get("pretrain", {}).get("num_steps")
    if summary is not None and steps in (None, summary.get("pretrain_steps")):
        measured["summary"] = summary
    rows = read_metrics(run) if (run / METRICS_FILE).is_file() else []
    if rows := [row for row in rows if row["cycle"] <= cycle]:
        measured["last_record"] = rows[-1]
    files = sorted((run / "eval").rglob(RESULT_FILE))
    results = {str(f.parent.relative_to(run / "eval")): _read_json(f) for f in files}
    evaluations = {name: r for name, r in results.items() if _is_of(checkpoint, r)}
    return measured | ({"evaluations": evaluations} if evaluations else {})


def run_folder(checkpoint: Path) -> Path:
    """The run that a checkpoint belongs to; a folder of weights that was moved stands for it."""
    return checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else checkpoint


def _is_of(checkpoint: Path, result: Any) -> bool:
    return isinstance(result, dict) and Path(result.get("checkpoint", "")).name == checkpoint.name


def _read_json(file: Path) -> Any:
    """None where there is none, or where it is damaged: a card can do without."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


# --- card --------------------------------------------------------------------------------------


def model_card(format: str, exported: Exported, measured: dict[str, Any]) -> str:
    """The README.md of an exported folder."""
    recipe = exported.recipe
    notes = [*NOTES[format], f"The features of this training are {_pooling(exported.model)}."]
    if recipe.method == "mlo_mae":
        labelled = recipe.labelled
        notes.append(
            f"**Labels were used**: its masks were learned from {labelled.task} of "
            f"`{labelled.train.name}`, {labelled.num_classes} classes."
        )
    sections = [
        f"---\nlibrary_name: {LIBRARIES[format]}\npipeline_tag: image-feature-extraction\n"
        "tags: [mlomae, masked-autoencoder]\n---",
        f"# Masked autoencoder {_size(exported)}",
        CONTENTS[format],
        _table(exported, measured),
        f"## Load\n\nIn this folder:\n\n```python\n{load_lines(format, exported, Path())}\n```",
        "## Good to know\n\n" + "\n".join(f"- {note}" for note in notes),
        *_results(measured),
        f"## Licence\n\n{_licence(recipe)}",
        "`recipe.yaml` repeats the training, `metrics.json` is what it measured, and `export.json` "
        "has the checksum of every file.",
    ]
    return "\n\n".join(sections) + "\n"


def _table(exported: Exported, measured: dict[str, Any]) -> str:
    model, recipe = exported.model, exported.recipe
    size, data = recipe.model, recipe.data
    height, width = model.image_size
    classes = f", {data.num_classes} classes" if data.num_classes else ""
    last = recipe.masking.mask_ratio_end
    ending = f", changing to {100 * last:g} % at the end" if last is not None else ""
    epoch = measured.get("last_record", {}).get("epoch")
    rows = {
        "method": METHODS[recipe.masking.network],
        "images": f"`{data.train.name}`" + classes,
        "checkpoint": exported.checkpoint.name,
        "epochs": (f"{epoch:g} of " if epoch is not None else "planned: ") + f"{recipe.epochs:g}",
        "input": f"{height} x {width} pixels, {model.in_chans} channels, patches of "
        f"{model.patch_size}, mean {data.mean}, standard deviation {data.std}",
        "encoder": f"width {model.embed_dim}, {model.depth} blocks, {model.num_heads} heads, "
        f"{_millions(model, decoder=False)} parameters",
        "decoder": f"width {size.decoder_embed_dim}, {size.decoder_depth} blocks, "
        f"{size.decoder_num_heads} heads, {_millions(model, decoder=True)} parameters",
        "positions": "trained" if size.trainable_positions else "fixed, 2-D sine-cosine",
        "target": "pixels, each patch standardised" if model.norm_pix_loss else "pixels",
        "hidden patches": f"{model.num_patches - model.num_keep} of {model.num_patches}" + ending,
        "initialised from": ", ".join(f"`{file.name}`" for file in recipe.init_from)
        or "random weights",
    }
    return "\n".join(["| | |", "|---|---|", *map(table_row, rows.items())])


def _results(measured: dict[str, Any]) -> list[str]:
    """The section of the evaluations, if there were any."""
    rows = [
        table_row(
            [name, f"{100 * result['accuracy']:.2f} %", str(result.get("num_test_images", ""))]
        )
        for name, result in measured.get("evaluations", {}).items()
        if isinstance(result.get("accuracy"), float)
    ]
    head = "## Measured\n\n| evaluation | accuracy | test images |\n|---|---|---|\n"
    return [head + "\n".join(rows)] if rows else []


def _licence(recipe: PretrainingRecipe) -> str:
    text = "The weights belong to whoever trained them, who chooses their licence."
    if not recipe.init_from:
        return text
    return (
        "Training started from other weights (see the table), and their licence bears on these. "
        "The weights of facebookresearch/mae are under CC-BY-NC 4.0."
    )


def _size(exported: Exported) -> str:
    preset, patch_size = exported.recipe.model.preset, exported.model.patch_size
    width = f"of width {exported.model.embed_dim}"
    return f"{preset.replace('vit_', 'ViT-') if preset else width}, patches of {patch_size}"


def _pooling(model: MaskedAutoencoder) -> str:
    if model.global_pool == "avg":
        return "the mean of the patch tokens after the final norm"
    return "the class token after the final norm"


def _millions(model: MaskedAutoencoder, *, decoder: bool) -> str:
    """Number of trained values of one half, in millions."""
    count = sum(
        value.numel()
        for name, value in model.named_parameters()
        if name.startswith(DECODER_NAMES) == decoder
    )
    return f"{count / 1e6:.2f} M"
