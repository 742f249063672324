"""Settings: what is refused, with what message, and what the shipped files say."""

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from pydantic import ValidationError

from conrec.config import Config, NightlySettings, Settings, load_settings
from conrec.errors import ConfigError
from conrec.settings_text import settings_page, to_toml
from conrec.tables import ANCHORS, INTERACTIONS, ITEMS, check

HOME = Path(__file__).parents[1]
SHIPPED = sorted((HOME / "examples").rglob("*.toml"))
SMALLEST = """
root = "out"
[interactions]
path = "interactions.parquet"
[items]
path = "items.parquet"
[timeline]
cut = 2026-01-01T00:00:00Z
"""


@pytest.fixture
def smallest(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text(SMALLEST)
    return file


def refusal(file, *overrides):
    with pytest.raises(ConfigError) as refused:
        load_settings(file, list(overrides))
    return str(refused.value)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_shipped_settings_are_valid_and_survive_being_printed(file, tmp_path):
    config = load_settings(file)
    printed = tmp_path / "printed.toml"
    printed.write_text(to_toml(config))
    assert load_settings(printed) == config


def test_three_settings_files_are_shipped():
    assert {file.name for file in SHIPPED} >= {"conrec.toml", "smollm2.toml", "cluster.toml"}


def test_a_file_with_a_base_puts_its_settings_in_the_place_of_those(smallest, tmp_path):
    (tmp_path / "below").mkdir()
    file = tmp_path / "below" / "mine.toml"
    file.write_text('base = "../' + smallest.name + '"\nroot = "mine"\n[timeline]\nhorizon_days = 3\n')
    expected = load_settings(smallest, ["root=mine", "timeline.horizon_days=3", "seed=5"])
    assert load_settings(file, ["seed=5"]) == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("base = 3", "base = 3: write the path of another settings file"),
        ('base = "none.toml"', "none.toml: no such settings file"),
        ('base = "based.toml"', "has a base itself; name 'x.toml'"),
    ],
)
def test_a_base_that_is_none_is_refused(tmp_path, text, told):
    (tmp_path / "based.toml").write_text('base = "x.toml"')
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        load_settings(tmp_path / "mine.toml")


def test_a_byte_order_mark_is_no_part_of_the_settings(smallest):
    plain = load_settings(smallest)
    smallest.write_bytes(b"\xef\xbb\xbf" + smallest.read_bytes())
    assert load_settings(smallest) == plain


def test_an_unknown_key_is_refused_with_the_one_that_was_meant(smallest):
    message = refusal(smallest, "grpo.group_siz=8")
    assert str(smallest) in message
    assert "grpo.group_siz" in message
    assert "did you mean group_size?" in message


def test_an_unknown_section_lists_the_known_ones(smallest):
    assert "timeline" in refusal(smallest, "xyzzy.a=1")


def test_a_wrong_type_names_key_and_value(smallest):
    message = refusal(smallest, "grpo.group_size=many")
    assert "grpo.group_size" in message
    assert "many" in message


def test_all_mistakes_are_told_at_once(smallest):
    message = refusal(smallest, "grpo.group_size=1", "generate.beam_width=0")
    assert "grpo.group_size" in message
    assert "generate.beam_width" in message


