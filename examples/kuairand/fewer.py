"""Leaves the interactions of fewer users, for what two cores cannot train on all of them.

.venv/bin/python examples/kuairand/fewer.py 1500
.venv/bin/conrec run --config examples/kuairand/smollm2.toml --set interactions.path=runs/fewer.parquet
"""

import sys
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as parquet

from conrec.hashing import stable_hash

TARGET = Path("runs/fewer.parquet")


def main() -> None:
    """Keeps the users of the smallest hashes: the same ones every time, of a larger number all of a smaller one."""
    log = parquet.read_table(Path(__file__).parent / "interactions.parquet")
    users = pc.unique(log["user_id"])
    chosen = stable_hash(users).argsort()[: int(sys.argv[1])]
    TARGET.parent.mkdir(exist_ok=True)
    parquet.write_table(log.filter(pc.is_in(log["user_id"], value_set=users.take(chosen))), TARGET)


if __name__ == "__main__":
    main()
