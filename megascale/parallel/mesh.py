"""The one object that knows which rank is where: axes pp, dp, cp, tp over torch's DeviceMesh."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megascale.errors import UserError

AXES = ("pp", "dp", "cp", "tp")


@dataclass(frozen=True)
class ParallelMesh:
    """Ranks arranged as (pp, dp, cp, tp), tp innermost so that it stays inside a node.

    Built once by `build_mesh` and passed by argument; nothing looks it up globally.

    Attributes:
        device_mesh: the four axes.
        pp_tp_mesh: pp and tp as one axis, with a pipeline.
    """

    device_mesh: DeviceMesh
    pp_tp_mesh: DeviceMesh | None = None

    @property
    def dp_size(self) -> int:
        """Number of data-parallel replicas."""
        return self.device_mesh["dp"].size()

    @property
    def dp_rank(self) -> int:
        """This process's index along the data-parallel axis."""
        return self.device_mesh["dp"].get_local_rank()

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """Process group of the data-parallel axis."""
        return self.device_mesh["dp"].get_group()

    @property
    def tp_size(self) -> int:
        """Number of ranks that share every matrix."""
        return self.device_mesh["tp"].size()

    @property
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

    @property
    def pp_rank(self) -> int:
        """This process's index along the pipeline axis."""
        return self.device_mesh["pp"].get_local_rank()

    @property
    def pp_group(self) -> dist.ProcessGroup:
        """Process group of the pipeline axis."""
        return self.device_mesh["pp"].get_group()

    @property
    def model_mesh(self) -> DeviceMesh:
        """The ranks that hold one copy of the model: pp x tp as one axis."""
        return self.device_mesh["tp"] if self.pp_tp_mesh is None else self.pp_tp_mesh

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

    def sum_over_dp(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a small tensor over the data-parallel axis (all-reduce); returns a new tensor."""
        total = values.clone()
        if self.dp_size > 1:
            dist.all_reduce(total, group=self.dp_group)
        return total


def build_mesh(
    device_type: str,
    *,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    context_parallel_size: int = 1,
) -> ParallelMesh:
    """Build the mesh over all processes of the initialised default group.

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
    device_mesh = init_device_mesh(device_type, shape, mesh_dim_names=AXES)
    both = device_mesh["pp", "tp"]._flatten("pp_tp") if pipeline_parallel_size > 1 else None
    return ParallelMesh(device_mesh, both)
