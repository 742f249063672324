"""What items are: embeddings, quantizer, codebook, semantic IDs, trie, quality.

May import: base, feedback.

    conrec catalogue --config my.toml

    from conrec.catalogue.codebook import Codebook

    Codebook.load("run/catalogue/VERSION/codebook.safetensors").encode(embeddings)     # (N, D) -> (N, L) semantic IDs

Read embeddings.py (an item becomes a vector), quantizer.py (vectors make a codebook, once), codebook.py (which stays
as it is, for items that come later), trie.py (which IDs there are, for the decoding).
"""
