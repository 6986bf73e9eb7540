"""Common functions and modules as functions of float64 tensors: name -> (function, shapes)."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

Function = Callable[..., Tensor]
CASES: dict[str, tuple[Function, tuple[tuple[int, ...], ...]]] = {}
LABELS, IGNORED = torch.tensor([0, 2, 1, 2]), torch.tensor([0, -100, 1, 2])
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 2.0]).double()
INDEX = torch.tensor([[0, 2, 1], [1, 1, 3]])


def case(name: str, function: Function, *shapes: tuple[int, ...]) -> None:
    assert name not in CASES
    CASES[name] = function, shapes


def of_module(name: str, module: nn.Module, *shapes: tuple[int, ...], **kwargs: object) -> None:
    """A module as a function of its inputs and its parameters."""
    names = [name for name, _ in module.double().named_parameters()]

    def function(*tensors: Tensor) -> Tensor:
        weights = dict(zip(names, tensors[len(shapes) :], strict=True))
        state = {name: buffer.clone() for name, buffer in module.named_buffers()} | weights
        output = torch.func.functional_call(module, state, tensors[: len(shapes)], kwargs)
        return output[0] if isinstance(output, tuple) else output

    case(name, function, *shapes, *(tuple(p.shape) for p in module.parameters()))


class Block(nn.Module):
    """A transformer block with gating, operations in place, and a query of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, 6))
        self.norm = nn.LayerNorm(6)
        self.qkv, self.down = nn.Linear(6, 18), nn.Linear(8, 6)
        self.gate, self.up = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        normed = self.norm(x)
        hidden = F.silu(self.gate(normed), inplace=True) * self.up(normed)
        x = self.down(F.dropout(hidden, 0.1, inplace=True)).add_(x)
        return (self.query @ x.mT).softmax(-1) @ x


def losses(reduction: str) -> None:
    def loss(name: str, function: Function, *more: tuple[int, ...]) -> None:
        case(f"{name} {reduction}", partial(function, reduction=reduction), (4, 3), *more)

    smooth = {"weight": CLASS_WEIGHTS, "label_smoothing": 0.2}
    loss("cross_entropy", partial(F.cross_entropy, target=LABELS))
    loss("cross_entropy smooth", partial(F.cross_entropy, target=IGNORED, **smooth))
    loss("cross_entropy soft", partial(F.cross_entropy, **smooth), (4, 3))
    loss("nll_loss", partial(F.nll_loss, target=IGNORED, weight=CLASS_WEIGHTS))
    loss("bce", lambda x, y, **k: F.binary_cross_entropy(x.sigmoid(), y.sigmoid(), **k), (4, 3))
    logits = partial(F.binary_cross_entropy_with_logits, pos_weight=CLASS_WEIGHTS)
    loss("bce_with_logits", logits, (4, 3))
    loss("kl_div", lambda x, y, **k: F.kl_div(x.log_softmax(-1), y.softmax(-1), **k), (4, 3))
    for function in (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss):
        loss(function.__name__, function, (4, 3))


def spatial(rank: int) -> None:
    size, three = (5,) * rank, (3,) * rank
    conv, transpose = getattr(F, f"conv{rank}d"), getattr(F, f"conv_transpose{rank}d")
    case(f"conv{rank}d", partial(conv, stride=2, groups=2), (2, 4, *size), (6, 2, *three), (6,))
    case(f"conv_transpose{rank}d", partial(transpose, stride=2), (2, 4, *three), (4, 3, *three))
    for name in ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool", "lp_pool"):
        args = (2, 2) if name == "lp_pool" else (2,)
        pool = getattr(F, f"{name}{rank}d")
        case(f"{name}{rank}d", lambda x, p=pool, a=args: p(x * x, *a), (2, 3, *size))


