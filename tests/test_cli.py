"""The command line: what it teaches, how it ends, and what it shows of a published night."""

import dataclasses
import errno
import os
import re
import signal
import socket
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest
import redis
from botocore.exceptions import EndpointConnectionError
from stores import amazon_without_credentials, redis_server

from conrec import __version__, cli, storage
from conrec.artefact import plan
from conrec.config import load_settings
from conrec.errors import AuditError, ConfigError, StorageError
from conrec.feedback.events import encode_events
from conrec.feedback.labels import read_interactions
from conrec.serving.reader import BlockedItem
from conrec.stages.artefacts import Artefacts
from conrec.stages.nightly import make_night
from conrec.stages.show import Pictures
from conrec.store.audit import Expected
from conrec.store.publish import Block, publish
from conrec.tables import BLOCKLIST, RULES, TIMESTAMP

pytestmark = pytest.mark.long

HOME = Path(__file__).parents[1]
DAY = 86_400_000_000
NOW = 1_767_225_600_000_000
EXAMPLE = "examples/kuairand/conrec.toml"


def conrec(*arguments):
    """The real command as a process: exit code, standard output, standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "conrec.cli", *map(str, arguments)],
        cwd=HOME,
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def ended(*arguments):
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(map(str, arguments)))
    return exit_.value.code


@pytest.fixture
def settings(tmp_path):
    """Two users, three items, and a night in which one item is predicted for ann."""
    items = pa.table(
        {"item_id": ["boxing", "chess", "ring"], "text": ["", "", ""], "category": ["Sport", "Game", "Sport"]}
    )
    storage.write_table(items, str(tmp_path / "items.parquet"))
    interactions = pa.table(
        {
            "user_id": ["ann", "ann", "bob"],
            "item_id": ["boxing", "chess", "ring"],
            "timestamp": pa.array([NOW - DAY, NOW - DAY, NOW], TIMESTAMP),
            "feedback": ["negative", "positive", "negative"],
        }
    )
    storage.write_table(interactions, str(tmp_path / "interactions.parquet"))
    file = tmp_path / "settings.toml"
    file.write_text(f"""
