"""Is it any good: measures, floors, rivals.

May import: base, feedback, catalogue, policy, blocklist.

    conrec evaluate --config my.toml --systems floors

Read metrics.py and frontier.py (what is measured), baselines.py and trees.py (what a few lines would do),
sequential.py and tiger.py (what others published). What knows the future is asked by leaks.py.
"""
