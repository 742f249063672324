"""What a request asks: readers, their lookup, mirror, Redis; how versions lie in a store.

May import: base, catalogue.

    conrec mirror s3://bucket/run/blocklists /var/lib/conrec

    from conrec import BlocklistReader

    BlocklistReader("/var/lib/conrec").filter("alice", ["item1", "item2"])      # what is not blocked, in this order

Needs numpy, pyarrow and fsspec, and safetensors for RulesReader: what an installation without extras brings. Read
versions.py (what is published, and where), reader.py (what a request asks of it), lookup.py (how it is answered in
microseconds), mirror.py.
"""
