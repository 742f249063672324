"""Versions nobody can break: publish, audit, pointers, lock, difference, garbage, forgetting.

May import: base, feedback, serving.

    conrec verify --config my.toml
    conrec rollback VERSION --config my.toml

    from conrec.store.publish import verify

    verify("s3://bucket/run/blocklists")        # every file of what serving reads, against its manifest

Read publish.py (write, audit, manifest, pointer, in this order), pointers.py (the only two writes that readers can
see), audit.py (what is refused). How a version lies there is told by conrec/serving/versions.py, since serving reads
it.
"""
