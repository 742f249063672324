"""Blocking items that are newer than the catalogue: they are matched against the published rules.

    reader = RulesReader("/var/lib/conrec", "s3://bucket/run/catalogue/<version>/codebook.safetensors")
    reader.match("alice", embeddings=new_items)            # or semantic_ids=codebook.encode(new_items)

A rule is a semantic ID whose score for a user passed the user's threshold: a new item that gets this ID is blocked.
Invariant: the score of a rule is the one that an item of the catalogue with this ID has while nobody met it, given the
category of the ID's first item. For items of the catalogue ask `BlocklistReader`: what was met of them counts there.

Needs safetensors beside what the other reader needs, for the codebook.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa

from conrec import storage
from conrec.catalogue.codebook import Codebook, parse_semantic_ids
from conrec.errors import ArtefactError, DataError
from conrec.serving.demotion import multiplier
from conrec.serving.pinned import Pinned, PinnedReader
from conrec.serving.versions import Pointer


class RulesReader(PinnedReader):
    """The rules of the version that `pointer` names, from a store or a mirror, beside the codebook of its catalogue.

    `version` and `shard` are as for `BlocklistReader`.
    Raises `ArtefactError` as that does, and when the version was made with another codebook: after a new
    catalogue `refresh` raises and the reader goes on with the last good version, until one is opened with its codebook.
    """

    _shape = "rules"

    def __init__(
        self,
        root: str,
        codebook_url: str,
        pointer: Pointer = "current",
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        refresh_every: timedelta | None = None,
        *,
        version: str | None = None,
        shard: str | None = None,
    ) -> None:
        self._codebook_url = codebook_url
        self._codebook_sha256 = storage.sha256(codebook_url)
        self._codebook = Codebook.load(codebook_url)
        super().__init__(root, pointer, clock, refresh_every, version, shard)

    def match(
        self, user_id: str, *, semantic_ids: np.ndarray | None = None, embeddings: np.ndarray | None = None
    ) -> np.ndarray:
        """Which items are blocked for the user now; none for an unknown user.

        Shape: semantic_ids (C, L) integers, or embeddings (C, D) float as the catalogue's were; returns (C,) bool.
        Raises `DataError` when they do not fit the codebook.
        """
        _, caught = self._caught(user_id, self._codes(semantic_ids, embeddings), "demotes_at", self._now_us())
        return np.asarray(np.logical_or.reduce(caught, axis=0))

    def multipliers(
        self, user_id: str, *, semantic_ids: np.ndarray | None = None, embeddings: np.ndarray | None = None
    ) -> np.ndarray:
        """What to multiply the score of each item by: 0 while it is blocked, rising to 1 while the rules fade.

        Shape: as for `match`; returns (C,) float64.
        """
        now_us, items = self._now_us(), self._codes(semantic_ids, embeddings)
        terms, caught = self._caught(user_id, items, "expires_at", now_us)
        values = multiplier(now_us, terms["demotes_at"], terms["expires_at"])
        # The strongest of the rules that catch an item acts.
        return np.asarray(np.where(caught, values[:, None], 1.0).min(axis=0, initial=1.0))

    def _caught(
        self, user_id: str, items: np.ndarray, until: str, now_us: int
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Which of the user's rules whose time `until` is later than now catch which items, and their times.

        Shape: items (C, L); returns (R,) int64 microseconds by name, and (R, C) bool.
        """
        compiled = self._pinned.compiled
        arrays = compiled.arrays
        live = compiled.live(compiled.rows(user_id), until, now_us)
        terms = arrays["term"][live]
        times = {name: arrays[f"term_{name}"][terms] for name in ("demotes_at", "expires_at")}
        if not len(live) or not len(items):
            return times, np.zeros((len(live), len(items)), bool)
        texts = compiled.text("semantic_id").take(arrays["semantic_id"][live].tolist())
        rules = parse_semantic_ids(pa.array(texts, pa.string()), self._codebook.levels)
        return times, (rules[:, None] == items).all(axis=2)

    def _codes(self, semantic_ids: np.ndarray | None, embeddings: np.ndarray | None) -> np.ndarray:
        if (semantic_ids is None) == (embeddings is None):
            raise DataError("give the items either by semantic_ids or by embeddings")
        if embeddings is not None:
            return self._codebook.encode(np.asarray(embeddings))
        codes = np.asarray(semantic_ids)
        levels, size = self._codebook.levels, self._codebook.codes
        if codes.ndim != 2 or codes.shape[1] != levels or not np.issubdtype(codes.dtype, np.integer):
            raise DataError(f"semantic_ids have shape {codes.shape}, {codes.dtype}; give (items, {levels}) integers")
        if len(codes) and not 0 <= codes.min() <= codes.max() < size:
            raise DataError(f"semantic_ids lie in [{codes.min()}, {codes.max()}]; the codebook has codes [0, {size})")
        return codes.astype(np.int32)

    def _open(self, pinned: Pinned | None) -> Pinned:
        opened = super()._open(pinned)
        made_with = opened.about.get("codebook")
        if made_with != self._codebook_sha256:
            raise ArtefactError(
                f"version {opened.name} was made with the codebook of SHA-256 {made_with}, {self._codebook_url} has "
                f"{self._codebook_sha256}; open the rules with the codebook of its catalogue, "
                f"{opened.about.get('catalogue')}"
            )
        return opened
