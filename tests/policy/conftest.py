"""Where Ray is not installed, as on a machine lent for its GPU alone, the trainings under Ray are not collected."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("ray") else ["test_workers.py"]
