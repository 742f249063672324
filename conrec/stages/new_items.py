"""Items that a catalogue was not fitted on: encoded once with its frozen codebook, remembered, and added.

    catalogue = load_catalogue(run, until_us)      # what training and evaluation read
    catalogue, figures = tonights_catalogue(run)   # what the night reads: live are the items of today

An item keeps the semantic ID that it got first, also after it disappeared: histories name it. A new item has no
behaviour yet, so that its other embeddings place it. Invariant: `<root>/items/<catalogue>/` holds every item that was
ever encoded after the fit, in files named by their content, so that nights which race or run again write the same.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from conrec import storage
from conrec.catalogue.codebook import Codebook
from conrec.catalogue.items import Catalogue, Items, semantic_id_column
from conrec.catalogue.quality import reconstruction_cosines
from conrec.feedback.content import items_content
from conrec.progress import console, warn
from conrec.stages.artefacts import Artefacts
from conrec.stages.catalogue import item_embeddings, require_columns
from conrec.stages.sources import ITEM_COLUMNS

COLUMNS = ("item_id", *ITEM_COLUMNS, "semantic_id")
"""What is read of a catalogue's items."""


def load_catalogue(run: Artefacts, until_us: int | None = None) -> Catalogue:
    """The items that the catalogue was fitted on, and those new ones that somebody met until a moment (the cut).

    Raises `ArtefactError` where the catalogue stage has not finished.
    """
    fitted, codebook = _fitted(run)
    time_us = run.config.timeline.cut_us if until_us is None else until_us
    version = run["catalogue"].version
    seen = run.sources.seen(fitted["item_id"].combine_chunks(), version, time_us)["item_id"]
    if not len(seen):
        return Catalogue.of(fitted, codebook)
    added = _added(run, fitted, codebook)
    met = added.filter(pc.is_in(added["item_id"], value_set=seen.combine_chunks()))
    return Catalogue.of(_together(fitted, met), codebook)


def known_items(run: Artefacts, until_us: int) -> Items:
    """The items of `load_catalogue`, without their semantic IDs: nothing is encoded.

    Where no catalogue is fitted yet, those that it would be fitted on: the items of today.
    """
    if run["catalogue"].read() is None:
        return Items(run.sources.items)
    fitted = storage.read_table(run["catalogue"].path("items.parquet"))
    seen = run.sources.seen(fitted["item_id"].combine_chunks(), run["catalogue"].version, until_us)
    described = fitted.select([name for name in ("item_id", *ITEM_COLUMNS) if name in fitted.column_names])
    return Items(pa.concat_tables([described, seen], promote_options="permissive").sort_by("item_id"))


def tonights_catalogue(run: Artefacts) -> tuple[Catalogue, dict[str, Any]]:
    """All items that were ever known, live those of today, and what the manifest says of them.

    Warns where so many are new, or fit the codebook so badly, that another one should be fitted.
    """
    fitted, codebook = _fitted(run)
    added = _added(run, fitted, codebook)
    today = run.sources.items["item_id"]
    catalogue = Catalogue.of(_together(fitted, added), codebook, today)
    new = added.filter(pc.is_in(added["item_id"], value_set=today.combine_chunks()))
    figures = {
        "live": int(catalogue.live.sum()),
        "new": len(new),
        "removed": int((~catalogue.live).sum()),
        "new_reconstruction_cosine": pc.mean(new["reconstruction_cosine"]).as_py(),
        "fitted_reconstruction_cosine": run["catalogue"].require()["figures"].get("reconstruction_cosine"),
    }
    if figures["new"] or figures["removed"]:
        console.print(
            f"  {figures['live']:,} items: {figures['new']:,} that the catalogue was not fitted on, "
            f"{figures['removed']:,} have disappeared"
        )
    for line in advice(run, figures):
        warn(line)
    return catalogue, figures


def advice(run: Artefacts, figures: dict[str, Any]) -> list[str]:
    """Why another catalogue should be fitted; empty while the codebook fits."""
    limits, reasons = run.config.catalogue, []
    share = figures["new"] / figures["live"]
    if share > limits.max_new_share:
        reasons.append(f"{share:.0%} of the items are new (catalogue.max_new_share = {limits.max_new_share:g})")
    new, fitted = figures["new_reconstruction_cosine"], figures["fitted_reconstruction_cosine"]
    if new is not None and fitted is not None and fitted - new > limits.max_reconstruction_loss:
        reasons.append(
            f"new items have a reconstruction cosine of {new:.2f}, those that it was fitted on {fitted:.2f} "
            f"(catalogue.max_reconstruction_loss = {limits.max_reconstruction_loss:g})"
        )
    return [
        f"catalogue {run['catalogue'].version}: {reason}: run conrec catalogue --refit, then conrec train"
        for reason in reasons
    ]


def _fitted(run: Artefacts) -> tuple[pa.Table, Codebook]:
    artefact = run["catalogue"]
    artefact.require()
    items = storage.read_table(artefact.path("items.parquet"))
    return _plain(items), Codebook.load(artefact.path("codebook.safetensors"))


def _added(run: Artefacts, fitted: pa.Table, codebook: Codebook) -> pa.Table:
    """Every item encoded after the fit, those of today that nobody had encoded among them."""
    version = run["catalogue"].version
    known = run.sources.added(version)
    lacking = run.sources.lacking(fitted["item_id"].combine_chunks(), version)["item_id"]
    if known is not None:
        lacking = lacking.filter(pc.invert(pc.is_in(lacking, value_set=known["item_id"].combine_chunks())))
    if len(lacking):
        items = run.sources.items
        encoded = encode(run, items.filter(pc.is_in(items["item_id"], value_set=lacking.combine_chunks())), codebook)
        name = f"{items_content(encoded, *ITEM_COLUMNS).digest}.parquet"
        storage.write_table(encoded, storage.join(run.sources.added_url(version), name))
        known = run.sources.added(version)
    if known is None:
        return fitted.slice(0, 0).append_column("reconstruction_cosine", pa.array([], pa.float64()))
    # A catalogue that was refitted in its own place may have been fitted on some of them.
    return known.filter(pc.invert(pc.is_in(known["item_id"], value_set=fitted["item_id"].combine_chunks())))


def encode(run: Artefacts, items: pa.Table, codebook: Codebook) -> pa.Table:
    """Rows of the items table with their semantic IDs and how well the codebook reconstructs them."""
    require_columns(run.config, items)
    embeddings = item_embeddings(run.config, items, fitted=False)
    semantic_ids = codebook.encode(embeddings)
    table = _plain(items.append_column("semantic_id", semantic_id_column(semantic_ids)))
    cosines = reconstruction_cosines(codebook, embeddings, semantic_ids)
    return table.append_column("reconstruction_cosine", pa.array(cosines, from_pandas=True))


def _plain(items: pa.Table) -> pa.Table:
    return items.select([name for name in COLUMNS if name in items.column_names])


def _together(fitted: pa.Table, added: pa.Table) -> pa.Table:
    return pa.concat_tables([fitted, _plain(added)], promote_options="permissive")
