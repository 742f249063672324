"""Catalogue stage: items (and behaviour before the cut) -> embeddings -> semantic IDs, codebook, quality."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from conrec import storage
from conrec.artefact import Artefact
from conrec.catalogue.embeddings import behaviour_embeddings, column_embeddings, combine, text_embeddings
from conrec.catalogue.items import semantic_id_column
from conrec.catalogue.quality import catalogue_quality
from conrec.catalogue.quantizer import fit_codebook
from conrec.config import Config
from conrec.errors import DataError
from conrec.progress import warn
from conrec.stages.artefacts import Artefacts
from conrec.stages.inputs import read_events


def make_catalogue(run: Artefacts, artefact: Artefact) -> dict[str, Any]:
    """Leaves items.parquet, codebook.safetensors and quality.json; returns the figures of the last.

    `read_until` says until when it read behaviour, if it did: no training whose cut lies before may use it.
    """
    config, items = run.config, run.sources.items
    require_columns(config, items)
    embeddings = item_embeddings(config, items)
    codebook = fit_codebook(embeddings, config.quantizer, config.seed)
    semantic_ids = codebook.encode(embeddings)
    categories = items["category"] if "category" in items.column_names else None
    quality = catalogue_quality(
        embeddings,
        semantic_ids,
        codebook,
        config.quantizer,
        config.seed,
        config.generate.min_similarity,
        categories,
    )
    for warning in quality["warnings"]:
        warn(warning)
    named = items.append_column("semantic_id", semantic_id_column(semantic_ids))
    storage.write_table(named, artefact.path("items.parquet"))
    codebook.save(artefact.path("codebook.safetensors"))
    storage.write_json(artefact.path("quality.json"), quality)
    read_until = config.timeline.cut.isoformat() if "behaviour" in config.embedding.sources else None
    return quality | {"read_until": read_until}


def require_columns(config: Config, items: pa.Table) -> None:
    """Before any text is encoded. Raises `DataError` for a column that `embedding` names and the items lack."""
    wanted = {"text": ("embedding.text", config.embedding.text), "column": ("embedding.sources", "embedding")}
    for source, (setting, column) in wanted.items():
        if source in config.embedding.sources and column not in items.column_names:
            raise DataError(
                f"{config.items.path}: column {column} is missing, which the setting {setting} asks for; the columns "
                f"are {', '.join(items.column_names)}. Add it, name the file's column in items.columns, or change "
                f"{setting}"
            )


def item_embeddings(config: Config, items: pa.Table, fitted: bool = True) -> np.ndarray:
    """Embeddings of the configured sources, normalised and concatenated. Shape: (I, D) float32.

    Items that are not to be fitted on have no behaviour: its vectors belong to the fit that made them.
    """
    parts = []
    for source in config.embedding.sources:
        if source == "text":
            parts.append(text_embeddings(items[config.embedding.text], config.embedding))
        elif source == "column":
            parts.append(column_embeddings(items))
        elif not fitted:
            parts.append(np.zeros((items.num_rows, config.embedding.behaviour_dim), np.float32))
        else:
            events = read_events(config, items["item_id"].combine_chunks(), config.timeline.cut_us)
            parts.append(behaviour_embeddings(events, items.num_rows, config.embedding.behaviour_dim, config.seed))
    return combine(parts, config.embedding.weights)
