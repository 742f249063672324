"""How strongly a row still acts: it blocks, then demotes by less and less, then ends.

    multiplier(now_us, demotes_us, expires_us)      # what a ranking multiplies the item's score by

Needs numpy only, since serving asks it.
"""

from __future__ import annotations

import numpy as np


def multiplier(now_us: int, demotes_us: np.ndarray, expires_us: np.ndarray) -> np.ndarray:
    """0 while a row blocks, then (now - demotes) / (expires - demotes), and 1 from its expiry on.

    Shape: demotes_us and expires_us (N,) int64 microseconds -> (N,) float64 in [0, 1]. A row whose demotion begins as
    it expires goes from 0 to 1 at once.
    """
    lasts = np.maximum(expires_us - demotes_us, 1)
    risen = np.clip((now_us - demotes_us) / lasts, 0.0, 1.0)
    return np.where(now_us >= expires_us, 1.0, risen)
