"""Twins: structural copies whose weights are fetched when they are read."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

from mlomae.hypergrad import twin as twin_module
from mlomae.hypergrad.twin import GradientSink, Twin, Weights, fetched_again
from mlomae.hypergrad.zero_partitions import partition_of


class Odd(nn.Module):
    """What a copy may get wrong: ties, a foreign read, lists, buffers, frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(6))
        self.scales = nn.ParameterList([torch.randn(6), torch.randn(6)])
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.last = nn.Linear(6, 6)
        self.last.bias.requires_grad_(False)
        self.again = self.last  # one module under two names
        self.norm = nn.BatchNorm1d(6)
        self.activation = self.squash  # a method as an attribute

    def squash(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.shift)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.first(x)) * self.scales[0]
        x = self.second(self.norm(x)) * self.scales[1]
        return self.again(F.linear(x, self.last.weight))


@pytest.fixture(params=[1, 2**24])
def problem(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """A module, its optimizer's partition and its twin, with small and with large buckets."""
    monkeypatch.setattr(twin_module, "BUCKET_NUMEL", request.param)
    torch.manual_seed(0)
    module = Odd().double()
    trainable = [p for p in module.parameters() if p.requires_grad]
    return module, partition_of(module, torch.optim.SGD(trainable, lr=0.1)), Twin(module)


X = torch.linspace(-1, 1, 30, dtype=torch.float64).view(5, 6)


def test_value_and_gradient_equal_the_module_s(problem) -> None:
    module, partition, twin = problem
    sink = GradientSink(partition)
    weights = Weights(twin, partition, sink=sink)
    with fetched_again([weights]), twin.bound(weights) as copy:
        output = copy(X)
        output.square().sum().backward()
    gradients = partition.gather(list(partition.shapes), sink.take())[0]
    expected = module(X)
    expected.square().sum().backward()
    assert torch.equal(output, expected)
    for name, param in module.named_parameters():
        if param.requires_grad:
            torch.testing.assert_close(gradients[name], param.grad, rtol=1e-12, atol=1e-12)
    assert "last.bias" not in gradients


def test_tangent_equals_the_directional_derivative(problem) -> None:
    _, partition, twin = problem
    direction = [torch.randn_like(s).flatten() for s in partition.shards()]
    weights = Weights(twin, partition, values=partition.weights(), tangents=direction)
    with forward_ad.dual_level(), torch.no_grad(), twin.bound(weights) as copy:
        tangent = forward_ad.unpack_dual(copy(X)).tangent
    sides = []
    for eps in (1e-6, -1e-6):
        moved = [w + eps * d for w, d in zip(partition.weights(), direction, strict=True)]
        with torch.no_grad(), twin.bound(Weights(twin, partition, values=moved)) as copy:
            sides.append(copy(X))
    torch.testing.assert_close(tangent, (sides[0] - sides[1]) / 2e-6, rtol=1e-6, atol=1e-8)


def test_the_module_is_left_alone(problem) -> None:
    module, partition, twin = problem
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with twin.bound(Weights(twin, partition)) as copy:
        copy(X)  # a forward pass in training mode moves the running statistics of batch norm
    assert all(torch.equal(before[n], v) for n, v in module.state_dict().items())
    assert copy.activation.__self__ is copy and copy.again is copy.last
    with pytest.raises(RuntimeError, match=r"weight .* was read after its evaluation had ended"):
        copy(X)


def test_training_modes_are_the_module_s_or_the_recorded_ones(problem) -> None:
    module, partition, twin = problem
    training = twin.modes()
    module.norm.eval()
    with twin.bound(Weights(twin, partition)) as copy:
        assert copy.training and not copy.norm.training
    with twin.bound(Weights(twin, partition), training) as copy:
        assert copy.norm.training
    assert not module.norm.training


def test_user_hooks_stay(problem) -> None:
    module, partition, _ = problem
    module.first.register_forward_hook(lambda *args: args[2] * 2)
    twin = Twin(module)
    with twin.bound(Weights(twin, partition)) as copy:
        assert torch.equal(copy(X), module(X))
