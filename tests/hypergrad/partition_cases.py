"""What the partition tests run on every rank: shards, gradients and steps of real engines."""

import copy
import gc
from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from mlomae.hypergrad.partition import Partition, Vector, view
from mlomae.hypergrad.zero_partitions import partition_of
from tests.hypergrad.plain_training import (
    Network,
    Reference,
    adamw,
    error,
    micro_batch,
    random_like,
    relative_error,
    schedule,
)
from tests.hypergrad.readings import reduced_gradient

FIRST_EXPLICIT_STEP = 3  # before it, engines count micro-batches; from it on, the last one is set
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OFFLOAD = {"device": "cpu", "pin_memory": False}
SMALL_BUCKETS = {  # so that even the tiny network needs several of everything
    "reduce_bucket_size": 64,
    "allgather_bucket_size": 64,
    "sub_group_size": 40,
    "stage3_prefetch_bucket_size": 64,
    "stage3_param_persistence_threshold": 8,
}


class Case:
    """An engine over the network with a partition, and the network as it was before."""

    def __init__(self, case: dict[str, Any]) -> None:
        if case["dtype"] == "fp16":  # DeepSpeed believes that the CPU cannot
            get_accelerator().is_fp16_supported = lambda: True
        torch.manual_seed(0)
        network = Network()
        self.original = copy.deepcopy(network)
        self.dtype = DTYPES[case["dtype"]]
        self.max_norm = case.get("max_norm", 0.0)
        self.num_micro_batches = case.get("num_micro_batches", 1)
        optimizer = adamw(network)
        self.engine, *_ = deepspeed.initialize(
            model=network,
            optimizer=optimizer,
            lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, schedule),
            config=self.config(case),
        )
        self.partition: Partition = partition_of(self.engine, None)

    def config(self, case: dict[str, Any]) -> dict[str, Any]:
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.num_micro_batches,
            "gradient_clipping": self.max_norm,
            "zero_optimization": {"stage": case["stage"], **SMALL_BUCKETS, **case.get("zero", {})},
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        if case["dtype"] != "fp32":
            config[case["dtype"]] = {"enabled": True}
        if case["dtype"] == "fp16":
            config["fp16"] |= {"loss_scale": 128} | case.get("fp16", {})
        for part in case.get("offload", ()):
            config["zero_optimization"][f"offload_{part}"] = OFFLOAD
        return config | case.get("config", {})

    def train(self, step: int, *, discarded: bool = False) -> None:
        """Forward and backward passes of one step, on different data on every rank."""
        for i in range(self.num_micro_batches):
            is_last = i == self.num_micro_batches - 1
            if step >= FIRST_EXPLICIT_STEP:
                self.engine.set_gradient_accumulation_boundary(is_last)
            x, y = micro_batch(step + 50 * discarded, i, dist.get_rank())
            self.engine.backward(F.mse_loss(self.engine(x.to(self.dtype)).float(), y))
            if step < FIRST_EXPLICIT_STEP and not is_last:
                self.engine.step()

    def step(self) -> dict[str, Tensor]:
        """`engine.step()`; returns the gradient that the optimizer used, whole."""
        shards = self.partition.shards()
        index = {id(shard): i for i, shard in enumerate(shards)}
        used = self.partition.zeros()

        def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for shard in (p for group in optimizer.param_groups for p in group["params"]):
                if shard.grad is not None:
                    used[index[id(shard)]].copy_(shard.grad.flatten())

        handle = self.partition.optimizer.register_step_pre_hook(note)
        self.engine.step()
        handle.remove()
        return self.whole(used)

    def whole(self, vector: Vector) -> dict[str, Tensor]:
        """All parameters of a vector, each in a tensor of its own."""
        whole = self.partition.gather(list(self.partition.shapes), vector)[0]
        return {name: value.clone() for name, value in whole.items()}

    def cut(self, whole: dict[str, Tensor]) -> Vector:
        """This rank's shards of whole parameters, with rubbish in the padding."""
        vector = [torch.full_like(zeros, torch.nan) for zeros in self.partition.zeros()]
        for f in self.partition.fragments:
            part = whole[f.name].flatten()[f.param_start : f.param_start + f.numel]
            view(vector, f).copy_(part)
        return vector

    def masters(self) -> dict[str, Tensor]:
        return self.whole([shard.detach().flatten() for shard in self.partition.shards()])

    def close(self) -> None:
        self.engine.destroy()
        deepspeed.comm.barrier()


