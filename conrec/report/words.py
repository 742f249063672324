"""What the columns of a score, its odds and its promises are called where people read them.

column_words("user x category")     # "what the user said of other items of its category"
odds_words(1.4)                     # "4.1 to 1 that it is rejected"
"""

from __future__ import annotations

import math

_COLUMNS = {
    "rejected": "share of those who met it who reject it",
    "liked": "share of those who met it who like it",
    "shown": "how many met it",
    "fresh": "how much more it is shown lately",
    "leaning": "how readily the user rejects",
    "events": "how long the user's history is",
    "excess": "how far the user rejects beyond what others reject of the same items",
    "expected": "how likely the user meets it, by what they met",
    "log_prob": "how readily the policy generates its semantic ID",
    "verdict": "whether the policy says rejected or liked of it",
    "user x prefix": "what the user said of items with the same first code",
}
_CROSSED = "user x "
_MOST = 99


def column_words(name: str) -> str:
    """A column in words; one that is not known by name is an attribute of the items, alone or of the user there."""
    if name in _COLUMNS:
        return _COLUMNS[name]
    if name.startswith(_CROSSED):
        return f"what the user said of other items of its {name.removeprefix(_CROSSED)}"
    return f"how its {name} is taken by all users"


def odds_words(log_odds: float) -> str:
    """log odds of a rejection against a like, as a bet."""
    # Through the logarithm, since odds of e^1000 are no number.
    odds = math.exp(min(abs(log_odds), 20.0))
    if odds < 1.05:
        return "as likely rejected as liked"
    said = f"more than {_MOST}" if odds > _MOST else f"{odds:.0f}" if odds >= 9.95 else f"{odds:.1f}".removesuffix(".0")
    return f"{said} to 1 that it is {'rejected' if log_odds > 0 else 'liked'}"


def alpha_words(alpha: str | float) -> str:
    """`alpha .05`."""
    return f"alpha {float(alpha):g}".replace("0.", ".", 1)
