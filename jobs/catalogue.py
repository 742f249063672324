"""Catalogue job: items -> semantic IDs, codebook, quality figures.

    ray job submit --working-dir . -- python jobs/catalogue.py --config examples/kuairand/cluster.toml

Run again with the same items and settings, it finds its work done.
"""

import sys
from pathlib import Path

# The checkout instead of this folder: the cluster's image need not have the package installed, and no library that
# asks for a module named as a job finds one of these.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from conrec.cli import main  # noqa: E402

if __name__ == "__main__":
    main(["catalogue", *sys.argv[1:]])
