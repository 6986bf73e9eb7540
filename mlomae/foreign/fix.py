"""What to do about weights that do not fit a model."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from mlomae.foreign.read import HEADS

State = Mapping[str, Tensor]

SIZES = [  # recipe key, the tensor that tells it, and by which dimension
    ("model.embed_dim", "patch_embed.proj.weight", 0),
    ("model.patch_size", "patch_embed.proj.weight", 2),
    ("model.decoder_embed_dim", "decoder_embed.weight", 0),
]
DEPTHS = [("model.depth", "blocks."), ("model.decoder_depth", "decoder_blocks.")]


def suggest_fix(tensors: State, wanted: State, names: Sequence[str]) -> str:
    """What fixes an error about keys: recipe keys to set, else the keys to name as expected.

    Args:
        tensors: of the file.
        wanted: of the model.
        names: the keys that the error is about.
    """
    if "norm.weight" in names and "fc_norm.weight" in tensors:
        return (
            "it is a classifier on the mean of the patch tokens, whose encoder has lost its final "
            "norm; count with it (eval/finetune.py --evaluate), or give weights from before the "
            "fine-tuning"
        )
    settings = [
        f"{key}={tensors[name].shape[dimension]}"
        for key, name, dimension in SIZES
        if name in names and _differs(tensors, wanted, name, dimension)
    ]
    if (
        settings
        and settings[0].startswith("model.embed_dim=")
        and (heads := HEADS.get(tensors["patch_embed.proj.weight"].shape[0]))
    ):
        settings.insert(1, f"model.num_heads={heads}")
    settings += _depths(tensors, wanted) + _mlp_ratio(tensors, wanted)
    if settings:
        return f"set {', '.join(settings)}, or give weights of the model's size"
    flags = " ".join(f"--init_from_expected {g}" for g in sorted({_glob(name) for name in names}))
    return f"give other weights, or say {flags} where that is meant"


def _differs(tensors: State, wanted: State, name: str, dimension: int) -> bool:
    if name not in tensors or name not in wanted or tensors[name].ndim != wanted[name].ndim:
        return False
    return tensors[name].shape[dimension] != wanted[name].shape[dimension]


def _depths(tensors: State, wanted: State) -> list[str]:
    """Settings of the depths, where both sides have such blocks and not as many."""
    settings = []
    for key, prefix in DEPTHS:
        theirs, ours = (
            {name.split(".")[1] for name in state if name.startswith(prefix)}
            for state in (tensors, wanted)
        )
        if theirs and ours and theirs != ours:
            settings.append(f"{key}={len(theirs)}")
    return settings


def _mlp_ratio(tensors: State, wanted: State) -> list[str]:
    name = "blocks.0.mlp.fc1.weight"
    if name not in tensors or name not in wanted:
        return []
    theirs, ours = (state[name].shape[0] / state[name].shape[1] for state in (tensors, wanted))
    return [f"model.mlp_ratio={theirs:g}"] if theirs != ours else []


def _glob(name: str) -> str:
    """A pattern, quoted for the shell, for the part of the model that a key belongs to."""
    if name.startswith("decoder_"):
        return "'decoder*'"
    part, dot, _ = name.partition(".")
    return f"'{part}*'" if dot else name
