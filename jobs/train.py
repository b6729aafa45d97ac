"""Entrypoint for a Ray cluster: `ray job submit --working-dir . -- python jobs/train.py --mix DIR --output DIR`.

Takes the options of `birbal train`. The folders must be on storage that every node sees. Inside a job
it joins the job's cluster; run by hand without RAY_ADDRESS it starts a local one for its own time.
"""

from __future__ import annotations

import sys

from birbal_ray.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