def test_only_the_model_of_vllm_is_cut(smallest):
    assert "write 1, or" in refusal(smallest, "generate.engine=torch", "generate.tensor_parallel=2")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.hidden_size=130", "multiple of heads"),
        ("model.heads=16", "head that vLLM computes"),
        ("train.workers=5", "multiple of train.workers"),
        ("lora.rank=8", "model.name_or_path"),
        ("timeline.cut=2026-01-01T00:00:00", "time zone"),
        ("nightly.deadline=6", 'no time of day; write for example "05:30Z"'),
        ('nightly.on_failure="page me"', "list of words, for example"),
        ('nightly.on_failure=["", "me"]', "list of words"),
        ("nightly.deadline=05:30:00", 'time zone; write for example "05:30Z"'),
        ("prompt.max_negatives=100", "max_events"),
        (
            'grpo.stages=[{name="a",blocks=["recent","positives"],steps=1,beta=0.1}]',
            "grpo.stages.0.blocks: ['recent', 'positives'] is no history that a prompt can have; write ['recent'] or "
            "['negatives'] or ['negatives', 'positives']",
        ),
        ('grpo.stages=[{name="a",blocks=["positives"],steps=1,beta=0.1}]', "['positives'] is no history"),
        ('grpo.stages=[{name="a",blocks=[],steps=1,beta=0.1}]', "[] is no history"),
        (
            'grpo.stages=[{name="a",blocks=["recent"],steps=1,beta=0.1}, {name="a",blocks=["recent"],steps=2,beta=0}]',
            "stages have the name 'a' in common",
        ),
        (
            'grpo.stages=[{name="warm_up",blocks=["recent"],steps=1,beta=0.1}]',
            "stage 'warm_up' has the name of a supervised task; write another",
        ),
        (
            'grpo.stages=[{name="a/b",blocks=["recent"],steps=1,beta=0.1}]',
            "stage 'a/b' gives a file its name; write one without",
        ),
        ('grpo.stages=[{name="",blocks=["recent"],steps=1,beta=0.1}]', "stage '' gives a file its name"),
        (
            'supervised.warmup_blocks=["positives"]',
            "supervised.warmup_blocks: ['positives'] is no history that a prompt can have; write ['negatives'] or ",
        ),
        ("embedding.weights=[1.0, 2.0]", "give one each"),
        ('embedding.sources=["text", "text"]', "once"),
        (
            'interactions.rules=[{feedback="negative", when="rating <="}]',
            "rules.0.when: rule `rating <=` is not an exp",
        ),
        ('items.columns={categroy="genre"}', "items.columns: categroy is no column of ours, whose names stand on the "),
        ("items.columns.categroy=genre", "did you mean category?"),
        ("interactions.columns.category=genre", "known keys: user_id, item_id, timestamp, feedback"),
        ("root=", "root: '' is no place; write a folder or a URL"),
        ("seed=-1", "greater than or equal to 0"),
        ("seed=9223372036854775808", "less than 9223372036854775808"),
        ("guardrails.explicit_days=36500", "less than or equal to 10000"),
    ],
)
def test_an_impossible_combination_says_what_to_write(smallest, override, said):
    assert said in refusal(smallest, override)


def test_blocks_of_a_prompt_have_no_order(smallest):
    config = load_settings(smallest, ['supervised.warmup_blocks=["positives", "negatives"]'])
    assert config.supervised.warmup_blocks == ("positives", "negatives")


@pytest.mark.parametrize("number", ["inf", "-inf", "nan"])
def test_no_number_is_infinite(smallest, number):
    places = ("score.reach", "publish.max_size_change", "nightly.max_day_factor", "guardrails.protect_days")
    places += ("nightly.max_policy_days", "generate.keep_days", "supervised.warmup_epochs")
    message = refusal(smallest, *(f"{place}={number}" for place in places), f"embedding.weights=[{number}]")
    for place in (*places, "embedding.weights.0"):
        assert f"{place} = {number}: Input should be a finite number" in message


def test_the_most_days_end_within_the_times_of_a_table(smallest):
    config = load_settings(smallest, [f"guardrails.explicit_{kind}=10000" for kind in ("days", "demote_days")])
    ends = datetime.now(UTC) + timedelta(config.guardrails.explicit_days + config.guardrails.explicit_demote_days)
    check(pa.table({"user_id": ["u"], "anchor_time": [ends]}), ANCHORS, "the last moment")


def test_every_column_of_an_input_may_have_another_name(smallest):
    for section, schema in (("interactions", INTERACTIONS), ("items", ITEMS)):
        named = load_settings(smallest, [f"{section}.columns.{name}=theirs" for name in schema.names])
        assert getattr(named, section).columns == dict.fromkeys(schema.names, "theirs")


