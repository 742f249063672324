"""Nightly job: histories to date and the policy -> tonight's blocklists, published.

    ray job submit --working-dir . -- python jobs/nightly.py --config examples/kuairand/cluster.toml

Run again after being killed, it generates only the users that are missing.
"""

import sys
from pathlib import Path

# The checkout instead of this folder: the cluster's image need not have the package installed, and no library that
# asks for a module named as a job finds one of these.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from conrec.cli import main  # noqa: E402

if __name__ == "__main__":
    main(["nightly", *sys.argv[1:]])
