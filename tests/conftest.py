"""What all tests share."""

from hypothesis import settings

# A deadline of milliseconds would fail on a machine that is busy.
settings.register_profile("conrec", deadline=None)
settings.load_profile("conrec")
