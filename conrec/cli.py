"""The command line `conrec`, and what jobs/*.py call; thin: reads the settings, then runs a stage.

    conrec run --config examples/kuairand/conrec.toml --set generate.max_users=500

A mistake that a person can mend ends with its message and exit code 2, a failed audit with 3, Ctrl-C with 130 and
SIGTERM with 143; anything else is a defect and keeps its traceback. Nothing heavy is imported before the settings were
found sound.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import sys
from datetime import datetime
from typing import Annotated, Any, Literal, NoReturn

import typer

import conrec
from conrec.config import Config, load_settings
from conrec.errors import REST, AuditError, ConrecError, MissingDependencyError
from conrec.interrupt import Interruption
from conrec.progress import console, warn
from conrec.store_errors import explain

USER_ERROR = 2
AUDIT_FAILED = 3
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""Full, over quota, read-only, not allowed: no defect, whichever stage meets it."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help=f"""Predicts what each user of a recommender will reject, and publishes it every night as blocklists.

    Everything is said in one settings file. A stage that finds its work done, from the same inputs and settings,
    says so and returns; one that was killed goes on where it was.

    **Examples**

    - `conrec run --config examples/kuairand/conrec.toml` : the four stages and a summary
    - `conrec nightly --config my.toml --set generate.max_users=1000` : tonight's blocklists, a setting overridden
    - `conrec evaluate --config my.toml --systems all` : the method beside everything it must beat, and its ablation
    - `conrec anchors --config my.toml --out anchors`, then `conrec evaluate --config my.toml --systems floors
      --predictions mine=ranked.parquet` : a system of your own beside the floors, without training anything
    - `conrec show 17 --config my.toml` : what is blocked for user 17, and why
    - `conrec config --config my.toml` : the settings in force; `--help-settings` explains every one
    - `conrec versions --config my.toml`, then `conrec rollback VERSION --config my.toml` : undo a night

    **Exit codes**

    - 0 : done, now or before
    - {USER_ERROR} : a mistake that a person can mend; the message says how
    - {AUDIT_FAILED} : the audit refused the night, nothing was published
    - 130, 143 : ended by Ctrl-C or SIGTERM; the same command goes on where it was
    - any other : a defect, with its traceback
    """,
)

ConfigFile = Annotated[str, typer.Option("--config", metavar="FILE", help="Settings file (TOML).")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Overrides one setting; may be repeated: --set grpo.group_size=8"),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document instead, for programs.")]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits."""
    with Interruption() as interruption:
        try:
            app(arguments)
        except BaseException as error:
            if interruption.number is not None:  # whatever was made of the signal on its way here
                interruption.leave()
            _end(error)


def _end(error: BaseException) -> NoReturn:
    """Exits with the message of a mistake that a person can mend; anything else is raised again."""
    if isinstance(error, AuditError):
        _fail(str(error), AUDIT_FAILED)
    if isinstance(error, ConrecError):
        _fail(str(error), USER_ERROR)
    told = _mendable(error) if isinstance(error, Exception) else None
    if told is None:
        raise error
    _fail(told, USER_ERROR)


def _mendable(error: Exception) -> str | None:
    """What a disk, a store, a worker or a slim installation lacks that a person can mend; None for a defect."""
    if isinstance(error, ModuleNotFoundError) and (missing := (error.name or "").partition(".")[0]) in REST:
        return str(MissingDependencyError.of(missing))
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        named = f"{error.filename}: " if error.filename else ""
        return f"{named}{error.strerror}; mend that and run the same command again: it goes on where it was"
    return explain(error)


