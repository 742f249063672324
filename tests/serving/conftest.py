"""The tiny world of published_world.py; importing `small` makes it act on every file of this folder."""

import pytest
from published_world import blocks_of, make_events, night, publish_unaudited, small, world

__all__ = ["blocks_of", "make_events", "night", "publish_unaudited", "small", "world"]


@pytest.fixture
def codebook_url(world, tmp_path):
    """The codebook of the tiny world, as a catalogue leaves it."""
    url = str(tmp_path / "codebook.safetensors")
    world.codebook.save(url)
    return url
