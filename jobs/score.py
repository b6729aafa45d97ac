"""Entrypoint for a Ray cluster: `ray job submit --working-dir . -- python jobs/score.py --config FILE --output DIR`.

Takes the options of `birbal score`. Inside a job it joins the job's cluster; run by hand without
RAY_ADDRESS it starts a local one for its own time.
"""

from __future__ import annotations

import sys

from birbal_ray.cli.main import main

if __name__ == "__main__":
    main(["score", *sys.argv[1:]])