def evaluate(
    cases: dict[str, dict[str, Any]],
    refused: dict[str, dict[str, Any]],
    resumed: Sequence[str],
    checkpoints: str,
) -> dict[str, dict[str, Any]]:
    """What every check finds for every case, and the sentences with which others are refused."""
    gc.freeze()  # DeepSpeed collects garbage for each ZeRO-3 engine, and what is imported is none
    results = {name: evaluate_one(case) for name, case in cases.items()}
    for name in resumed:
        results[name] |= {"resumed": resume(cases[name], f"{checkpoints}/{name}")}
    return results | {"refused": {what: refusal(case) for what, case in refused.items()}}


def refusal(case: dict[str, Any]) -> str:
    try:
        Case({"dtype": "fp32"} | case)
    except ValueError as error:
        return str(error)
    return ""


def evaluate_one(case: dict[str, Any]) -> dict[str, Any]:
    side = Case(case | {"num_micro_batches": 3, "max_norm": 4.0})
    results = {"current": current(side), "added": added(side), **stepped(side, case)}
    side.close()
    return results | futures(case | {"num_micro_batches": 2, "max_norm": 0.05})


def current(side: Case) -> bool:
    """Whether whole weights are the original network's, bit for bit, frozen ones included."""
    expected = {n: p.detach().to(side.dtype) for n, p in side.original.named_parameters()}
    weights = side.partition.current(list(expected))
    return all(torch.equal(weights[name], value) for name, value in expected.items())


def added(side: Case) -> float:
    """Error of averaged gradients of all but one parameter, added to a vector."""
    shapes = dict(side.partition.shapes)
    start = random_like(shapes, seed=9)
    of_ranks = [random_like(shapes, seed=rank) for rank in range(dist.get_world_size())]
    mine = of_ranks[dist.get_rank()]
    mine.pop("norm.weight")
    vector = side.cut(start)
    side.partition.add_gradients(mine, vector)
    expected = {n: start[n] + sum(g[n] for g in of_ranks) / len(of_ranks) for n in mine}
    expected["norm.weight"] = start["norm.weight"]
    return error(side.whole(vector), expected)


def stepped(side: Case, case: dict[str, Any]) -> dict[str, Any]:
    """Errors after steps along set gradients, of an engine that never runs backward."""
    partition, reference = side.partition, Reference(side.original, side.dtype, side.max_norm)
    if case["stage"] == 0 and case["dtype"] != "fp32":
        # DeepSpeed's wrapper creates the optimizer's state by a step with zero gradients.
        reference.step({name: torch.zeros(shape) for name, shape in partition.shapes.items()}, 0)
    readings, masters, used = [], [], []
    for step, size in enumerate((0.3, 0.1, 1.0, 2.0)):  # only the last two are clipped
        drawn = random_like(dict(partition.shapes), seed=20 + step)
        gradient = {name: size * value for name, value in drawn.items()}
        partition.set_gradient(side.cut(gradient))
        readings.append(error(side.whole(reduced_gradient(partition)), gradient))
        norm = torch.cat([g.double().flatten() for g in gradient.values()]).norm()
        readings.append(abs(partition.gradient_norm() - float(norm)))
        seen_by_hook = side.step()
        reference.step(gradient, step)
        used.append(error(seen_by_hook, reference.gradient()))
        masters.append(error(side.masters(), reference.weights()))
    rounded = {n: m.to(side.dtype) for n, m in side.masters().items()}
    return {
        "readings": max(readings),
        "used": used,
        "masters": masters,
        "weights": error(partition.current(list(rounded)), rounded),
        "counted steps": side.engine.global_steps,
        "skipped steps": side.engine.skipped_steps,
    }


