"""Catalogue stage: items (and behaviour before the cut) -> embeddings -> semantic IDs, codebook, quality."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from conrec import storage
from conrec.artefact import Artefact
from conrec.catalogue.embeddings import behaviour_embeddings, column_embeddings, combine, text_embeddings
from conrec.catalogue.quality import catalogue_quality
from conrec.catalogue.quantizer import fit_codebook
from conrec.config import Config
from conrec.feedback.labels import read_items
from conrec.progress import warn
from conrec.ragged import Ragged
from conrec.stages.inputs import read_events


def make_catalogue(config: Config, artefact: Artefact) -> dict[str, Any]:
    """Leaves items.parquet, codebook.safetensors and quality.json; returns the figures of the last."""
    items = read_items(config.items)
    embeddings = item_embeddings(config, items)
    codebook = fit_codebook(embeddings, config.quantizer, config.seed)
    semantic_ids = codebook.encode(embeddings)
    categories = items["category"] if "category" in items.column_names else None
    quality = catalogue_quality(embeddings, semantic_ids, codebook, config.quantizer, config.seed, categories)
    for warning in quality["warnings"]:
        warn(warning)
    column = Ragged.from_lengths(semantic_ids.ravel(), np.full(len(semantic_ids), semantic_ids.shape[1])).to_arrow()
    storage.write_table(items.append_column("semantic_id", column), artefact.path("items.parquet"))
    codebook.save(artefact.path("codebook.safetensors"))
    storage.write_json(artefact.path("quality.json"), quality)
    return quality


def item_embeddings(config: Config, items: pa.Table) -> np.ndarray:
    """Embeddings of the configured sources, normalised and concatenated. Shape: (I, D) float32."""
    parts = []
    for source in config.embedding.sources:
        if source == "text":
            parts.append(text_embeddings(items[config.embedding.text], config.embedding))
        elif source == "column":
            parts.append(column_embeddings(items))
        else:
            events = read_events(config, items["item_id"].combine_chunks()).before(config.timeline.cut_us)
            parts.append(behaviour_embeddings(events, items.num_rows, config.embedding.behaviour_dim, config.seed))
    return combine(parts, config.embedding.weights)