root = "{tmp_path}/root"
[interactions]
path = "{tmp_path}/interactions.parquet"
[items]
path = "{tmp_path}/items.parquet"
[timeline]
cut = 2026-01-01T00:00:00Z
[guardrails]
min_history = 1
max_user_share = 1.0
max_catalogue_share = 1.0
[publish]
buckets = 1
""")
    config = load_settings(file)
    codes = pa.array([[0, 1], [1, 0], [0, 1]], pa.list_(pa.int32()))
    artefact = Artefacts(config)["catalogue"]
    storage.write_table(items.append_column("semantic_id", codes), artefact.path("items.parquet"))
    artefact.finish({}, 0.0)

    events, _ = encode_events(read_interactions(config.interactions), items["item_id"].combine_chunks(), 0.0)
    row = {"user_id": "ann", "similarity": 1.0, "score": 1.0, "demotes_at": NOW + 6 * DAY, "expires_at": NOW + 6 * DAY}
    guess = {"similarity": 0.91, "score": 0.5, "expires_at": NOW + 13 * DAY}
    rows = [
        row | {"item_id": "boxing", "reason": "explicit", "semantic_id": None},
        row | {"item_id": "ring", "reason": "predicted", "semantic_id": "<a_0><b_1>"} | guess,
        row | {"user_id": "bob", "item_id": "ring", "reason": "explicit", "semantic_id": None},
    ]
    blocklist = pa.table([pa.array([r[field.name] for r in rows]).cast(field.type) for field in BLOCKLIST], BLOCKLIST)
    expected = Expected(
        events,
        items["item_id"].combine_chunks(),
        pa.array(["<a_0><b_1>", "<a_1><b_0>"]),
        NOW,
        1,
        config.guardrails,
        config.publish,
    )
    storage.write_table(
        storage.read_table(artefact.path("items.parquet")), f"{tmp_path}/root/nightly/tonight/items.parquet"
    )
    learned = {"trained_at": "2026-01-01T03:00:00+00:00", "trained_until": "2025-12-31T00:00:00+00:00"}
    about = {"watermark_us": NOW, "generated_users": 1, "failed_users": 0}
    about |= {"settings": "tonight", "policy": "0123456789ab", **learned}
    nights = {"first": blocklist.slice(1), "second": blocklist}
    for version, table in nights.items():
        publish(f"{tmp_path}/root/blocklists", version, [Block(0, table, RULES.empty_table())], lambda: about, expected)
    return file


def test_help_names_every_command_and_gives_examples():
    code, out, _ = conrec("--help")
    assert code == 0
    for name in ("run", "catalogue", "train", "anchors", "evaluate", "nightly", "config", "show", "versions"):
        assert f" {name} " in out
    assert "conrec run --config examples/kuairand/conrec.toml" in out
    assert "--set generate.max_users=1000" in out


def test_help_says_what_the_exit_codes_mean():
    code, out, _ = conrec("--help")
    assert code == 0
    said = re.findall(r"• (\d+(?:, \d+)*) : ", out)
    assert said == ["0", str(cli.USER_ERROR), str(cli.AUDIT_FAILED), f"{128 + signal.SIGINT}, {128 + signal.SIGTERM}"]


def test_the_version_is_one_line():
    assert conrec("--version") == (0, f"conrec {__version__}\n", "")


def test_config_prints_the_settings_in_force_as_toml():
    code, out, _ = conrec("config", "--config", EXAMPLE, "--set", "grpo.group_size=6")
    assert code == 0
    printed = tomllib.loads(out)
    assert printed["grpo"]["group_size"] == 6
    assert printed["swing"]["neighbours"] == 10  # a default that the file does not name


def test_config_explains_every_setting():
    code, out, _ = conrec("config", "--help-settings")
    assert code == 0
    assert "[grpo]" in out
    assert "Distinct completions per prompt." in out


def test_a_mistake_ends_with_its_message_and_code_2():
    code, out, error = conrec("train", "--config", EXAMPLE, "--set", "grpo.group_siz=6")
    assert code == 2
    assert out == ""
    told = f"{EXAMPLE} with --set grpo.group_siz=6: unknown key grpo.group_siz; did you mean group_size?"
    assert error.splitlines() == [told]


def test_nothing_heavy_is_loaded_to_refuse_a_setting():
    code = "import sys, conrec.cli; print({'torch', 'ray', 'vllm', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=HOME, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(("error", "code"), [(ConfigError("a mistake"), 2), (AuditError("a bad night"), 3)])
def test_each_kind_of_error_has_its_exit_code(error, code, capsys):
    @cli.app.command("fail")
    def fail():
        raise error

    try:
        assert ended("fail") == code
    finally:
        cli.app.registered_commands.pop()
    assert capsys.readouterr().err == f"{error}\n"


def test_a_full_disk_is_no_defect(capsys):
    @cli.app.command("fail")
    def fail():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/policy")

    try:
        assert ended("fail") == 2
    finally:
        cli.app.registered_commands.pop()
    told = capsys.readouterr().err
    assert told.startswith("/data/policy: No space left on device;") and "run the same command again" in told


COMMANDS = (
    *(("run",), ("catalogue",), ("train",), ("evaluate",), ("nightly",), ("show", "ann"), ("versions",)),
    ("anchors", "--out", "unused"),
    *(("rollback", "v1"), ("diff", "v1", "v2"), ("verify",), ("collect-garbage", "--keep", "1")),
    ("export", "redis", "--url", "redis://127.0.0.1:1/0"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_store_without_credentials_is_one_message_for_every_command(command, capfd):
    arguments = ("--config", EXAMPLE, "--set", "root=s3://bucket/run")
    with amazon_without_credentials():
        assert ended(*command, *arguments) == 2
    out, error = capfd.readouterr()
    assert error.startswith("s3://bucket/run/") and ": no credentials: " in error and error.count("\n") == 1
    assert "Traceback" not in out + error


def test_a_mirror_of_a_store_without_credentials_is_one_message(tmp_path, capfd):
    with amazon_without_credentials():
        assert ended("mirror", "s3://bucket/run/blocklists", tmp_path / "mirror") == 2
    error = capfd.readouterr().err
    assert "s3://bucket/run/blocklists/CURRENT.json: no credentials: " in error and error.count("\n") == 1


@pytest.mark.parametrize("path", ["interactions.path", "items.path"])
def test_an_input_on_a_store_out_of_reach_is_one_message(path, tmp_path, capfd):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/a.parquet"
        assert ended("train", "--config", EXAMPLE, "--set", f"{path}={url}", "--set", f"root={tmp_path}") == 2
    error = capfd.readouterr().err
    assert error.startswith(f"{url}: the store is out of reach: ") and error.count("\n") == 1


def test_what_a_client_raises_outside_of_our_own_reading_is_told_too(capsys):
    @cli.app.command("fail")
    def fail():
        raise EndpointConnectionError(endpoint_url="http://127.0.0.1:1/bucket")

    try:
        assert ended("fail") == 2
    finally:
        cli.app.registered_commands.pop()
    assert capsys.readouterr().err.startswith("the store is out of reach: Could not connect to the endpoint URL")


def test_a_defect_keeps_its_traceback():
    @cli.app.command("fail")
    def fail():
        raise ZeroDivisionError("a defect")

    try:
        with pytest.raises(ZeroDivisionError):
            cli.main(["fail"])
    finally:
        cli.app.registered_commands.pop()


def test_show_tells_what_was_rejected_what_is_blocked_and_why(settings, capsys):
    assert ended("show", "ann", "--config", settings) == 0
    out = capsys.readouterr().out
    assert "1 x  Sport" in out
    assert "1 that they rejected themselves, 1 predicted" in out
    assert "ring  Sport  <- score 0.5, near <a_0><b_1> (Sport), similarity 0.91" in out
    assert "policy 0123456789ab of 2026-01-01 03:00, trained until 2025-12-31 00:00" in out


def test_show_tells_every_row_and_until_when_an_explicit_one_blocks(settings, capsys):
    explicit = "boxing  Sport  <- rejected, blocked until 2026-01-07 00:00"
    for option in ([], ["--all"]):
        assert ended("show", "ann", *option, "--config", settings) == 0
        out = capsys.readouterr().out
        assert (explicit in out) == bool(option) and "ring  Sport  <- score 0.5" in out


def test_show_looks_at_a_version_that_is_not_served(settings, capsys):
    assert ended("show", "ann", "--version", "first", "--config", settings) == 0
    assert "0 that they rejected themselves, 1 predicted" in capsys.readouterr().out
    assert ended("show", "ann", "--version", "third", "--config", settings) == 2
    assert "third: no complete version; there is: second, first" in capsys.readouterr().err


def test_show_names_a_generated_id_only_where_the_item_lies_near_it():
    pictures = Pictures({}, pa.table({}), {"ring": "Sport"}, {"<a_0><b_1>": "Sport"}, "")
    row = BlockedItem("ring", "predicted", 0.0, 0.00012345, "<a_0><b_1>", datetime.now(UTC), datetime.now(UTC))
    assert pictures._line(row) == "ring  Sport  <- score 0.000123, found by what is counted"
    near = dataclasses.replace(row, similarity=0.5)
    assert pictures._line(near) == "ring  Sport  <- score 0.000123, near <a_0><b_1> (Sport), similarity 0.50"


def test_show_of_an_unknown_user_says_so(settings, capsys):
    assert ended("show", "nobody", "--config", settings) == 0
    assert "nothing is blocked" in capsys.readouterr().out


def test_a_user_who_looks_like_markup_is_shown_as_written(settings, capsys):
    assert ended("show", "acme[/eu] [bold]:smile:", "--config", settings) == 0
    assert "user acme[/eu] [bold]:smile:" in capsys.readouterr().out


def test_versions_and_rollback(settings, capsys):
    assert ended("versions", "--config", settings) == 0
    newest, oldest = capsys.readouterr().out.splitlines()
    assert newest.startswith("* second")
    assert oldest.startswith("  first")
    assert ended("rollback", "first", "--config", settings) == 0
    assert ended("versions", "--config", settings) == 0
    assert "* first" in capsys.readouterr().out
    assert ended("rollback", "third", "--config", settings) == 2
    assert "third" in capsys.readouterr().err


def test_verify_and_collect_garbage(settings, capsys):
    assert ended("verify", "--config", settings) == 0
    assert "is whole" in capsys.readouterr().out
    assert ended("verify", "third", "--config", settings) == 2
    assert "third" in capsys.readouterr().err
    assert ended("collect-garbage", "--keep", "1", "--dry-run", "--config", settings) == 0
    assert "0 removed" in capsys.readouterr().out  # both are younger than the readers' grace period
    assert ended("collect-garbage", "--keep", "0", "--config", settings) == 2
    assert "at least 1" in capsys.readouterr().err


def test_export_into_redis(settings, capsys, tmp_path):
    with redis_server(tmp_path) as url:
        assert ended("export", "redis", "--url", url, "--config", settings) == 0
        # The rows of these nights have ended: there is a version, and it blocks nothing.
        assert capsys.readouterr().out == "second: 0 users, 0 rows; 0 older keys removed\n"
        with redis.Redis.from_url(url) as client:
            assert client.get("conrec:current") == b"second"
    assert ended("export", "redis", "--url", url, "--config", settings) == 2
    assert "redis.sock" in capsys.readouterr().err


def test_before_the_first_night_the_remedy_is_named(tmp_path, capsys):
    arguments = ("--config", EXAMPLE, "--set", f"root={tmp_path}")
    assert ended("versions", *arguments) == 2
    assert "run conrec nightly first" in capsys.readouterr().err
    assert ended("show", "1", *arguments) == 2
    assert "nightly" in capsys.readouterr().err


def test_a_stage_that_lacks_the_one_before_names_it(settings, capfd):
    assert ended("evaluate", "--config", settings) == 2
    assert "no policy is finished; run conrec train" in capfd.readouterr().err


def test_a_night_asks_its_store_before_it_reads_or_generates_anything(tmp_path):
    (tmp_path / "blocklists").touch()  # where nothing can be created
    config = load_settings(HOME / EXAMPLE, [f"root={tmp_path}"])
    with pytest.raises(StorageError, match="blocklists: nothing can be published here"):
        make_night(Artefacts(config), plan(str(tmp_path), "nightly", {}, {}))
    assert os.listdir(tmp_path) == ["blocklists"]


def test_diff_says_who_lost_what(settings):
    code, out, _ = conrec("diff", "second", "first", "--config", settings)
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert ["explicit", "0", "1", "1", "0", "1"] in rows
    assert ["predicted", "0", "0", "1", "0", "0"] in rows
    assert ["ann", "0", "1"] in rows
    assert ["boxing", "0", "1"] in rows

    code, out, _ = conrec("diff", "second", "first", "--config", settings, "--user", "ann")
    assert code == 0
    assert [line.split()[:3] for line in out.splitlines()[1:]] == [["-", "boxing", "explicit"]]

    code, _, err = conrec("diff", "first", "fourth", "--config", settings)
    assert code == cli.USER_ERROR
    assert "fourth" in err
    assert "Traceback" not in err
