"""Training job: interactions before the cut -> the policy, on the training nodes.

    ray job submit --working-dir . -- python jobs/train.py --config examples/kuairand/cluster.toml

Run again after being killed, it goes on from the last checkpoint.
"""

import sys
from pathlib import Path

# The checkout instead of this folder: the cluster's image need not have the package installed, and no library that
# asks for a module named as a job finds one of these.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from conrec.cli import main  # noqa: E402

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
