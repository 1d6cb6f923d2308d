"""rebalance with one process per GPU. One command starts all of them, here two:

    seq 0 1 | xargs -P 2 -I{} python examples/processes.py localhost:12345 2 {}

Under Slurm or Open MPI, JAX detects the processes, and the command is

    srun python examples/processes.py        # or mpirun

On GPUs of one host, NVSHMEM exchanges the counts (pip install nvidia-nvshmem-cu13); without GPUs or
NVSHMEM, lax.all_gather does.
"""

import argparse

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lplb_jax import init_comm, place_experts, rebalance, topologies
from lplb_jax.cli import at_least

N_LOCAL, N_TOKENS = 32, 4096  # experts and tokens per rank


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("coordinator", nargs="?", help="host:port of process 0")
    parser.add_argument("n_processes", nargs="?", type=at_least(2))
    parser.add_argument("process", nargs="?", type=at_least(0), help="this one's number, from 0")
    options = parser.parse_args()
    if options.coordinator is None:
        jax.distributed.initialize()
    elif options.process is None:
        parser.error("coordinator, n_processes and process go together")
    elif options.process >= options.n_processes:
        parser.error(
            f"argument process: expected less than {options.n_processes} processes, got "
            f"{options.process}"
        )
    else:
        mine = [options.process]
        jax.distributed.initialize(*vars(options).values(), local_device_ids=mine)

    mesh = Mesh(np.array(jax.devices()), "ep")
    size = mesh.devices.size
    n_logical = N_LOCAL * size
    ring = topologies.ring(size)
    placement = place_experts(
        None, ring, n_logical=n_logical, ep_size=size, redundants_per_rank=N_LOCAL
    )
    rng = np.random.default_rng(0)
    chosen = (rng.zipf(1.4, (size, N_TOKENS)) % n_logical).astype(np.int32)
    indices = jax.make_array_from_callback(
        chosen.shape, NamedSharding(mesh, P("ep")), lambda index: chosen[index]
    )

    with init_comm(mesh, "ep", max_experts=n_logical) as comm:

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
