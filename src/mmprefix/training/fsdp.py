"""Full sharding of parameters, gradients and optimizer state (FSDP2) as a Lightning strategy.

Each layer of encoder and decoder is a unit of its own, gathered when it is needed; everything else (embeddings, a tied
output layer, connector, norms) is one with the model. Source: PyTorch's `torch.distributed.fsdp.fully_shard`.

Checkpoints are the files that any other run writes, gathered on the first process: they are read by one process or by many.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mmprefix.errors import InputError
from mmprefix.modeling import MMPrefixForConditionalGeneration

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes."""

    def __init__(
        self,
        replicas: int = 1,
        param_dtype: Literal["bfloat16", "float16", "float32"] | None = None,
        reduce_dtype: Literal["bfloat16", "float16", "float32"] | None = None,
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        timeout_minutes: float = 30.0,
    ) -> None:
        """Settings.

        Args:
            replicas: full copies of the sharded state (hybrid sharding); the number of nodes keeps gathering within each.
            param_dtype: what layers compute in, while weights and optimizer stay in float32; None for as they are.
            reduce_dtype: what gradients are summed in; by default float32.
            reshard_after_forward: give up gathered layers until backward, for memory; else only after it.
            cpu_offload: parameters, gradients and optimizer state live in the host's memory.
            timeout_minutes: how long a process waits for the others before the run fails.
        """
        super().__init__(
            data_parallel_size=1,  # set below, when the number of processes is known
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            timeout=timedelta(minutes=timeout_minutes),
        )
        if replicas < 1:
            raise InputError(f"trainer.strategy.replicas: expected at least 1, got {replicas}")
        self.replicas = replicas
        self.param_dtype, self.reduce_dtype = param_dtype, reduce_dtype
        self.reshard_after_forward, self.cpu_offload = reshard_after_forward, cpu_offload

    def setup_environment(self) -> None:
        """See `lightning.pytorch.strategies.ModelParallelStrategy.setup_environment`.

        Raises:
            InputError: replicas that don't divide the processes.
        """
        processes = self.num_nodes * self.num_processes
        if processes % self.replicas:
            raise InputError(
                f"trainer.strategy.replicas: expected a divisor of the {processes} processes, got {self.replicas}"
            )
        # Lightning's default takes the devices of a node for tensor parallelism: ranks would learn from other data.
        self._data_parallel_size = processes
        super().setup_environment()

    def shard(self, model: MMPrefixForConditionalGeneration) -> None:
        """Replaces the model's parameters by shards of them, in place; the optimizer must be made after it."""
        if isinstance(model, FSDPModule):  # by `fit`, before its test
            return
        shape: tuple[int, ...] = (self.world_size,)
        names: tuple[str, ...] = ("shard",)
        if self.replicas > 1:
            shape, names = (self.replicas, self.world_size // self.replicas), ("replicate", "shard")
        dtype = _DTYPES.get(self.param_dtype or "")
        settings: dict[str, Any] = {
            "mesh": init_device_mesh(self.root_device.type, shape, mesh_dim_names=names),
            "mp_policy": MixedPrecisionPolicy(dtype, _DTYPES[self.reduce_dtype or "float32"] if dtype else None),
            "offload_policy": CPUOffloadPolicy() if self.cpu_offload else OffloadPolicy(),
        }
        for layer in layers_of(model):
            fully_shard(layer, **settings, reshard_after_forward=self.reshard_after_forward)
        fully_shard(model, **settings)
        # Passes begin at the model: the first to run would take itself for the root.
        for method in ("target_loss", "image_tokens_of"):
            register_fsdp_forward_method(model, method)
        whole = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
        if whole:  # they would be learnt by each process on its own
            raise RuntimeError(f"parameters that no unit shards: {', '.join(whole[:5])}")

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[None]:
        """All parameters whole on each process, which may then use the model on its own, for other lengths of time."""
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in units:
                unit.reshard()
                unit.set_reshard_after_forward(self.reshard_after_forward and unit is not model, recurse=False)

    # Checkpoints

    def whole_state(self, model: nn.Module) -> dict[str, Tensor]:
        """All of a model's tensors on the first process, on the CPU; {} on the others. All processes must call it."""
        state: Any = get_model_state_dict(model, options=_whole())
        return dict(state)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As any optimizer has it, with parameters by number, on the first process."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        assert self.model is not None
        state: Any = get_optimizer_state_dict(self.model, optimizer, options=_whole())
        if not state:
            return {}
        numbers = {name: n for n, name in enumerate(n for group in state["param_groups"] for n in group["params"])}
        groups = [{**group, "params": [numbers[n] for n in group["params"]]} for group in state["param_groups"]]
        return {"state": {numbers[n]: values for n, values in state["state"].items()}, "param_groups": groups}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Weights and optimizer state from a whole checkpoint, each process its share."""
        path = Path(self.broadcast(checkpoint_path))
        checkpoint: dict[str, Any] = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, cpu_offload=self.cpu_offload)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            set_optimizer_state_dict(self.model, optimizer, self._by_name(optimizer, state), options=options)
        return checkpoint

    def _by_name(self, optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
        assert self.model is not None
        names = {id(p): name for name, p in self.model.named_parameters()}
        ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        groups = [{**group, "params": [ordered[n] for n in group["params"]]} for group in state["param_groups"]]
        return {"state": {ordered[n]: values for n, values in state["state"].items()}, "param_groups": groups}


def _whole() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def layers_of(model: MMPrefixForConditionalGeneration) -> list[nn.Module]:
    """The repeated layers of encoder and decoder, in the order that they are used in."""
    return [*_repeated(model.vision), *_repeated(model.decoder)]


def _repeated(part: nn.Module) -> list[nn.Module]:
    """Members of the outermost lists of layers of one class: blocks, stages, decoder layers."""
    found: list[nn.Module] = []
    for module in part.children():
        members = list(module.children())
        listed = isinstance(module, nn.ModuleList | nn.Sequential) and len({type(m) for m in members}) == 1
        if not listed or not any(True for _ in members[0].children()):
            found += _repeated(module)
        elif len(members) > 1:
            found += members
        else:  # a stage of one block, or what holds all blocks
            found += _repeated(members[0]) or members
    return found


if "fsdp2" not in StrategyRegistry:
    StrategyRegistry.register("fsdp2", FullyShardedStrategy, description=FullyShardedStrategy.__doc__ or "")
