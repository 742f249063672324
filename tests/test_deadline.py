"""Which hour ends a night: the same one for every try of it."""

from datetime import UTC, datetime, timedelta

import pytest

from conrec.artefact import plan
from conrec.config import NightlySettings
from conrec.errors import ArtefactError
from conrec.stages.deadline import deadline_of, reach
from conrec.stages.night_prompts import Plan

EVENING = datetime(2026, 1, 1, 22, tzinfo=UTC)
FIVE = datetime(2026, 1, 2, 5, tzinfo=UTC)


def test_every_try_of_a_night_has_the_deadline_of_the_first_until_it_has_finished(tmp_path):
    settings, night = NightlySettings(deadline="05:00Z"), plan(str(tmp_path), "nightly", {}, {})
    assert deadline_of(settings, night, EVENING) == FIVE
    # It died, and is tried again after the hour: what there is is published, and not in a day.
    assert deadline_of(settings, night, FIVE + timedelta(minutes=5)) == FIVE
    assert deadline_of(NightlySettings(), night, FIVE) is None
    later = NightlySettings(deadline="06:00Z")
    assert deadline_of(later, night, FIVE) == FIVE + timedelta(hours=1)
    night.finish({"behind": 1}, 0.0)
    assert deadline_of(later, night, FIVE + timedelta(hours=2)) == FIVE + timedelta(hours=25)


def test_rows_of_two_nights_in_one_folder_are_told_with_the_folder_to_delete(tmp_path):
    night = plan(str(tmp_path), "nightly", {}, {})
    with pytest.raises(ArtefactError, match=rf"4 rows for the 3 users.*delete {night.url}, then run conrec nightly"):
        reach(night, Plan(users=5, kept=2, basis={}), 4, buckets=2)
