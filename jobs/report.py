"""Entrypoint for a Ray cluster: `ray job submit --working-dir . -- python jobs/report.py RUN --output FILE`.

Takes the arguments of `birbal report`. The folder must be on storage that the head node sees. Starts
no Ray of its own: reading the steps' tables and drawing takes seconds on one core.
"""

from __future__ import annotations

import sys

from birbal_ray.cli.main import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
