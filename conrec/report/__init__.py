"""What people read of an evaluation: page, tables, plots.

May import: base, blocklist, evaluation.

    conrec evaluate --config my.toml            # leaves report.html, table.md and metrics.json

Read report.py (the three files), page.py (its words and style), plots.py (the pictures, drawn by drawing.py).
"""
