"""The four stages of a run, wired from the rooms below: catalogue -> train -> evaluate, nightly.

Every stage reads artefacts and writes one. A stage that finds its artefact complete, made of the same inputs and
settings, says so and returns; one that was killed goes on where it can and starts over where it must.
"""
