"""Full sharding of parameters, gradients and optimizer state (FSDP2) as a Lightning strategy.

Each layer of encoder and decoder is a unit of its own, gathered when it is needed; everything else (embeddings, a tied
output layer, connector, norms) is one with the model. Source: PyTorch's `torch.distributed.fsdp.fully_shard`.

Checkpoints are folders to which each process writes its share (`sharded`); one process or many go on from them, and many go on
from the file of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from mmprefix.errors import InputError
from mmprefix.modeling import MMPrefixForConditionalGeneration
from mmprefix.stored_weights import float32_in_mapping
from mmprefix.training import sharded
from mmprefix.training.agreement import together
from mmprefix.training.checkpoints import TIED, check_fits, read_checkpoint
from mmprefix.training.layers import layers_by_part, layers_of
from mmprefix.training.saving import AtomicCheckpointIO

STRATEGY_NAME = "fsdp2"
"""What `FullyShardedStrategy` is known by on the command line."""

FINDING_OUT = timedelta(seconds=20)
"""What is left of a time-out for the watchdog, which asks the job's store who is missing, for up to ten seconds, and for the
end of the process; of short time-outs, half."""

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
        prefetch: int = 1,
        timeout_minutes: float = 30.0,
    ) -> None:
        """Settings.

        Args:
            replicas: full copies of the sharded state (hybrid sharding); the number of nodes keeps gathering within each.
            param_dtype: what layers compute in, while weights and optimizer stay in float32; None for as they are.
            reduce_dtype: what gradients are summed in; by default float32.
            reshard_after_forward: give up gathered layers until backward, for memory; else only after it.
            cpu_offload: parameters, gradients and optimizer state live in the host's memory.
            prefetch: how many layers ahead are being gathered while one computes, in forward and backward. More hide a slow
                link behind small layers, for the memory of so many gathered layers.
            timeout_minutes: when processes that can't reach each other have ended, counted from the last exchange that came
                through. Each exchange may take so long, less what it takes to find out who is missing (`FINDING_OUT`).
        """
        super().__init__(
            data_parallel_size=1,  # set below, when the number of processes is known
            tensor_parallel_size=1,
            timeout=timedelta(minutes=timeout_minutes) - min(FINDING_OUT, timedelta(minutes=timeout_minutes / 2)),
        )
        self.replicas, self.prefetch = replicas, prefetch
        self.param_dtype, self.reduce_dtype = param_dtype, reduce_dtype
        self.reshard_after_forward, self.cpu_offload = reshard_after_forward, cpu_offload

    def setup_environment(self) -> None:
        """See `lightning.pytorch.strategies.ModelParallelStrategy.setup_environment`.

        Raises:
            InputError: settings out of range, one process, or replicas that don't divide the processes.
        """
        processes = self.num_nodes * self.num_processes
        try:
            self._check(processes)
        except InputError as error:  # wrong for all of them: the first says it
            raise InputError("" if rank_zero_only.rank else str(error)) from error
        # Lightning's default takes the devices of a node for tensor parallelism: ranks would learn from other data.
        self._data_parallel_size = processes
        super().setup_environment()
        if self._checkpoint_io is None:  # the command line brings one
            self.checkpoint_io = AtomicCheckpointIO()
        # Its own, for checkpoints that are written while the default one reduces gradients.
        self._disk_group = torch.distributed.new_group(backend="gloo", timeout=self._timeout)

    def _check(self, processes: int) -> None:
        # Not when it is made: the command line's parser would take that for a value of another type.
        for name in ("replicas", "prefetch"):
            if getattr(self, name) < 1:
                raise InputError(f"trainer.strategy.{name}: expected at least 1, got {getattr(self, name)}")
        if processes == 1:
            raise InputError(
                "trainer.strategy: expected several processes to shard the model over, got one; leave the strategy out, or "
                "give more with --trainer.devices"
            )
        if processes % self.replicas:
            raise InputError(
                f"trainer.strategy.replicas: expected a divisor of the {processes} processes, got {self.replicas}"
            )

    def shard(self, model: MMPrefixForConditionalGeneration) -> None:
        """Replaces the model's parameters by shards of them, in place; the optimizer must be made after it.

        Args:
            model: its weights may be in half precision and in files, see `decoder.build_decoder`. A layer becomes float32 just
                before it is sharded: a process holds its share, and above it one layer, or what is outside of layers.
        """
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
            "offload_policy": CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda")
            if self.cpu_offload
            else OffloadPolicy(),
        }
        for layer in layers_of(model):
            self._to_float32(layer)
            fully_shard(layer, **settings, reshard_after_forward=self.reshard_after_forward)
        self._to_float32(model)
        fully_shard(model, **settings)
        for part in layers_by_part(model).values():
            prefetch_neighbours(part, self.prefetch)
        # Passes begin at the model: the first to run would take itself for the root.
        for method in ("target_loss", "image_tokens_of"):
            register_fsdp_forward_method(model, method)
        whole = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
        if whole:  # they would be learnt by each process on its own
            raise RuntimeError(f"parameters that no unit shards: {', '.join(whole[:5])}")

    def _to_float32(self, unit: nn.Module) -> None:
        for tensor in (*unit.parameters(), *unit.buffers()):
            if isinstance(tensor, DTensor) or not tensor.is_floating_point() or tensor.dtype == torch.float32:
                continue
            if self.root_device.type == "cpu":
                tensor.data = float32_in_mapping(tensor.data)
            else:  # first to the device, which is the faster one, and has to hold a whole unit anyway
                tensor.data = tensor.data.to(self.root_device).to(torch.float32)

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
        state: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return dict(state)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Weights, this process's share of each. Tied ones once, by the first of their names."""
        assert self.lightning_module is not None
        state = self.lightning_module.state_dict()
        tied = self._tied()
        return {name: value for name, value in state.items() if name not in tied}

    def _tied(self) -> dict[str, str]:
        """Second names of parameters -> their first."""
        first: dict[int, str] = {}
        assert self.lightning_module is not None
        names = [(name, id(p)) for name, p in self.lightning_module.named_parameters(remove_duplicate=False)]
        return {name: first[key] for name, key in names if first.setdefault(key, name) != name}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As any optimizer has it, with parameters by number; this process's share."""
        state: dict[str, Any] = getattr(optimizer, "_optimizer", optimizer).state_dict()
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Each process writes its share."""
        path = Path(self.broadcast(filepath))
        checkpoint[TIED] = self._tied()
        self._io.save_shards(checkpoint, path, self._disk_group)

    @property
    def _io(self) -> AtomicCheckpointIO:
        io = self.checkpoint_io
        assert isinstance(io, AtomicCheckpointIO)
        return io

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Each process reads its share, of a folder or of a file, into the model and its optimizers.

        Returns:
            all else that the checkpoint holds.

        Raises:
            InputError: of another model.
        """
        self._io.wait()
        path = Path(self.broadcast(checkpoint_path))
        checkpoint = read_checkpoint(path, None)
        if path.is_dir():
            infos = sharded.infos(path)
        else:
            stored, checkpoint = sharded.split(checkpoint)
            infos = {name: sharded.TensorInfo(value.shape, value.dtype) for name, value in stored.items()}
        weights = self.lightning_module_state_dict()
        with together():
            check_fits(
                {name: value.shape for name, value in weights.items()},
                {n.removeprefix(sharded.WEIGHTS): i.shape for n, i in infos.items() if n.startswith(sharded.WEIGHTS)},
                path, set(checkpoint.get(TIED, {})) | set(self._tied()),
            )  # fmt: skip
        wanted: dict[str, Tensor] = {sharded.WEIGHTS + name: value for name, value in weights.items()}
        states: list[dict[int, dict[str, Tensor]]] = []
        for i, optimizer in enumerate(self.optimizers):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            states.append({})
            for name, (number, key) in sharded.optimizer_tensors(infos, i).items():
                info, parameter = infos[name], parameters[number].detach()
                like = parameter if info.shape == parameter.shape else torch.empty(info.shape)
                value = torch.empty_like(like, dtype=info.dtype)
                wanted[name] = states[i].setdefault(number, {})[key] = value
        if path.is_dir():
            sharded.read_into(wanted, path, self._disk_group)
        else:
            with torch.no_grad():
                for name, value in wanted.items():
                    _fill(value, stored[name])
        for optimizer, state, groups in zip(self.optimizers, states, checkpoint["optimizer_states"], strict=False):
            optimizer.load_state_dict({**groups, "state": state})
        return {**checkpoint, "state_dict": {}}

    def teardown(self) -> None:
        """Waits for a checkpoint that is being written."""
        self._io.teardown()
        super().teardown()


def _fill(value: Tensor, whole: Tensor) -> None:
    if isinstance(value, DTensor):  # each process has the whole, and takes its rows of it
        whole = distribute_tensor(
            whole.to(value.dtype), value.device_mesh, value.placements, src_data_rank=None
        ).to_local().to(value.to_local().device)  # fmt: skip
        value = value.to_local()
    value.copy_(whole)


def prefetch_neighbours(layers: Sequence[nn.Module], number: int) -> None:
    """Tells each sharded layer of a part which layers to gather while it computes: the next, in backward those before it.

    Not beyond the part: where no gradient goes through the encoder, nobody would give its layers up again.

    Args:
        layers: in the order that they are used in.
        number: how many.
    """
    for i, layer in enumerate(layers):
        assert isinstance(layer, FSDPModule)
        layer.set_modules_to_forward_prefetch(list(layers[i + 1 : i + 1 + number]))  # type: ignore[arg-type]
        layer.set_modules_to_backward_prefetch(list(reversed(layers[max(0, i - number) : i])))  # type: ignore[arg-type]


if STRATEGY_NAME not in StrategyRegistry:
    StrategyRegistry.register(STRATEGY_NAME, FullyShardedStrategy, description=FullyShardedStrategy.__doc__ or "")
