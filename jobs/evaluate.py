"""Evaluation job: the policy beside the floors -> metrics.json and report.html.

    ray job submit --working-dir . -- python jobs/evaluate.py --config examples/kuairand/cluster.toml

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
