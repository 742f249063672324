"""Wiring alone: artefacts in, one artefact out.

May import: base, feedback, catalogue, policy, serving, store, blocklist, evaluation, report.

    conrec run --config my.toml                 # catalogue -> train -> evaluate, nightly

Every stage reads artefacts and writes one. A stage that finds its artefact complete, made of the same inputs and
settings, says so and returns; one that was killed goes on where it can and starts over where it must. Read
artefacts.py (what decides each artefact), run.py, then the four stages: catalogue.py, train.py, evaluate.py,
nightly.py.
"""