def _fail(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"conrec {conrec.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The options of the command line itself."""


@app.command()
def run(config: ConfigFile, overrides: Overrides = None) -> None:
    """All stages in order, then a summary: figures beside the floors, three users, where everything lies."""
    settings = _settings(config, overrides)
    from conrec.stages.run import run_all

    run_all(settings, config)


@app.command()
def catalogue(
    config: ConfigFile,
    overrides: Overrides = None,
    refit: Annotated[
        bool,
        typer.Option("--refit", help="Fit another codebook on the items of today, though one is finished; then train."),
    ] = False,
) -> None:
    """Items -> semantic IDs, codebook, quality figures. Items that come later are encoded with the same codebook."""
    _stage("catalogue", config, overrides, refit)


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Interactions before the cut -> the policy: checkpoint, metrics, plots."""
    _stage("train", config, overrides)


@app.command()
def anchors(
    config: ConfigFile,
    out: Annotated[
        str, typer.Option("--out", metavar="FOLDER", help="Where the files are written: a folder, any fsspec URL.")
    ],
    overrides: Overrides = None,
) -> None:
    """What a system of your own may see and must answer, as Parquet: for `conrec evaluate --predictions`.

    `events` (before the cut), `items`, `anchors` (user_id, anchor_time) to rank items for, `histories` of them, and
    `pairs` of items that were shown, to be told apart instead, or `candidates`, one of which is the next rejection; no
    outcome. Needs neither catalogue nor policy; the
    anchors are those that `conrec evaluate` measures with the same settings. docs/predictions.md has an example.
    """
    settings = _settings(config, overrides)
    from conrec.stages.anchors import write_anchors

    task = write_anchors(settings, out)
    console.print(f"{out}: {task.measured.sum():,} anchors to rank items for, {len(task.pair_items):,} pairs to score")
    if task.later:
        warn(
            f"{task.later:,} of the anchors lie after timeline.cut: their histories hold what earlier anchors and the "
            "pairs ask for. Learn from events.parquet alone; docs/predictions.md says how to hand them out"
        )


@app.command()
def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    systems: Annotated[
        Literal["floors", "ours", "all"] | None,
        typer.Option(
            help="`floors`: what needs no policy, from the data alone. `ours`: the policy, too, minutes. `all`: also "
            "the published systems to beat and the ablation, each trained first: an hour or more, resumed row by row. "
            "Default: evaluation.systems."
        ),
    ] = None,
    predictions: Annotated[
        list[str] | None,
        typer.Option(
            "--predictions",
            metavar="NAME=FILE",
            help="A system of your own as a row of the table, from a file with user_id, anchor_time, item_id and score "
            "(higher: rather rejected): items for every anchor that `conrec anchors` writes, or all of its pairs, or "
            "all of its candidates. May be repeated.",
        ),
    ] = None,
) -> None:
    """The policy beside what it must beat, on what came after the cut: metrics.json, report.html, table.md.

    `conrec evaluate --config my.toml --systems floors --predictions mine=ranked.parquet` measures a system of your own
    beside the floors.
    """
    chosen = [] if systems is None else [f"evaluation.systems={systems}"]
    settings = _settings(config, [*(overrides or []), *chosen])
    from conrec.evaluation.predictions import named_files
    from conrec.stages.run import run_stage
    from conrec.stages.sources import Sources

    sources = Sources(settings, named_files(predictions or []))
    console.print(f"evaluate: {run_stage('evaluate', settings, sources=sources).url}")


@app.command()
def nightly(config: ConfigFile, overrides: Overrides = None) -> None:
    """Histories to date and the policy -> tonight's blocklists, audited and published."""
    _stage("nightly", config, overrides)


@app.command()
def simulate(
    config: ConfigFile,
    nights: Annotated[
        int, typer.Option("--nights", metavar="N", min=1, help="So many nights, the last a day before the log ends.")
    ] = 3,
    overrides: Overrides = None,
) -> None:
    """Replays nights of the log, one day later each, and says what the day after made of every list.

    Below ROOT/simulation, with a catalogue and a policy made from what the first of these nights knew; nothing is
    served. `conrec simulate --config examples/kuairand/conrec.toml --nights 3`
    """
    settings = _settings(config, overrides)
    from conrec.stages.simulate import print_nights, write_nights
    from conrec.stages.simulate import simulate as replayed

    found = list(replayed(settings, nights))
    print_nights(found)
    console.print(write_nights(settings, found))


@app.command("config")
def show_config(
    config: Annotated[str | None, typer.Option("--config", metavar="FILE", help="Settings file (TOML).")] = None,
    overrides: Overrides = None,
    help_settings: Annotated[bool, typer.Option("--help-settings", help="Explain every setting instead.")] = False,
) -> None:
    """Checks a settings file and prints the settings in force as TOML."""
    from conrec.settings_text import settings_page, to_toml

    if help_settings:
        print(settings_page())
        return
    if config is None:
        raise typer.BadParameter("name a settings file, or ask for --help-settings", param_hint="--config")
    print(to_toml(_settings(config, overrides)), end="")


@app.command()
def show(
    user: Annotated[str, typer.Argument(metavar="USER", help="user_id as in the interactions.")],
    config: ConfigFile,
    overrides: Overrides = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every row instead of the first few predicted ones.")
    ] = False,
    version: Annotated[
        str | None,
        typer.Option(
            metavar="VERSION",
            help="A name that `conrec versions` lists; default: current, or the shadow with `publish.release.shadow`.",
        ),
    ] = None,
) -> None:
    """What one user rejected, what is blocked for them, and which semantic ID caught it."""
    settings = _settings(config, overrides)
    from conrec.stages.show import LINES, Pictures

    pictures = Pictures.load(settings, [user], version)
    pictures.show(user, lines=None if everything else LINES)
    console.print(f"  by {pictures.policy}", style="dim")


