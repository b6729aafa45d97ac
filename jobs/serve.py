"""Entrypoint for a Ray cluster: `ray job submit --working-dir . -- python jobs/serve.py --run DIR --host 0.0.0.0 …`.

Takes the options of `birbal serve`. Give the job its card with `ray job submit --entrypoint-num-gpus 1`; it runs
where Ray places it, and what it serves is counted in Ray's metrics.
"""

from __future__ import annotations

import sys

from birbal_ray.cli.main import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
