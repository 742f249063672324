"""The tiny world of published_world.py; importing `small` makes it act on every file of this folder."""

from published_world import blocks_of, make_events, night, publish_unaudited, small, world

__all__ = ["blocks_of", "make_events", "night", "publish_unaudited", "small", "world"]