def normalizations() -> None:
    wide, weights = (3, 4, 5), [(4,), (4,)]
    for name in ("layer_norm", "rms_norm"):
        for place in (F, torch):
            norm = getattr(place, name)
            case(f"{place.__name__}.{name}", lambda x, n=norm: n(x, (2, 4)), (3, 2, 4))
            case(f"{place.__name__}.{name} w", lambda x, w, n=norm: n(x, (4,), w), (3, 4), (4,))
    of_module("LayerNorm", nn.LayerNorm(4, eps=0.1), (2, 3, 4))
    of_module("GroupNorm", nn.GroupNorm(2, 4), wide)
    for name, norm in {"train": nn.BatchNorm1d(4), "eval": nn.BatchNorm1d(4).eval()}.items():
        of_module(f"BatchNorm1d {name}", norm, wide)
    of_module("BatchNorm2d", nn.BatchNorm2d(4, affine=False), (3, 4, 2, 2))
    of_module("InstanceNorm2d", nn.InstanceNorm2d(4, affine=True), (2, 4, 3, 2))
    of_module("InstanceNorm1d", nn.InstanceNorm1d(4, track_running_stats=True), wide)
    case("batch_norm", lambda x, w, b: F.batch_norm(x, None, None, w, b, True), wide, *weights)
    of_module("weight_norm", weight_norm(nn.Linear(4, 3)), (2, 4))
    case("normalize", partial(F.normalize, dim=-1), (3, 4))
    for name in ("var", "std", "norm"):
        case(f"torch.{name}", partial(getattr(torch, name), dim=-1, keepdim=True), (3, 4))
    case("norm p=1", lambda x: x.norm(1), (3, 4))
    case("cdist", torch.cdist, (3, 4), (5, 4))


def attentions() -> None:
    query, key, value = (2, 4, 5, 6), (2, 4, 7, 6), (2, 4, 7, 3)
    mask = torch.arange(35).reshape(5, 7) % 3 > 0
    mask[3] = False  # a query that sees nothing
    options = {
        "plain": {},
        "causal": {"is_causal": True, "scale": 0.3},
        "bool": {"attn_mask": mask},
    }
    for name, kwargs in (options | {"dropout": {"dropout_p": 0.4}}).items():
        case(
            f"attention {name}",
            partial(F.scaled_dot_product_attention, **kwargs),
            query,
            key,
            value,
        )
    case("attention float", F.scaled_dot_product_attention, query, key, value, (5, 7))
    groups = partial(F.scaled_dot_product_attention, enable_gqa=True)
    case("attention groups", groups, query, (2, 2, 7, 6), (2, 2, 7, 3))
    mha = partial(nn.MultiheadAttention, 6, 2, batch_first=True)
    for name, weights in {"weights": True, "": False}.items():
        of_module(f"MultiheadAttention {name}", mha(), *[(2, 5, 6)] * 3, need_weights=weights)
    of_module("MultiheadAttention kdim", mha(kdim=4, dropout=0.2), (2, 5, 6), (2, 7, 4), (2, 7, 6))
    layer = partial(nn.TransformerEncoderLayer, 6, 2, 8, batch_first=True)
    of_module("TransformerEncoderLayer", layer(norm_first=True, activation="gelu"), (2, 5, 6))
    of_module("TransformerEncoderLayer eval", layer().eval(), (2, 5, 6))
    of_module("TransformerDecoderLayer", nn.TransformerDecoderLayer(6, 2, 8), (5, 2, 6), (4, 2, 6))
    of_module("Block", Block(), (2, 5, 6))


def elementwise() -> None:
    activations = """gelu silu sigmoid tanh relu elu softplus leaky_relu hardswish hardsigmoid mish
        selu celu relu6 hardtanh logsigmoid softsign hardshrink glu dropout softmin logsumexp
        exp cos erf cumsum cumprod prod square roll flip"""
    more = {"logsumexp": (-1,), "cumsum": (0,), "cumprod": (0,),
            "roll": (1,), "flip": ((0,),), "softmin": (-1,)}  # fmt: skip
    for name in activations.split():
        function = getattr(F, name, None) or getattr(torch, name)
        case(name, lambda x, f=function, n=name: f(x, *more.get(n, ())), (4, 6))
    case("gelu tanh", partial(F.gelu, approximate="tanh"), (4, 6))
    mixed = torch.compile(lambda x, w: F.gelu(F.softmax(x @ w, dim=-1)), backend="aot_eager")
    case("compiled", mixed, (3, 4), (4, 4))
    for place in (F, torch, Tensor, torch.special):
        for name in ("softmax", "log_softmax"):
            function = getattr(place, name)
            case(f"{place.__name__}.{name}", lambda x, f=function: f(x, dim=0), (3, 4))
    case("prelu", F.prelu, (3, 4), (4,))


