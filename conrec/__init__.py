"""conrec predicts what each user of a recommender will reject and publishes it as per-user blocklists."""

__version__ = "0.1.0"
