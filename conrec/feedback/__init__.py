"""What users did: logs, rules, labels, anchors and their targets, Swing, EASE.

May import: base.

    from conrec.config import load_settings
    from conrec.feedback.labels import read_interactions

    read_interactions(load_settings("my.toml").interactions)    # any log: user_id, item_id, timestamp, feedback

Read labels.py (files become interactions, by the rules of rules.py), events.py (as arrays), anchors.py (moments of
users) and targets.py (what each of them asks a model to foretell). No model, no item vectors: what is counted here is
known before anything learns.
"""
