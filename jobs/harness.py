"""Entrypoint for a Ray cluster: `ray job submit --working-dir . -- python jobs/harness.py --model NAME --output DIR`.

Takes the options of `birbal harness`. The output folder must be on storage that outlives the node;
give the job a GPU with `ray job submit --entrypoint-num-gpus 1`.
"""

from __future__ import annotations

import sys

from birbal_ray.cli.main import main

if __name__ == "__main__":
    main(["harness", *sys.argv[1:]])
