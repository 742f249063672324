"""theta of a policy, as its own artefact: another way of scoring IDs calibrates again and trains nothing."""

from __future__ import annotations

import time

from conrec import storage
from conrec.artefact import Artefact, plan
from conrec.blocklist.calibrate import Calibration, at_best, calibrate
from conrec.blocklist.generate import TorchEngine, rank
from conrec.blocklist.prior import Prior
from conrec.blocklist.resolve import largest_similarities, leaf_vectors
from conrec.config import Config
from conrec.feedback.anchors import targets, validation_anchors
from conrec.feedback.enough import measured_likes
from conrec.policy.prompts import build_prompts
from conrec.progress import progress
from conrec.ragged import Ragged
from conrec.stages.inputs import (
    SCORING,
    Catalogue,
    catalogue_artefact,
    input_digests,
    read_events,
    rejections_in_history,
    validated_artefact,
    without_padding,
)
from conrec.stages.train import liked_leaves, validated


def calibration_artefact(config: Config) -> Artefact:
    """The artefact of the calibration for these settings."""
    settings = config.model_dump(mode="json", include={"calibration", "timeline", "prompt"})
    settings["generate"] = config.generate.model_dump(mode="json", include={"k", "beam_width", *SCORING})
    inputs = {"policy": validated_artefact(config).version, "catalogue": catalogue_artefact(config).version}
    return plan(config.root, "calibration", settings, inputs | {"interactions": input_digests(config)["interactions"]})


def calibration(config: Config) -> Calibration:
    """theta for what these settings serve, read or made from the validation anchors. The policy must be trained."""
    artefact = calibration_artefact(config)
    if artefact.read() is None:
        began = time.perf_counter()
        made = _calibrate(config)
        storage.write_json(artefact.path("calibration.json"), made.to_json())
        artefact.finish({"theta": made.overall.theta}, time.perf_counter() - began)
    return Calibration.from_json(storage.read_json(artefact.path("calibration.json")))


def _calibrate(config: Config) -> Calibration:
    catalogue = Catalogue.load(config)
    events = read_events(config, catalogue.item_ids)
    anchors = validation_anchors(events, config.timeline)
    rejections = rejections_in_history(events, anchors)
    best = at_best(rejections, measured_likes(events, anchors), config.calibration)
    if best.overall.theta is None:
        # No policy need be trained, and nothing generated, to know that.
        return best
    # The policy that is served has seen the validation anchors; theta is taken from its twin that has not.
    validated(config)
    with storage.local_folder(validated_artefact(config).path("checkpoint")) as folder:
        engine = TorchEngine.load(folder, catalogue.trie)
    with progress("  calibrating theta"):
        prompts = build_prompts(events, anchors, catalogue.semantic_ids, engine.vocabulary, config.prompt)
        liked = liked_leaves(catalogue, events, anchors)
        prior = Prior.at(events, config.timeline.validation_us, catalogue.trie, config.generate)
        leaves, _ = rank(engine, prompts, liked, catalogue.trie, prior, config.generate, engine.vocabulary)
        positives = targets(events, anchors).future_positives
        vectors = leaf_vectors(catalogue.codebook, catalogue.trie)
        similarities, _ = largest_similarities(without_padding(leaves), positives, catalogue.trie, vectors)
    return calibrate(Ragged(similarities, positives.offsets), rejections, config.calibration)