@app.command()
def versions(config: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """The published versions, newest first; `*`: serving reads it, `s`: the shadow, `!`: damaged, and exit code 2."""
    settings = _settings(config, overrides)
    if as_json:
        from conrec.stages.metrics import versions_json

        _print_json(document := versions_json(settings))
        raise typer.Exit(USER_ERROR if document["damaged"] else 0)
    from conrec.stages.show import published

    lines = published(settings)
    for line in lines:
        console.print(line)
    if any(line.startswith("!") for line in lines):
        raise typer.Exit(USER_ERROR)


@app.command()
def rollback(
    version: Annotated[str, typer.Argument(metavar="VERSION", help="A name that `conrec versions` lists.")],
    config: ConfigFile,
    overrides: Overrides = None,
    shadow: Annotated[bool, typer.Option("--shadow", help="Move the shadow's pointer instead.")] = False,
) -> None:
    """Points serving at an older version, after verifying every file of it."""
    settings = _settings(config, overrides)
    from conrec.stages.inputs import blocklists_url
    from conrec.store.publish import rollback as point_back

    point_back(blocklists_url(settings), version, "shadow" if shadow else "current")
    console.print(f"{'the shadow is' if shadow else 'serving reads'} {version}")


@app.command()
def diff(
    older: Annotated[str, typer.Argument(metavar="A", help="A name that `conrec versions` lists.")],
    newer: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    config: ConfigFile,
    overrides: Overrides = None,
    user: Annotated[str | None, typer.Option("--user", metavar="USER", help="The rows of one user instead.")] = None,
    as_json: AsJson = False,
) -> None:
    """What changed from version A to version B: rows and users by reason, the most affected users and items."""
    settings = _settings(config, overrides)
    if as_json:
        from conrec.stages.metrics import diff_json

        _print_json(diff_json(settings, older, newer, user))
        return
    from conrec.stages.show import differences, user_differences

    tables = differences(settings, older, newer) if user is None else [user_differences(settings, older, newer, user)]
    for table in tables:
        console.print(table)


@app.command()
def verify(
    config: ConfigFile,
    version: Annotated[
        str | None, typer.Argument(metavar="[VERSION]", help="A name that `conrec versions` lists; default: current.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Reads every file of a version again and holds size and digest against its manifest."""
    settings = _settings(config, overrides)
    from conrec.stages.inputs import blocklists_url
    from conrec.store.publish import verify as verify_version

    found = verify_version(blocklists_url(settings), version)
    if as_json:
        _print_json(dataclasses.asdict(found))
        return
    console.print(f"{found.version} is whole: {found.files} files, {found.rows:,} rows, {found.bytes:,} bytes")


@app.command()
def metrics(config: ConfigFile, overrides: Overrides = None) -> None:
    """Figures of what serving reads as Prometheus text: age, rows, users, failures, the promise, seconds a phase.

    `conrec metrics --config my.toml > conrec.prom.new && mv conrec.prom.new /var/lib/node_exporter/conrec.prom`
    """
    settings = _settings(config, overrides)
    from conrec.stages.metrics import prometheus_text

    print(prometheus_text(settings), end="")


@app.command()
def forget(
    users: Annotated[list[str], typer.Argument(metavar="USER...", help="user_id as in the interactions.")],
    config: ConfigFile,
    overrides: Overrides = None,
    anchors: Annotated[
        list[str] | None,
        typer.Option("--anchors", metavar="FOLDER", help="What `conrec anchors` wrote, too; may be repeated."),
    ] = None,
    mirrors: Annotated[
        list[str] | None,
        typer.Option("--mirror", metavar="FOLDER", help="A mirror of this machine, too; may be repeated."),
    ] = None,
    redis: Annotated[str | None, typer.Option("--redis", metavar="URL", help="Their keys in this Redis, too.")] = None,
) -> None:
    """Takes people out of all that lies below the root, and searches it again to prove that nothing is left.

    Versions are written again without them and keep their readers; a killed run is finished by the same command. Take
    them out of the interactions first, and let nothing run on this root meanwhile. Ends with 2 where somebody is still
    named.
    """
    settings = _settings(config, overrides)
    from conrec.stages.forget import UNREACHED, require_nothing_left
    from conrec.stages.forget import forget as take_out

    result = take_out(settings, users, anchors or [], mirrors or [], redis)
    for line in [*result.done, *(f"searched {line}" for line in result.searched)]:
        console.print(line)
    require_nothing_left(result)
    console.print(f"nothing is left of {len(users):,} people. Not reached:")
    for line in UNREACHED:
        console.print(f"- {line}")


@app.command("collect-garbage")
def collect_garbage(
    config: ConfigFile,
    keep: Annotated[int, typer.Option("--keep", metavar="N", help="Newest versions that stay in any case.")],
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Removes older versions with what their nights generated, catalogues and policies that nothing names any more, and
    what killed runs left.

    Never what serving reads or may still be opening, nor what a version that stays, or the newest policy, is made of.
    """
    settings = _settings(config, overrides)
    from conrec.stages.garbage import collect

    for line in collect(settings, keep, dry_run).lines():
        console.print(line)


@app.command()
def mirror(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE_ROOT", help="Where blocklists are published: ROOT/blocklists.")
    ],
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Local folder that readers of this machine open.")],
    pointer: Annotated[Literal["current", "shadow"], typer.Option(help="Which pointer to follow.")] = "current",
    every: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=1, help="Goes on following, looking so often. Default: once.")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="K/N", help="Only users whose hash is K modulo N, as 3/16. Default: all.")
    ] = None,
) -> None:
    """Copies the published version to this machine, verified and ready to be read: what BlocklistReader opens."""
    from conrec.serving import mirror as mirrors
    from conrec.serving.shards import Shard

    def say(line: str) -> None:
        console.print(line)

    part = None if shard is None else Shard.of(shard)
    if every is not None:
        mirrors.follow(source, folder, pointer, part, every, say)
    changed = mirrors.mirror(source, folder, pointer, part)
    say(f"{folder}: {'now' if changed else 'already'} {mirrors.mirrored_version(folder)}")


export = typer.Typer(no_args_is_help=True, help="Loads the published version into another system.")
app.add_typer(export, name="export")


@export.command("redis")
def export_redis(
    url: Annotated[str, typer.Option("--url", metavar="URL", help="redis://host:6379/0, rediss://..., unix://...")],
    config: ConfigFile,
    overrides: Overrides = None,
) -> None:
    """Into Redis: a sorted set a user, item -> until when it is blocked; the key conrec:current is written last.

    Its keys begin with `publish.redis_prefix`; the password is read from the environment, REDIS_PASSWORD.
    """
    settings = _settings(config, overrides)
    from conrec.serving.redis import export_redis as load
    from conrec.stages.inputs import blocklists_url

    done = load(blocklists_url(settings), url, settings.publish.redis_prefix)
    console.print(f"{done.version}: {done.users:,} users, {done.rows:,} rows; {done.removed:,} older keys removed")


def _print_json(document: Any) -> None:
    print(json.dumps(document, ensure_ascii=False, default=datetime.isoformat))


def _stage(name: str, config: str, overrides: list[str] | None, refit: bool = False) -> None:
    settings = _settings(config, overrides)
    from conrec.stages.run import run_stage

    artefact = run_stage(name, settings, refit)
    console.print(f"{name}: {artefact.url}")


def _settings(config: str, overrides: list[str] | None) -> Config:
    return load_settings(config, overrides or [])


if __name__ == "__main__":
    main()
