"""Smoke test of a pod: every worker joins, counts the devices and takes part in one sum over all of them.

    python tpu_scripts/smoke.py --devices 16

Exit code 1 if the pod has another number of devices, if the workers have different numbers, or if the sum is wrong. A
worker that does not join within two minutes is an error. setup.sh runs it on all workers.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def total(devices):
    """The sum of 1, 2, …, n, one number per device: an all-reduce over every link."""
    mesh = Mesh(np.array(devices), ("all",))
    numbers = np.arange(1, len(devices) + 1, dtype=np.float32)
    placed = jax.make_array_from_callback(
        numbers.shape, NamedSharding(mesh, PartitionSpec("all")), lambda index: numbers[index]
    )
    return float(jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(placed))


def main() -> int:
    parser = argparse.ArgumentParser(description="Join the workers and count the devices of the pod.")
    parser.add_argument("--devices", type=int, help="how many the whole pod should have")
    wanted = parser.parse_args().devices
    jax.distributed.initialize(initialization_timeout=120)
    here, count, workers = jax.local_device_count(), jax.device_count(), jax.process_count()
    if jax.process_index() == 0:
        print(f"{count} devices ({jax.devices()[0].device_kind}) in {workers} workers", flush=True)
    print(f"worker {jax.process_index() + 1} of {workers}: {here} devices", flush=True)
    if wanted is not None and count != wanted:
        print(f"error: the pod should have {wanted} devices, this worker sees {count}", file=sys.stderr)
        return 1
    if here * workers != count:
        print(f"error: {here} devices here, {count} in {workers} workers: not the same on each", file=sys.stderr)
        return 1
    result, expected = total(jax.devices()), count * (count + 1) / 2
    if result != expected:
        print(f"error: the sum over all devices is {result}, it should be {expected}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
