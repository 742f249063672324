"""The project's own errors: each message names the value, the limit and the remedy."""

REST = frozenset(
    (
        *("torch", "transformers", "tokenizers", "peft", "ray", "vllm", "faiss", "scipy", "matplotlib", "lightgbm"),
        *("einops", "vector_quantize_pytorch"),
    )
)
"""Modules that an installation without extras leaves out, since serving needs none of them: jobs do."""


class ConrecError(Exception):
    """Base of every error that a user can mend; the command line prints it without a traceback."""


class ConfigError(ConrecError):
    """A setting is unknown, of the wrong type, or impossible beside another."""


class DataError(ConrecError):
    """An input table breaks its schema."""


class TooLittleDataError(DataError):
    """The log holds too little for these settings: nothing to train on, to decide by, or to measure."""


class ArtefactError(ConrecError):
    """An artefact of an earlier stage is missing, incomplete or does not belong to the others."""


class AuditError(ConrecError):
    """A blocklist version failed its audit and was not published."""


class PublishError(ConrecError):
    """Another publisher was first, the watermark would go back, or the store failed; readers are not affected."""


class MissingDependencyError(ConrecError):
    """A library of an extra is not installed."""

    @classmethod
    def of(cls, module: str, why: object = "it is not installed") -> "MissingDependencyError":
        """For a module of REST."""
        return cls(
            f"{module}: {why}; in a checkout, make .venv/complete installs all of it for CPUs, and where there is a "
            "GPU pip install --no-deps -r requirements/gpu.txt"
        )


class StorageError(ConrecError, OSError):
    """A store is out of reach, refuses, lacks its credentials or its driver, or cannot do what publishing needs."""


class ClusterError(ConrecError):
    """Ray cannot be joined or started, or the cluster has not what the settings ask for."""
