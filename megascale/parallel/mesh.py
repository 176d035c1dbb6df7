"""The one object that knows which rank is where: axes pp, dp, cp, tp over torch's DeviceMesh."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from megascale.errors import UserError
from megascale.parallel import shared_memory

AXES = ("pp", "dp", "cp", "tp")


@dataclass(frozen=True)
class ParallelMesh:
    """Ranks arranged as (pp, dp, cp, tp), tp innermost so that it stays inside a node.

    Built once by `build_mesh` and passed by argument; nothing looks it up globally.

    Attributes:
        device_mesh: the four axes.
        data_mesh: dp and cp as one axis: the ranks that hold the same weights and other tokens.
        model_mesh: pp and tp as one axis: the ranks that hold one copy of the model.
    """

    device_mesh: DeviceMesh
    data_mesh: DeviceMesh
    model_mesh: DeviceMesh

    @property
    def dp_size(self) -> int:
        """Number of data-parallel replicas."""
        return self.device_mesh["dp"].size()

    @cached_property  # a slice of the mesh takes a quarter of a millisecond
    def dp_rank(self) -> int:
        """This process's index along the data-parallel axis."""
        return self.device_mesh["dp"].get_local_rank()

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """Process group of the data-parallel axis."""
        return self.device_mesh["dp"].get_group()

    @property
    def cp_size(self) -> int:
        """Number of ranks that share the tokens of a sample."""
        return self.device_mesh["cp"].size()

    @cached_property
    def cp_rank(self) -> int:
        """This process's index along the context-parallel axis."""
        return self.device_mesh["cp"].get_local_rank()

    @property
    def cp_group(self) -> dist.ProcessGroup:
        """Process group of the context-parallel axis."""
        return self.device_mesh["cp"].get_group()

    @property
    def data_size(self) -> int:
        """Number of ranks over which gradients are summed and ZeRO shards: dp x cp."""
        return self.data_mesh.size()

    @cached_property
    def data_rank(self) -> int:
        """This process's index among them."""
        return self.data_mesh.get_local_rank()

    @property
    def data_group(self) -> dist.ProcessGroup:
        """Their process group."""
        return self.data_mesh.get_group()

    @property
    def tp_size(self) -> int:
        """Number of ranks that share every matrix."""
        return self.device_mesh["tp"].size()

    @cached_property
    def tp_rank(self) -> int:
        """This process's index along the tensor-parallel axis."""
        return self.device_mesh["tp"].get_local_rank()

    @property
    def tp_group(self) -> dist.ProcessGroup:
        """Process group of the tensor-parallel axis."""
        return self.device_mesh["tp"].get_group()

    @property
    def pp_size(self) -> int:
        """Number of ranks that share the layers."""
        return self.device_mesh["pp"].size()

    @cached_property
    def pp_rank(self) -> int:
        """This process's index along the pipeline axis."""
        return self.device_mesh["pp"].get_local_rank()

    @property
    def pp_group(self) -> dist.ProcessGroup:
        """Process group of the pipeline axis."""
        return self.device_mesh["pp"].get_group()

    @property
    def rank(self) -> int:
        """Global rank."""
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """Number of processes of the run."""
        return dist.get_world_size()

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once (logs, manifests)."""
        return self.rank == 0

    def sum_over_data(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a small tensor over all ranks with other tokens: dp x cp; returns a new tensor."""
        total = values.clone()
        if self.data_size > 1:
            dist.all_reduce(total, group=self.data_group)
        return total

    def close(self) -> None:
        """Destroy the groups of the axes; the mesh is not used after that. Collective.

        Each group of gloo has three threads that poll: a process that goes through many meshes
        without closing them slows down until it does nothing else.
        """
        meshes = [*(self.device_mesh[axis] for axis in AXES), self.data_mesh, self.model_mesh]
        groups = {mesh.get_group() for mesh in meshes} - {dist.group.WORLD}
        for group in sorted(groups, key=lambda group: group.group_name):  # alike on all ranks
            dist.destroy_process_group(group)
        forget_groups()


def forget_groups() -> None:
    """End the threads of destroyed groups: drop what still refers to them.

    That are DTensor's cache of shardings (FSDP2), which keeps each mesh, and cycles. Measured
    without: after 140 layouts of `megascale verify layout` a process had 180 polling threads.
    """
    _clear_sharding_prop_cache()
    gc.collect()


def limit_waits(timeout: timedelta) -> None:
    """Let no collective of any group of this process wait for other ranks longer than `timeout`.

    New groups start with torch's default of 30 minutes, whatever the default group was given.
    """
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timeout, group)
        if isinstance(group, shared_memory.SharedMemoryGroup):
            group.limit_wait(timeout)


def build_mesh(
    device_type: str,
    *,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    context_parallel_size: int = 1,
    through_memory: bool = True,
) -> ParallelMesh:
    """Build the mesh over all processes of the initialised default group.

    Args:
        through_memory: whether ranks that share a machine's CPU may do collectives through memory.

    Raises:
        UserError: the world size is no multiple of tp * pp * cp.
    """
    world = dist.get_world_size()
    model = tensor_parallel_size * pipeline_parallel_size * context_parallel_size
    if world % model:
        raise UserError(
            f"world size {world} does not fit the layout",
            rule=f"it must be a multiple of tensor x pipeline x context parallel size = "
            f"{tensor_parallel_size} x {pipeline_parallel_size} x {context_parallel_size} "
            f"= {model}",
            remedy=f"start {model * max(1, world // model)} processes or change parallel.*",
        )
    shape = (pipeline_parallel_size, world // model, context_parallel_size, tensor_parallel_size)
    backend = shared_memory.BACKEND if through_memory and device_type == "cpu" else None
    if backend:
        shared_memory.register()
    mesh = init_device_mesh(
        device_type,
        shape,
        mesh_dim_names=AXES,
        backend_override={
            axis: backend for axis, size in zip(AXES, shape, strict=True) if backend and size > 1
        },
    )
    data = _joined(mesh, ("dp", "cp"), "data", backend)
    model_mesh = _joined(mesh, ("pp", "tp"), "model", backend)
    return ParallelMesh(mesh, data, model_mesh)


def _joined(mesh: DeviceMesh, axes: tuple[str, str], name: str, backend: str | None) -> DeviceMesh:
    """Two axes as one: one of them where the other has a single rank."""
    for axis, other in (axes, axes[::-1]):
        if mesh[other].size() == 1:
            return mesh[axis]
    return mesh[axes]._flatten(name, backend_override=backend)