def futures(case: dict[str, Any]) -> dict[str, Any]:
    """Traces of two engines; one takes some steps by setting the gradient that the other computed.

    It also discards steps of its own, of which no trace must remain.
    """
    by_backward, by_setting = Case(case), Case(case)
    traces: list[dict[str, Any]] = [{}, {}]
    errors = []
    zeros = {name: torch.zeros(shape) for name, shape in by_setting.partition.shapes.items()}
    for step in range(6):
        by_backward.train(step)
        gradient = reduced_gradient(by_backward.partition)
        errors.append(relative_error(by_backward.whole(gradient), true_gradient(by_backward, step)))
        if step in (2, 5):
            by_setting.train(step, discarded=True)
            by_setting.partition.clear_gradients()
            errors.append(error(by_setting.whole(reduced_gradient(by_setting.partition)), zeros))
        if step in (1, 4):
            by_setting.partition.set_gradient(gradient)
        else:
            by_setting.train(step)
        for side, trace in zip((by_backward, by_setting), traces, strict=True):
            trace[f"step {step}"] = {"used": side.step(), **snapshot(side)}
    by_backward.close()
    by_setting.close()
    return {"backward": errors, "futures": traces}


def resume(case: dict[str, Any], folder: str) -> list[dict[str, Any]]:
    """Traces of an engine and of one that took over from its checkpoint; partitions are older."""
    sides = (Case(case), Case(case))
    for step in range(2):
        sides[0].train(step)
        sides[0].step()
    sides[0].engine.save_checkpoint(folder, tag="engine", save_latest=False)
    sides[1].engine.load_checkpoint(folder, tag="engine")
    traces = []
    for side in sides:
        side.train(2)
        trace = {"used": side.step(), **snapshot(side)}
        del trace["counters"]["micro_steps"]  # DeepSpeed counts these by the checkpoint's steps
        traces.append(trace)
        side.close()
    return traces


def true_gradient(side: Case, step: int) -> dict[str, Tensor]:
    """Mean gradient over ranks and micro-batches, in float64."""
    network = Network().double()
    weights = side.partition.current([name for name, _ in network.named_parameters()])
    network.load_state_dict(weights)
    ranks, micro_batches = range(dist.get_world_size()), range(side.num_micro_batches)
    batches = [micro_batch(step, i, rank) for rank in ranks for i in micro_batches]
    losses = [F.mse_loss(network(x.double()), y.double()) for x, y in batches]
    (sum(losses) / len(losses)).backward()
    return {n: p.grad for n, p in network.named_parameters() if p.grad is not None}


def snapshot(side: Case) -> dict[str, Any]:
    """Everything a step changes, by name, and the counters."""
    engine, partition = side.engine, side.partition
    states = [partition.optimizer.state[shard] for shard in partition.shards()]
    kinds = {"master": [shard.detach().flatten() for shard in partition.shards()]}
    for key in ("exp_avg", "exp_avg_sq"):
        kinds[key] = [state[key].flatten() for state in states]
    state: dict[str, Any] = {kind: side.whole(vector) for kind, vector in kinds.items()}
    state["weights"] = side.whole(partition.weights())
    state["counters"] = {
        "adam": [float(state["step"]) for state in states],
        "lr": engine.get_lr(),
        "norm": float(engine.get_global_grad_norm() or 0.0),
        **{key: getattr(engine, key) for key in ("micro_steps", "global_steps", "skipped_steps")},
        "micro_step_id": getattr(engine.optimizer, "micro_step_id", None),
    }
    return state


def same(left: Any, right: Any) -> bool:
    """Whether two nested results agree bit for bit."""
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(v, right[k]) for k, v in left.items())
    if isinstance(left, Sequence) and not isinstance(left, str):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)
