"""A way to publish rows, of published_world.py."""

from published_world import blocks_of, publish_unaudited

__all__ = ["blocks_of", "publish_unaudited"]
