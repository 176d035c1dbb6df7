"""The model-parallel unit that DeepSpeed asks questions of, answered by our mesh."""

from __future__ import annotations

import torch.distributed as dist

from megascale.parallel.mesh import ParallelMesh


class Mpu:
    """DeepSpeed's view of a ParallelMesh; the method names are DeepSpeed's.

    Its model-parallel group (over which the gradient norm is summed) spans all axes that cut the
    model.
    """

    def __init__(self, mesh: ParallelMesh) -> None:
        self._mesh = mesh

    def get_data_parallel_rank(self) -> int:
        """Rank along dp x cp: replicas of the weights."""
        return self._mesh.data_rank

    def get_data_parallel_world_size(self) -> int:
        """Size of dp x cp."""
        return self._mesh.data_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Group of dp x cp."""
        return self._mesh.data_group

    def get_model_parallel_rank(self) -> int:
        """Rank among pp x tp."""
        return self._mesh.model_mesh.get_local_rank()

    def get_model_parallel_world_size(self) -> int:
        """Size of pp x tp."""
        return self._mesh.model_mesh.size()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Group of pp x tp."""
        return self._mesh.model_mesh.get_group()

    def get_tensor_model_parallel_rank(self) -> int:
        """Rank along tp."""
        return self._mesh.tp_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        """Size of tp."""
        return self._mesh.tp_size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """Group of tp."""
        return self._mesh.tp_group

    def get_pipeline_model_parallel_rank(self) -> int:
        """Rank along pp."""
        return self._mesh.pp_rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Size of pp."""
        return self._mesh.pp_size

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        """Group of pp."""
        return self._mesh.pp_group
