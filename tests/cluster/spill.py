"""Run as a program: more objects than Ray's memory for them holds."""

import time

import numpy as np
import ray

from influencespace.engine.session import start_ray


def write() -> None:
    print("what a worker writes", flush=True)


def main() -> None:
    with start_ray(num_cpus=2):
        ray.get(ray.remote(write).remote())
        kept = [ray.put(np.ones(20 * 2**20, np.uint8)) for _ in range(8)]
        time.sleep(8)  # lines come within a second or two
        del kept


if __name__ == "__main__":
    main()
