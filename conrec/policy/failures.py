"""Which failures of a training are tried again: all but those over a setting.

A step draws the same whenever it is taken: a training that has diverged diverges in that step again, and no other try
finds the GPU that a node lacks. Ray Train counts every exception of a worker as worth `train.max_failures` tries.

A file of its own: Ray Train's controller reads the class from here, and needs nothing else of the training for it.
"""

from __future__ import annotations

from ray.train import TrainingFailedError
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy

from conrec.errors import ConfigError


class FailurePolicy(DefaultFailurePolicy):
    """Tries again as Ray Train does, up to its `FailureConfig`, unless a worker raised `ConfigError`."""

    def _is_retryable_error(self, training_failed_error: TrainingFailedError) -> bool:
        failures = getattr(training_failed_error, "worker_failures", {}).values()
        if any(isinstance(failure, ConfigError) for failure in failures):
            return False
        return bool(super()._is_retryable_error(training_failed_error))