def test_a_missing_key_is_named(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text(SMALLEST.replace('root = "out"', ""))
    assert "root is missing" in refusal(file)


def test_a_missing_file_and_broken_toml_are_told_apart(tmp_path):
    assert "no such settings file" in refusal(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("root = ")
    assert "not valid TOML" in refusal(broken)


def test_overrides_take_toml_values_and_plain_words(smallest):
    config = load_settings(
        smallest,
        [
            "grpo.group_size=4",
            "root=elsewhere/there",
            "model.dtype=bfloat16",
            "calibration.strata=[2]",
        ],
    )
    assert config.grpo.group_size == 4
    assert config.root == "elsewhere/there"
    assert config.model.dtype == "bfloat16"
    assert config.calibration.strata == (2,)


@pytest.mark.parametrize("text", ["123456789012", "1234e5678901", "2026-01-31", "true", "0x1f"])
def test_an_override_of_a_text_is_its_text(smallest, text):
    places = ("root", "policy.version", "publish.redis_prefix", "model.name_or_path", "interactions.columns.item_id")
    config = load_settings(smallest, [f"{place}={text}" for place in places] + [f"items.path='{text}'"])
    taken = (config.root, config.policy.version, config.publish.redis_prefix, config.model.name_or_path)
    assert {*taken, config.interactions.columns["item_id"], config.items.path} == {text}
    assert "root = [1]: Input should be a valid string" in refusal(smallest, "root=[1]")


def test_a_refused_override_is_told_as_one(smallest):
    message = refusal(smallest, "generate.batch_size=4", "generate.batch_size=0", "seed=-1", "model.heads=5")
    batch_size, heads, seed = sorted(message.split("\n"))
    assert batch_size.startswith(f"{smallest} with --set generate.batch_size=0: generate.batch_size = 0: ")
    assert heads.startswith(f"{smallest} with --set model.heads=5: model: hidden_size 128 is not a multiple of heads 5")
    assert seed.startswith(f"{smallest} with --set seed=-1: seed = -1: ")
    smallest.write_text(SMALLEST + "horizon_days = 0")
    assert refusal(smallest, "seed=1").startswith(f"{smallest}: timeline.horizon_days = 0: ")


def test_a_later_override_wins(smallest):
    assert load_settings(smallest, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("override", ["seed", "=3", "root.deeper=1"])
def test_an_override_of_another_shape_is_refused(smallest, override):
    assert "--set" in refusal(smallest, override)


def test_settings_cannot_be_changed_afterwards(smallest):
    with pytest.raises(ValidationError):
        load_settings(smallest).seed = 5


def test_every_setting_is_documented():
    def walk(model, name):
        assert model.__doc__, name
        for key, field in model.model_fields.items():
            assert field.description, f"{name}.{key} has no string under it"
            if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
                walk(field.annotation, key)

    # Sections are documented by their own docstring, not by the field that holds them.
    for key, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            walk(field.annotation, key)
    page = settings_page()
    assert "[grpo]" in page
    assert "[lora]" in page
    assert "group_size: integer = 16" in page


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {"root": "~/run", "interactions.path": "~/a.parquet", "items.path": "~/b"}
    paths |= {"model.name_or_path": "~/model", "embedding.encoder": "~/encoder"}
    config = load_settings(
        HOME / "examples" / "kuairand" / "conrec.toml", [f"{key}={path}" for key, path in paths.items()]
    )
    written = (config.root, config.interactions.path, config.items.path)
    written += (config.model.name_or_path, config.embedding.encoder)
    assert written == tuple(path.replace("~", str(tmp_path)) for path in paths.values())


@pytest.mark.parametrize("key", ["root", "interactions.path", "items.path"])
def test_a_protocol_without_its_slashes_is_refused_with_its_key(key):
    with pytest.raises(ConfigError, match=rf"{key}: s3:/bucket/a: write s3://bucket/a"):
        load_settings(HOME / "examples" / "kuairand" / "conrec.toml", [f"{key}=s3:/bucket/a"])


@pytest.mark.long
def test_importing_the_settings_loads_nothing_heavy():
    code = """
import sys, conrec.config
heavy = {"torch", "ray", "vllm", "transformers", "pyarrow", "numpy", "faiss"} & sys.modules.keys()
sys.exit(str(heavy) if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HOME, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("deadline", "began", "ends"),
    [
        ("05:00Z", "2026-03-01T02:00:00+00:00", "2026-03-01T05:00:00+00:00"),
        ("05:00Z", "2026-02-28T23:30:00+00:00", "2026-03-01T05:00:00+00:00"),
        ("05:00Z", "2026-03-01T05:00:00+00:00", "2026-03-02T05:00:00+00:00"),
        ("01:30+02:00", "2026-03-01T22:00:00+00:00", "2026-03-01T23:30:00+00:00"),
        ("22:00-05:00", "2026-03-01T02:00:00+00:00", "2026-03-01T03:00:00+00:00"),
    ],
)
def test_a_night_ends_at_the_first_deadline_after_it_began(deadline, began, ends):
    nightly = NightlySettings(deadline=deadline)
    assert nightly.ends_at(datetime.fromisoformat(began)) == datetime.fromisoformat(ends)
    assert NightlySettings().ends_at(datetime.fromisoformat(began)) is None
