"""What the tests read of a partition and of a recorded step, and the library never does."""

from torch import Tensor

from mlomae.hypergrad.partition import Partition, Vector, view
from mlomae.hypergrad.records import StepRecord


def reduced_gradient(partition: Partition) -> Vector:
    """A copy of the reduced gradient; zero where there is none."""
    vector = partition.zeros()
    for fragment in partition.fragments:
        grad = partition.gradient_of(fragment)
        if grad is not None:
            view(vector, fragment).copy_(grad).div_(partition.loss_scale)
    return vector


def record_bytes(record: StepRecord) -> int:
    """Memory of the tensors held as shards on this rank."""
    tensors = list(record.weights)
    for step in record.steps.values():
        tensors += [step.grad, *(s for s in step.state.values() if isinstance(s, Tensor))]
    return sum(t.numel() * t.element_size() for t in tensors)
