"""Evaluation job: the method beside what it must beat -> metrics.json, report.html and table.md.

    ray job submit --working-dir . -- python jobs/evaluate.py --config examples/kuairand/cluster.toml --systems all

It reads what the catalogue and training jobs left below the root.
"""

import sys
from pathlib import Path

# The checkout instead of this folder: the cluster's image need not have the package installed, and no library that
# asks for a module named as a job finds one of these.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from conrec.cli import main  # noqa: E402

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
