"""Run as a program: a task that never ends on a Ray of its own; prints the ids of Ray's processes."""

import json
import sys
import time

from influencespace.engine.attempts import run_task
from influencespace.engine.session import start_ray


def sleep() -> None:
    time.sleep(600)


def main() -> None:
    with start_ray(num_cpus=2) as engine:
        from ray._private import worker

        processes = worker._global_node.live_processes()
        print(json.dumps({kind: process.pid for kind, process in processes}), flush=True)
        list(engine.map(run_task, [sleep]))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
