"""The tokens the language model learns: one per code, one per kind of event, and the marks of the tasks.

Invariant: the code tokens are one contiguous block of ids, level by level, so that a semantic ID and its
tokens differ by an addition. A saved tokenizer carries all of it: `Vocabulary.of` finds the ids by name.

    vocabulary = add_tokens(tokenizer, levels=3, codes=256)
    vocabulary.code_tokens(semantic_ids)                                           # (N, L) codes -> (N, L) tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from conrec.errors import ArtefactError

MARKS = ("<begin>", "<rejected>", "<liked>", "<shown>", "<item>", "<text>", "<choose>", "<end>")


@dataclass(frozen=True)
class Vocabulary:
    """Token ids. Code c of level l (both from 0) is `first_code_token + l * codes + c`."""

    levels: int
    codes: int
    first_code_token: int
    begin: int
    rejected: int
    liked: int
    shown: int
    item: int
    text: int
    choose: int
    end: int

    @classmethod
    def of(cls, tokenizer: Any, levels: int, codes: int) -> Vocabulary:
        """The ids in a tokenizer that has the tokens; `ArtefactError` if one is missing or out of place."""
        names = token_names(levels, codes)
        ids = np.array(tokenizer.convert_tokens_to_ids(names), dtype=object)
        unknown = tokenizer.unk_token_id
        for name, token in zip(names, ids, strict=True):
            if token is None or token == unknown:
                raise ArtefactError(
                    f"the tokenizer lacks {name}: this policy was trained for another catalogue; retrain"
                )
        first = int(ids[len(MARKS)])
        if not np.array_equal(ids[len(MARKS) :].astype(np.int64), first + np.arange(levels * codes)):
            raise ArtefactError("the code tokens of the tokenizer are not contiguous: retrain the policy")
        return cls(levels, codes, first, *(int(token) for token in ids[: len(MARKS)]))

    @property
    def kinds(self) -> np.ndarray:
        """Kind token of each feedback kind (0 negative, 1 positive, 2 neutral), shape (3,)."""
        return np.array([self.rejected, self.liked, self.shown], np.int32)

    def code_tokens(self, semantic_ids: np.ndarray) -> np.ndarray:
        """Tokens of semantic IDs. Shape: (..., L) codes -> (..., L) token ids."""
        return (semantic_ids + self.first_code_token + np.arange(self.levels) * self.codes).astype(np.int32)


def token_names(levels: int, codes: int) -> list[str]:
    """All new tokens in the order they are added: the marks, then `<a_0> ... <b_0> ...`."""
    return [*MARKS, *(f"<{chr(97 + level)}_{code}>" for level in range(levels) for code in range(codes))]


def add_tokens(tokenizer: Any, levels: int, codes: int) -> Vocabulary:
    """Adds the new tokens to a tokenizer and returns their ids."""
    tokenizer.add_tokens(token_names(levels, codes), special_tokens=True)
    return Vocabulary.of(tokenizer, levels, codes)
