"""conrec predicts what each user of a recommender will reject and publishes it as per-user blocklists.

    from conrec import BlocklistReader, ConrecError

The readers of serving and all errors are here. A reader is loaded when it is first asked for: `import conrec` alone
loads nothing but the errors.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from conrec.errors import (
    ArtefactError,
    AuditError,
    ClusterError,
    ConfigError,
    ConrecError,
    DataError,
    MissingDependencyError,
    PublishError,
    StorageError,
    TooLittleDataError,
)

__version__ = "0.1.0"

__all__ = [
    "ArtefactError",
    "AuditError",
    "BlockedItem",
    "BlocklistReader",
    "ClusterError",
    "ConfigError",
    "ConrecError",
    "DataError",
    "MissingDependencyError",
    "PublishError",
    "RulesReader",
    "StorageError",
    "TooLittleDataError",
]

if TYPE_CHECKING:
    from conrec.serving.reader import BlockedItem, BlocklistReader
    from conrec.serving.rules_reader import RulesReader
else:  # a type checker that saw this function would believe in every name
    _READERS = {
        "BlockedItem": "conrec.serving.reader",
        "BlocklistReader": "conrec.serving.reader",
        "RulesReader": "conrec.serving.rules_reader",
    }

    def __getattr__(name):
        if name not in _READERS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_READERS[name]), name)
