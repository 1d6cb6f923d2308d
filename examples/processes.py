"""rebalance with one process per GPU. Start all of them with one command, here two:

    seq 0 1 | xargs -P 2 -I{} python examples/processes.py localhost:12345 2 {}

Under Slurm or Open MPI JAX finds out by itself who is who, and it is

    srun python examples/processes.py        # or mpirun

On GPUs of one host the counts go by NVSHMEM (pip install nvidia-nvshmem-cu13); without GPUs, or
without NVSHMEM, by lax.all_gather.
"""

import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lplb_jax import init_comm, place_experts, rebalance, topologies

N_LOGICAL, N_TOKENS = 64, 4096


def main() -> None:
    if len(sys.argv) > 1:
        coordinator, n_processes, process = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
        jax.distributed.initialize(coordinator, n_processes, process, local_device_ids=[process])
    else:
        jax.distributed.initialize()

    mesh = Mesh(np.array(jax.devices()), "ep")
    size = mesh.devices.size
    ring = topologies.ring(size)
    placement = place_experts(
        None, ring, n_logical=N_LOGICAL, ep_size=size, redundants_per_rank=N_LOGICAL // size
    )
    rng = np.random.default_rng(0)
    chosen = (rng.zipf(1.4, (size, N_TOKENS)) % N_LOGICAL).astype(np.int32)
    indices = jax.make_array_from_callback(
        chosen.shape, NamedSharding(mesh, P("ep")), lambda index: chosen[index]
    )

    with init_comm(mesh, "ep", max_experts=N_LOGICAL) as comm:

        @jax.jit
        @jax.shard_map(mesh=mesh, in_specs=P("ep"), out_specs=(P("ep"), P()))
        def route(indices):
            return rebalance(indices, None, ring, placement=placement, axis_name="ep", comm=comm)

        _, split = route(indices)
        if jax.process_index() == 0:
            busiest, bound = (int(array[0]) for array in (split.max_load, split.lower_bound))
            print(f"{size} ranks, counts by {comm.transport}: busiest {busiest}, bound {bound}")


if __name__ == "__main__":
    main()
