"""What more than one stage reads: the interactions, and the catalogue that the first stage left."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from conrec import storage
from conrec.artefact import Artefact, plan
from conrec.catalogue.codebook import Codebook
from conrec.catalogue.trie import Trie
from conrec.config import Config
from conrec.evaluation.metrics import ranked_items as ranked_items
from conrec.evaluation.metrics import scored_items as scored_items
from conrec.feedback.anchors import REJECTED, Anchors, Events, encode_events
from conrec.feedback.labels import DROPPED, read_interactions
from conrec.progress import console
from conrec.ragged import Ragged, ranges

SCORING = ("contrast", "rejection_odds", "freshness", "freshness_days", "exposure", "prior_ids")
"""Settings of `generate` that decide how generated IDs are ranked."""

SHARE_PRIOR = 0.3
"""Rejections added to every item before an ID's are shared among its items."""

digest = functools.lru_cache(maxsize=4)(storage.sha256)
"""SHA-256 of an input table, read once a run."""


def input_digests(config: Config) -> dict[str, str]:
    """Name -> digest of the two input tables."""
    return {"interactions": digest(config.interactions.path), "items": digest(config.items.path)}


def catalogue_artefact(config: Config) -> Artefact:
    """The artefact of the catalogue stage for these settings."""
    settings = config.model_dump(mode="json", include={"embedding", "quantizer", "seed"})
    inputs = input_digests(config)
    if "behaviour" in config.embedding.sources:
        settings["cut"] = config.timeline.cut.isoformat()
        settings["interactions"] = config.interactions.model_dump(mode="json")
    else:
        del inputs["interactions"]
    return plan(config.root, "catalogue", settings, inputs)


def supervised_artefact(config: Config, refit: bool = False) -> Artefact:
    """What the supervised half of the train stage leaves; runs that differ in GRPO alone share it.

    `refit`: trained on everything until the cut, the events kept for validation included.
    """
    sections = {"seed", "interactions", "timeline", "model", "lora", "prompt", "supervised"}
    settings = config.model_dump(mode="json", include=sections)
    settings["train"] = {"workers": config.train.workers}
    if refit:
        settings["refit"] = True
    inputs = {"interactions": input_digests(config)["interactions"]}
    return plan(config.root, "supervised", settings, inputs | {"catalogue": catalogue_artefact(config).version})


def validated_artefact(config: Config) -> Artefact:
    """The policy that has not seen the validation anchors: it decides over the stages of GRPO, and over theta."""
    settings = config.model_dump(mode="json", include={"swing", "grpo"})
    settings["generate"] = config.generate.model_dump(mode="json", include={"beam_width"})
    inputs = {"supervised": supervised_artefact(config).version, "catalogue": catalogue_artefact(config).version}
    return plan(config.root, "validated", settings, inputs)


def train_artefact(config: Config) -> Artefact:
    """The artefact of the train stage for these settings: the policy that is served."""
    settings = config.model_dump(mode="json", include={"swing", "grpo"})
    inputs = {"supervised": supervised_artefact(config, refit=True).version}
    if config.grpo.stages:
        inputs["validated"] = validated_artefact(config).version
    return plan(config.root, "policy", settings, inputs | {"catalogue": catalogue_artefact(config).version})


def blocklists_url(config: Config) -> str:
    """Folder that readers open."""
    return storage.join(config.root, "blocklists")


@dataclass(frozen=True)
class Catalogue:
    """The finished catalogue. Shape: items I rows; trie of their semantic IDs."""

    items: pa.Table
    semantic_ids: np.ndarray
    codebook: Codebook
    trie: Trie

    @classmethod
    def load(cls, config: Config) -> Catalogue:
        """Reads the artefact. Raises `ArtefactError` where the stage has not finished."""
        artefact = catalogue_artefact(config)
        artefact.require()
        items = storage.read_table(artefact.path("items.parquet"))
        semantic_ids = Ragged.from_arrow(items["semantic_id"]).values.reshape(items.num_rows, -1)
        codebook = Codebook.load(artefact.path("codebook.safetensors"))
        return cls(items, semantic_ids, codebook, Trie.build(semantic_ids, codebook.codes))

    @property
    def item_ids(self) -> pa.Array:
        """Shape: (I,) string, ascending."""
        return self.items["item_id"].combine_chunks()

    @property
    def categories(self) -> np.ndarray | None:
        """Category number of each item (I,), or None where the catalogue has no categories."""
        if "category" not in self.items.column_names:
            return None
        column = self.items["category"].combine_chunks().fill_null("")
        return np.asarray(column.dictionary_encode().indices).astype(np.int64)


def read_events(config: Config, item_ids: pa.Array) -> Events:
    """The interactions as arrays; says how many lay ahead of now, or named items that the catalogue lacks."""
    interactions = read_interactions(config.interactions)
    dropped = int(interactions.schema.metadata[DROPPED])
    if dropped:
        console.print(
            f"  {dropped:,} interactions lie ahead of now (interactions.max_clock_skew_hours) and are left out"
        )
    events, unknown = encode_events(interactions, item_ids, config.interactions.max_unknown_item_share)
    if unknown:
        console.print(f"  {unknown:,} of {interactions.num_rows:,} interactions name items that the catalogue lacks")
    return events


def history_items(events: Events, anchors: Anchors) -> Ragged:
    """Item rows of each anchor's history."""
    lengths = anchors.ends - anchors.starts
    return Ragged.from_lengths(events.items[ranges(anchors.starts, lengths)], lengths)


def rejections_in_history(events: Events, anchors: Anchors) -> np.ndarray:
    """Rejections up to each anchor. Shape: (A,) int64."""
    upto = np.concatenate(([0], np.cumsum(events.kinds == REJECTED)))
    return upto[anchors.ends] - upto[anchors.starts]


def rejecting_users(events: Events, item_count: int) -> np.ndarray:
    """How many users rejected each item. Shape: (I,) int64."""
    rejected = events.kinds == REJECTED
    pairs = np.unique(events.rows[rejected].astype(np.int64) * item_count + events.items[rejected])
    return np.bincount(pairs % item_count, minlength=item_count)


def leaf_items_by_rejections(trie: Trie, events: Events) -> Ragged:
    """Items of each leaf, the most rejected first: a semantic ID shared by several items names that one first."""
    rejections = rejecting_users(events, len(trie.item_leaves))
    items = trie.leaf_items
    order = np.lexsort((-rejections[items.values], items.rows))
    return Ragged(items.values[order], items.offsets)


def item_shares(trie: Trie, events: Events) -> np.ndarray:
    """log of the share that each item has in the rejections of its semantic ID. Shape: (I,) float32."""
    rejections = rejecting_users(events, len(trie.item_leaves)) + SHARE_PRIOR
    return np.log(rejections / np.bincount(trie.item_leaves, rejections)[trie.item_leaves]).astype(np.float32)


def without_padding(leaves: np.ndarray) -> Ragged:
    """Dense generated leaves (A, K), -1 for none, as rows without the padding."""
    real = leaves >= 0
    return Ragged.from_lengths(leaves[real], real.sum(axis=1))