def shapes() -> None:
    functions: dict[str, Function] = {
        "sort": lambda x: x.sort(-1)[0], "topk": lambda x: x.topk(2, -1)[0],
        "max": lambda x: x.max(-1)[0], "amax": lambda x: x.amax((0, 1)), "min": torch.min,
        "median": lambda x: x.median(-1)[0], "gather": lambda x: x.gather(0, INDEX),
        "index": lambda x: x[INDEX], "index_select": lambda x: x.index_select(0, INDEX[0]),
        "masked_fill": lambda x: x.masked_fill(x > 1, 0.0), "where": lambda x: x.where(x > 1, x**2),
        "scatter_add": lambda x: x.scatter_add(0, INDEX, x[:2, :3]), "tril": torch.tril,
        "scatter_reduce": lambda x: x.scatter_reduce(0, INDEX, x[:2, :3], "prod"),
        "clamp": lambda x: x.clamp(0.1, 1.0), "expand": lambda x: x.expand(2, 4, 4),
        "unfold": lambda x: F.unfold(x[None, None], 2), "cat": lambda x: torch.cat([x, x**2]),
        "fold": lambda x: F.fold(x.reshape(1, 4, 4), (3, 3), 2),
        "pixel_shuffle": lambda x: F.pixel_shuffle(x.reshape(1, 4, 2, 2), 2),
        "log": torch.log, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "pow": lambda x: x**1.7,
        "einsum": lambda x: torch.einsum("ij,kj->ik", x, x), "bmm": lambda x: x[None].bmm(x[None]),
        "inplace": lambda x: x.clone().mul_(x).add_(x), "fft": lambda x: torch.fft.rfft(x).abs(),
        "repeat": lambda x: x.repeat_interleave(2, 0), "as_strided": lambda x: x.T.flatten()[::2],
    }  # fmt: skip
    for name, function in functions.items():  # of squares, so that linear functions count too
        case(name, lambda x, f=function: f(x * x + 0.1), (4, 4))
    for mode in ("reflect", "replicate", "circular", "constant"):
        case(f"pad {mode}", lambda x, m=mode: F.pad(x**2, (1, 2), mode=m), (2, 3, 5))
    for mode in ("nearest", "bilinear", "bicubic", "area"):
        resize = partial(F.interpolate, size=(7, 3), mode=mode)
        case(f"interpolate {mode}", lambda x, f=resize: f(x**2), (1, 2, 5, 5))
    grid_sample = partial(F.grid_sample, align_corners=False)
    case("grid_sample", lambda x, g: grid_sample(x, g.tanh()), (1, 2, 4, 4), (1, 3, 3, 2))


def products() -> None:
    case("linear", F.linear, (2, 3, 4), (5, 4), (5,))
    case("linear vector", F.linear, (4,), (5, 4))
    fixed = torch.arange(20.0).double().reshape(5, 4).cos()
    case("linear input", lambda x: F.linear(x**2, fixed, fixed[:, 0]), (3, 4))
    case("linear weight", lambda w, b: F.linear(fixed, w**2, b**2), (3, 4), (3,))
    case("linear bias", lambda b: F.linear(fixed, fixed, b**2), (5,))
    case("bilinear", F.bilinear, (3, 4), (3, 5), (2, 4, 5), (2,))
    case("baddbmm", torch.baddbmm, (2, 3, 5), (2, 3, 4), (2, 4, 5))
    case("matmul", torch.matmul, (2, 1, 3, 4), (3, 4, 5))
    case("embedding", lambda w: F.embedding(INDEX, w) ** 2, (5, 3))
    case("embedding padding", lambda w: F.embedding(INDEX, w, padding_idx=1) ** 2, (5, 3))
    well = 4 * torch.eye(4).double()
    case("solve", lambda a, b: torch.linalg.solve(a + well, b), (4, 4), (4, 2))
    for name in ("det", "logdet", "inverse"):
        case(name, lambda a, n=name: getattr(a.tanh() + well, n)(), (4, 4))
    case("slogdet", lambda a: torch.linalg.slogdet(a + well)[1], (4, 4))
    for name in ("LSTM", "GRU", "RNN"):
        of_module(name, getattr(nn, name)(3, 4, 2), (5, 2, 3))


for _reduction in ("mean", "sum", "none"):
    losses(_reduction)
for _rank in (1, 2, 3):
    spatial(_rank)
for _family in (normalizations, attentions, elementwise, shapes, products):
    _family()
