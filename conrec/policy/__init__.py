"""The model of dislike: vocabulary, prompts, training, constrained decoding.

May import: base, feedback, catalogue.

    conrec train --config my.toml

Read prompts.py (a history becomes tokens), tasks.py (what it learns first), grpo.py and rewards.py (what it is tuned
by), curriculum.py (on which samples), loop.py (in which order, resumable), learner.py and workers.py (on how many
machines), decoding.py (how semantic IDs come out of it, under the trie of the catalogue).
"""
