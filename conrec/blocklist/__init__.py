"""What is blocked tonight: generation, score, calibration, guardrails.

May import: base, feedback, catalogue, policy, serving, store.

    conrec nightly --config my.toml

Read generate.py (prompts become semantic IDs, on all machines), resolve.py (IDs become items), counts.py and score.py
(how likely each is rejected), calibrate.py (the threshold that keeps the promise), guardrails.py, night.py (rows,
bucket by bucket). ranking.py is the one way through them, for the night and for everything that measures it.
"""
