"""All settings of conrec: frozen pydantic models, read from one TOML file.

    settings = load_settings("examples/kuairand/conrec.toml", overrides=["grpo.group_size=16"])

Unknown keys, wrong types and impossible combinations raise `ConfigError`, whose message says what to
write instead. The string under a field is its documentation; `conrec config --help-settings` prints it.
Importing this module imports no torch, ray or vllm: jobs read settings before they start workers.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Collection
from datetime import UTC, datetime, time, timedelta
from difflib import get_close_matches
from operator import eq
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from conrec.conditions import parsed
from conrec.errors import ConfigError, DataError
from conrec.location import located


def _location(value: str) -> str:
    try:
        return located(value)
    except DataError as error:
        raise ValueError(str(error)) from None


Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Days = Annotated[float, Field(ge=0, le=10_000)]
"""27 years, for ever: two of them after any event still end before 2100, the last year of a table's times."""
Location = Annotated[str, AfterValidator(_location)]
"""A local path or any fsspec URL; `~` is the home folder."""
NameOrPath = Annotated[str, AfterValidator(os.path.expanduser)]


DAY_US = 86_400_000_000
"""Settings are in days, the times of all tables in microseconds since 1970."""
VLLM_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Of vLLM's attention on CPUs; it fails on others only after training, when the night begins."""


class Settings(BaseModel):
    """Base of every section: immutable, unknown keys and infinite numbers refused, field docstrings kept."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def _names(*ours: str) -> AfterValidator:
    """Of our columns: any other key would rename a column to what nobody reads."""

    def known(columns: dict[str, str]) -> dict[str, str]:
        for name in columns:
            if name not in ours:
                raise ValueError(f"{name} is no column of ours, whose names stand on the left; {_meant(name, ours)}")
        return columns

    return AfterValidator(known)


def _meant(name: str, known: Collection[str]) -> str:
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"


def _histories(*admitted: tuple[str, ...]) -> AfterValidator:
    """Of the blocks of a prompt, in whatever order: others would silently be one of these."""

    def known(blocks: tuple[str, ...]) -> tuple[str, ...]:
        if sorted(blocks) not in map(list, admitted):
            told = " or ".join(str(list(each)) for each in admitted)
            raise ValueError(f"{list(blocks)} is no history that a prompt can have; write {told}")
        return blocks

    return AfterValidator(known)


def _in_utc(value: datetime) -> datetime:
    if value.tzinfo is None:
        raise ValueError(f"{value} has no time zone; write for example {value.isoformat()}Z")
    return value.astimezone(UTC)


class FeedbackRule(Settings):
    """One rule of how raw columns become feedback; the first rule that matches a row decides."""

    feedback: Literal["positive", "negative", "neutral", "exclude"]
    """What a matching row becomes; `exclude` drops it (a reason that is not taste)."""
    when: str
    """A condition over raw columns: comparisons, `and`, `or`, `not`, `in [...]`, e.g. `rating <= 2`."""

    @field_validator("when")
    @classmethod
    def _in_the_grammar(cls, value: str) -> str:
        parsed(value)
        return value


class InteractionSettings(Settings):
    """What users did."""

    path: Location
    """A Parquet, CSV (.csv) or JSON lines (.jsonl) file, or a folder of files of one kind, any fsspec URL."""
    columns: Annotated[dict[str, str], _names("user_id", "item_id", "timestamp", "feedback")] = {}
    """Our column name -> the file's, for example `{item_id = "video_id"}`."""
    rules: tuple[FeedbackRule, ...] = ()
    """Rules over raw columns, in order; rows that none matches are neutral. Empty: the feedback column is read."""
    max_unknown_item_share: Share = 0.01
    """Interactions whose item the catalogue lacks are dropped and counted; above this share that is an error."""
    max_clock_skew_hours: Annotated[float, Field(ge=0, le=8760)] = 1.0
    """Events may lie this far ahead of now: clocks of devices differ."""
    max_future_share: Share = 0.0
    """Events later than that are dropped and counted; above this share, and at 0 for a single one, that is an error."""
    now: datetime | None = None
    """The time that counts as now, with its time zone, where a past night is replayed; unset: this machine's clock."""

    @field_validator("now")
    @classmethod
    def _now_has_zone(cls, value: datetime | None) -> datetime | None:
        return None if value is None else _in_utc(value)


class ItemSettings(Settings):
    """What items are."""

    path: Location
    """A Parquet, CSV (.csv) or JSON lines (.jsonl) file, or a folder of files of one kind, any fsspec URL."""
    columns: Annotated[dict[str, str], _names("item_id", "text", "category", "embedding")] = {}
    """Our column name -> the file's."""


class TimelineSettings(Settings):
    """The cut between training and evaluation, and the length of the future window."""

    cut: datetime
    """T0, with its time zone. Training reads nothing after it; the first evaluation anchor lies at it."""
    horizon_days: Annotated[Days, Field(gt=0)] = 7.0
    """Length of the future window (t, t + horizon]."""
    validation_days: Annotated[Days, Field(gt=0)] = 2.0
    """The first validation anchor lies this long before the cut; others follow every horizon, windows until the cut."""
    validation_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of users, by a stable hash, whose validation anchors decide: less of them where measuring all is slow."""
    refit: bool = True
    """Train once more on everything until the cut, once the validation anchors have decided. false: the training until
    the validation time is served, in half the time; it has not read the last `validation_days`."""
    min_history: Positive = 5
    """An evaluation anchor needs this many distinct items in its history, one of them negative and one positive."""
    max_anchors_per_user: Positive = 4
    """Training anchors taken from one user, spread evenly over the user's rejections."""

    @field_validator("cut")
    @classmethod
    def _cut_has_zone(cls, value: datetime) -> datetime:
        return _in_utc(value)

    @property
    def cut_us(self) -> int:
        """The cut in microseconds since 1970."""
        return round(self.cut.timestamp() * 1e6)

    @property
    def horizon_us(self) -> int:
        """The future window in microseconds."""
        return round(self.horizon_days * DAY_US)

    @property
    def learned_until(self) -> datetime:
        """What the served policy has read ends here: at the cut, or without a refit at the validation time."""
        return self.cut if self.refit else self.cut - timedelta(days=self.validation_days)

    @property
    def validation_us(self) -> int:
        """The validation anchor in microseconds since 1970."""
        return self.cut_us - round(self.validation_days * DAY_US)


class SwingSettings(Settings):
    """Collaborative neighbours on the graph of rejections (METHOD: Swing)."""

    alpha1: Annotated[float, Field(gt=0)] = 5.0
    """Smoothing of a user's weight w_u = 1 / (alpha1 + |I_u|)^theta."""
    theta: Annotated[float, Field(gt=0)] = 0.35
    """How much heavy users count less."""
    alpha2: Annotated[float, Field(gt=0)] = 1.0
    """Smoothing of the pair's overlap."""
    neighbours: Positive = 10
    """Neighbours kept per item."""
    min_support: Count = 5
    """Pairs of items with no more common users than this have no edge; 1-2 on small data."""
    max_users_per_item: Positive = 500
    """Users sampled per item: the cost is the sum of squared common users."""


class EmbeddingSettings(Settings):
    """Where item embeddings come from; several sources are normalised and concatenated."""

    sources: tuple[Literal["text", "column", "behaviour"], ...] = ("text",)
    """Any of `text`, `column`, `behaviour`."""
    weights: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """One factor per source, applied after normalisation; empty: all 1."""
    encoder: NameOrPath = "sentence-transformers/all-MiniLM-L6-v2"
    """Hugging Face name or path of the text encoder (mean pooling)."""
    text: Literal["text", "category"] = "text"
    """The item column that the encoder reads."""
    max_tokens: Positive = 128
    """Texts are cut after this many tokens, at most as many as the encoder has positions for."""
    batch_size: Positive = 64
    """Texts encoded at once."""
    behaviour_dim: Positive = 64
    """Dimensions of the behaviour embedding (truncated SVD of the positive pointwise mutual information)."""

    @model_validator(mode="after")
    def _sources_once(self) -> EmbeddingSettings:
        if not self.sources or len(set(self.sources)) != len(self.sources):
            raise ValueError('sources must name each source once, for example ["text", "behaviour"]')
        if self.weights and len(self.weights) != len(self.sources):
            raise ValueError(f"weights has {len(self.weights)} entries for {len(self.sources)} sources; give one each")
        return self


class QuantizerSettings(Settings):
    """Residual quantisation of item embeddings into semantic IDs."""

    kind: Literal["rqvae", "residual_kmeans"] = "residual_kmeans"
    """RQ-VAE trains an encoder and a decoder; residual k-means trains no network."""
    levels: Annotated[int, Field(ge=1, le=8)] = 3
    """Codes per semantic ID."""
    codes: Annotated[int, Field(ge=2, le=65_536)] = 256
    """Codebook size per level."""
    latent_dim: Positive = 32
    """RQ-VAE: latent dimensions."""
    hidden: tuple[Positive, ...] = (256, 128)
    """RQ-VAE: widths of the encoder's hidden layers; the decoder mirrors them."""
    epochs: Positive = 200
    """RQ-VAE: passes over the items."""
    batch_size: Positive = 1024
    """RQ-VAE: items per step."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """RQ-VAE: AdamW learning rate."""
    commitment: Annotated[float, Field(ge=0)] = 0.25
    """RQ-VAE: weight of the commitment loss."""
    iterations: Positive = 25
    """k-means iterations (both kinds; RQ-VAE starts its codebooks with k-means)."""


class CatalogueSettings(Settings):
    """When the catalogue has aged: its codebook is frozen, and new items are encoded with it."""

    max_new_share: Share = 0.2
    """Above this share of items that the codebook was not fitted on, a night advises to fit another one."""
    max_reconstruction_loss: Share = 0.1
    """Likewise where new items' reconstruction cosine lies further below that of the fitted ones than this."""


class PolicySettings(Settings):
    """Which policy the night, the evaluation and `show` take."""

    version: str | None = None
    """Pins one of `<root>/policy/`, with the settings that it was trained with; unset: the newest that agrees."""


class ModelSettings(Settings):
    """The language model: a pretrained checkpoint, or a small one from scratch."""

    name_or_path: NameOrPath | None = None
    """Hugging Face name or path; unset: a random Llama of the sizes below with a word tokenizer of its own."""
    hidden_size: Positive = 128
    """From scratch: width."""
    layers: Positive = 4
    """From scratch: transformer blocks."""
    heads: Positive = 4
    """From scratch: attention heads."""
    intermediate_size: Positive = 384
    """From scratch: width of the feed-forward layers."""
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.15
    """From scratch: share of the attention left out in supervised training."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights and arithmetic; bfloat16 is slower on a CPU without it."""

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelSettings:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of heads {self.heads}")
        return self


class LoraSettings(Settings):
    """Low-rank adapters; the new token rows are trained beside them."""

    rank: Positive = 16
    """Rank of the update."""
    alpha: Positive = 32
    """Scale: the update is multiplied by alpha / rank."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers that get an adapter."""


class PromptSettings(Settings):
    """Typed, separately truncated blocks of history."""

    recent_days: Annotated[Days, Field(gt=0)] = 3.0
    """Rejections younger than this are `recently rejected`."""
    max_negatives: Positive = 24
    """Rejections kept, newest first; they get their budget before anything else."""
    max_events: Positive = 48
    """Events of all kinds kept; what the rejections leave is for likes, then for items merely shown."""

    @model_validator(mode="after")
    def _budgets(self) -> PromptSettings:
        if self.max_negatives > self.max_events:
            raise ValueError(f"max_negatives {self.max_negatives} exceeds max_events {self.max_events}; lower it")
        return self


SUPERVISED_TASKS = ("translation", "alignment", "warm_up", "next_negative")
"""Names of the phases before GRPO."""


class SupervisedSettings(Settings):
    """Translation, item-level alignment and warm-up, in this order."""

    translation_epochs: Annotated[float, Field(ge=0)] = 1.0
    """Passes over the items, both directions each."""
    alignment_epochs: Annotated[float, Field(ge=0)] = 1.0
    """Passes over the alignment questions."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 2.0
    """Passes over the events."""
    warmup_target: Literal["events", "next_negative"] = "events"
    """`events`: every event of the stream is a target; `next_negative`: only the next rejection after a prompt."""
    warmup_blocks: Annotated[
        tuple[Literal["negatives", "positives"], ...], _histories(("negatives",), ("negatives", "positives"))
    ] = ("negatives", "positives")
    """`next_negative`: history in the prompt, `["negatives"]` or `["negatives", "positives"]`."""
    event_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """`events`: share of the events left out of a pass, other ones each time: few histories, many passes."""
    tokens_per_step: Positive = 8192
    """Tokens in a step over all workers."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak AdamW learning rate; linear warm-up over 5 % of the steps, then a cosine to a tenth."""
    alignment_unit: Literal["item", "semantic_id", "prefix", "category"] = "prefix"
    """What a user must have rejected repeatedly to make an alignment question."""
    alignment_min_rejections: Positive = 2
    """How often."""
    alignment_holdout: Share = 0.2
    """Share of questions (by user) kept to measure forgetting."""


class GrpoStage(Settings):
    """One stage of progressive GRPO."""

    name: str
    """Shown in metrics and plots."""
    blocks: Annotated[
        tuple[Literal["recent", "negatives", "positives"], ...],
        _histories(("recent",), ("negatives",), ("negatives", "positives")),
    ]
    """History in the prompt: `["recent"]`, `["negatives"]`, `["negatives", "positives"]`."""
    steps: Positive
    """Optimiser steps."""
    beta: Annotated[float, Field(ge=0)]
    """Weight of the KL divergence to the policy at the start of the stage; `s_dpo`: factor on the log-ratios to it."""
    objective: Literal["grpo", "s_dpo"] = "grpo"
    """`s_dpo` generates nothing: it prefers an observed rejection to at most min(group_size - 1, 8) likes."""

    @model_validator(mode="after")
    def _s_dpo_needs_beta(self) -> GrpoStage:
        if self.objective == "s_dpo" and not self.beta:
            raise ValueError("beta = 0 takes the gradient from an s_dpo stage; write for example beta = 0.1")
        return self


DEFAULT_STAGES = (
    GrpoStage(name="recent", blocks=("recent",), steps=50, beta=0.2),
    GrpoStage(name="negatives", blocks=("negatives",), steps=50, beta=0.2),
    GrpoStage(name="all", blocks=("negatives", "positives"), steps=100, beta=0.2),
)


class GrpoSettings(Settings):
    """Progressive GRPO against what users rejected in the following days."""

    group_size: Annotated[int, Field(ge=2)] = 16
    """Distinct completions per prompt."""
    prompts_per_step: Positive = 48
    """Prompts per step over all workers."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """AdamW learning rate."""
    std_floor: Annotated[float, Field(gt=0)] = 0.25
    """Advantages are divided by max(standard deviation, std_floor): with less of a floor, groups without a whole hit
    would push as hard as those with one."""
    min_reward_range: Annotated[float, Field(ge=0)] = 1e-3
    """Groups whose rewards lie within this range are skipped."""
    reward: Literal["similarity", "sharpened", "threshold", "prefix", "marginal"] = "prefix"
    """`similarity` is the paper's; `sharpened` exp((sim - 1)/.15); `threshold` at .6; `prefix` the hit ladder, 1 for
    all codes and a tenth for each less, down to the first; `marginal` the hit ladder paid only for what a completion
    adds to its group."""
    gamma: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the penalty for future positives; 0: negatives only."""
    targets: Literal["window", "next_negative"] = "window"
    """What is rewarded: all rejections of the window and their Swing neighbours, or the next rejection alone."""
    kappa: Share = 0.1
    """Weight of Swing neighbours in the ground-truth set; observed rejections weigh 1."""
    stages: tuple[GrpoStage, ...] = DEFAULT_STAGES
    """The stages in order."""
    evaluate_every: Positive = 25
    """Steps between measurements on validation anchors; a stage keeps its best checkpoint by them."""
    tolerance: Share = 0.02
    """A stage is rejected when validation FHR@K falls by more than this share. At 1 no stage is rejected, whatever it
    loses and even if chance explains its gain: its best measured state stands."""

    @model_validator(mode="after")
    def _stages_are_told_apart(self) -> GrpoSettings:
        names = [stage.name for stage in self.stages]
        for name in names:
            if not name or "/" in name:
                raise ValueError(f'stage {name!r} gives a file its name; write one without "/", for example "all"')
            if name in SUPERVISED_TASKS:
                raise ValueError(f"stage {name!r} has the name of a supervised task; write another")
            if names.count(name) > 1:
                raise ValueError(f"stages have the name {name!r} in common; write another for each")
        return self


class TrainSettings(Settings):
    """Ray Train."""

    workers: Positive = 1
    """Training workers; gloo between CPUs, NCCL between GPUs."""
    use_gpu: bool = False
    """One GPU a worker."""
    cpus_per_worker: Positive = 2
    """Cores a worker."""
    node_resource: str | None = None
    """Name of a custom Ray resource that only the nodes meant for training offer; a worker takes 1 of it."""
    tokens_at_once: Positive | None = None
    """Positions that a worker computes at once, padding included, in steps and measurements: what bounds the memory.
    A step is cut into as many pieces as that takes, whose gradients add up to the whole step's. Without it 8,192 on a
    CPU, and on a GPU what fits its memory, at most 65,536."""
    recompute_layers: bool = False
    """A layer keeps its input alone, and is computed again for the gradient: less memory a token, a third more time.
    For a model of which `tokens_at_once` cannot be made small enough, or would leave a GPU idle."""
    checkpoint_every: Positive = 50
    """Steps between checkpoints."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Restarts from the last checkpoint before giving up; -1: for ever. A setting at fault is told at once."""


class GenerateSettings(Settings):
    """What the model generates per user, and with which engine."""

    engine: Literal["vllm", "torch"] = "vllm"
    """`vllm` for the night; `torch` is the decoding that training and evaluation use."""
    beam_width: Positive = 20
    """Semantic IDs generated per user, and judged. 100 catch no more on the example and cost 2.2 times as much, 200
    cost 5.4 times (benchmarks/candidates.py)."""
    min_similarity: Annotated[float, Field(gt=0, le=1)] = 0.8
    """A blocked item that lies at least so near a generated ID says which one."""
    keep_days: Days = 7.0
    """A user whose prompt and likes stay keeps the generated row of an earlier night. Where semantic IDs have come or
    gone since, for half of so many days or more, up to all, drawn by user and row, less the IDs that are gone, unless
    more than half of a row's go in one night; 0: not at all."""
    max_users: Positive | None = None
    """Only so many users, the most recently active first; unset: all."""
    batch_size: Positive = 64
    """Users per call of the engine."""
    engines: Positive = 1
    """Ray Data actors, one engine each."""
    cpus_per_engine: Positive = 1
    """Cores per engine."""
    use_gpu: bool = False
    """One GPU an engine."""
    tensor_parallel: Positive = 1
    """vLLM: GPUs of one node that an engine's model is cut over, for a model that fits none; a process each, with
    `cpus_per_engine` cores. Of a model that fits, more engines do more."""
    node_resource: str | None = None
    """Name of a custom Ray resource that only the nodes meant for generating offer; an engine takes 1 of it."""
    kv_cache_gib: Annotated[float, Field(gt=0)] = 1.0
    """vLLM on CPU: memory of the KV cache at most; it takes what the prompts of one step need."""
    gpu_memory_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """vLLM on GPU: share of the device memory; the beams take of the rest."""


class GuardrailSettings(Settings):
    """What no blocklist may do."""

    protect_days: Annotated[Days, Field(gt=0)] = 90.0
    """An item liked within this many days is never blocked: the allow-list wins."""
    max_items_per_user: Positive = 100
    """Longest blocklist; explicit rejections first, then by score."""
    max_catalogue_share: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Largest share of the catalogue blocked for one user."""
    max_user_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """An item predicted for more than this share of users is held back and reported: it protects who made it, and lets
    through what nearly everybody rejects; 1: off."""
    min_negatives: Positive = 1
    """Users with fewer rejections get nothing predicted."""
    min_history: Positive = 5
    """Users whose history has fewer distinct items get nothing predicted: too little is known of them."""
    predicted_days: Annotated[Days, Field(gt=0)] = 7.0
    """A predicted row blocks for this many days."""
    predicted_demote_days: Days = 7.0
    """Then it demotes, by less each day, for this many days; 0: it ends at once."""
    explicit_days: Annotated[Days, Field(gt=0)] = 90.0
    """A row for an explicit rejection blocks until this many days after the rejection."""
    explicit_demote_days: Days = 0.0
    """Then it demotes for this many days."""


class ScoreSettings(Settings):
    """What ranks candidates: the log odds that a user rejects an item, and how likely it is met; both are fitted."""

    reach: Annotated[float, Field(ge=0)] = 0.3
    """How much exposure counts beside the odds. A row only matters when its item would be shown: a larger reach makes
    lists shorter for what they catch."""


class CalibrationSettings(Settings):
    """The threshold on the score by conformal risk control."""

    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Largest admitted share of what a user will like that is blocked."""
    max_users: Positive = 2000
    """Users whom the policy is asked about: half of them fit what it says into the score, the others calibrate."""
    strata: tuple[Count, ...] = (3, 10)
    """Borders of user activity (rejections in the history) between strata."""


class ReleaseSettings(Settings):
    """Whom a version is for."""

    share: Share = 1.0
    """Share of users that get predictions, by a stable hash: a larger share contains a smaller one."""
    shadow: bool = False
    """Published under the second pointer, SHADOW.json: serving logs what it would hide and hides nothing by it."""

    @property
    def pointer(self) -> Literal["current", "shadow"]:
        """What names the version."""
        return "shadow" if self.shadow else "current"


class PublishSettings(Settings):
    """What is published, and limits of the audit before the pointer is swapped."""

    max_failed_share: Share = 0.01
    """Share of users whose generation may fail."""
    min_coverage: Share = 0.99
    """Share of input users that must appear in the output of the generation."""
    max_size_change: Annotated[float, Field(ge=1)] = 2.0
    """Largest factor, up or down, between the rows of two versions in a row, explicit and predicted ones apart."""
    min_overlap: Share = 0.25
    """Share of the predicted rows of the version before that must still be there, of users with predictions in both:
    a third of what nights of one policy share on the example (`conrec simulate`: .83 and .86)."""
    buckets: Positive = 8
    """Parquet files of a version, by a stable hash of the user. A night holds the users of one at a time: of 10,000 to
    100,000 each."""
    holdout_share: Share = 0.01
    """Share of users, always the same ones, with nothing predicted: the next training learns from what they see."""
    redis_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] = "conrec"
    """What the keys of `conrec export redis` begin with, before a colon; systems that share a Redis have one each."""
    release: ReleaseSettings = ReleaseSettings()
    """`[publish.release]`: a canary or a shadow."""


class NightlySettings(Settings):
    """When a night warns, refuses its log, and stops to generate.

    The limits on the log compare its last day with that of the night before; `conrec nightly` refuses beyond one,
    before it generates. Day by day the example's log moves by 1.34, .06 and 0 at most.
    """

    max_day_factor: Annotated[float, Field(ge=1)] = 1.8
    """Largest factor, up or down, between the events of two days: less than half a day that is missing, or a day that
    was written twice."""
    max_share_shift: Annotated[float, Field(gt=0, le=1)] = 0.2
    """How far the share of a kind of events may move, or that of repeated events, new users or new items rise."""
    max_past_change: Annotated[float, Field(ge=0)] = 0.25
    """Share of the events until the night before that may come late, or be gone."""
    max_policy_days: Annotated[Days, Field(gt=0)] = 30.0
    """A policy whose training ended longer ago than this, seen from the newest event, is a warning."""
    deadline: time | None = None
    """A time of day with its zone, `"05:00Z"` or `"06:00+01:00"`: from the first one after the night begins, no batch
    of users is begun. What is there is audited and published, which takes its time; the others keep what an earlier
    night generated for them, and the next run goes on with them. An hour, not a length: tries of one night share it.
    Unset: everybody is generated."""
    on_failure: tuple[str, ...] = ()
    """A command that is run where a night fails, word by word, without a shell: `["/opt/oncall/page", "conrec"]`. The
    message is on its standard input, CONREC_ERROR and CONREC_LOG are in its environment, and it has a minute."""

    @field_validator("on_failure", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        if isinstance(value, str) or (isinstance(value, list | tuple) and not all(value)):
            raise ValueError(f'{value!r} goes through no shell; write a list of words, for example ["/opt/page", "me"]')
        return value

    @field_validator("deadline", mode="before")
    @classmethod
    def _deadline_is_no_number(cls, value: Any) -> Any:
        if isinstance(value, int | float):  # of which pydantic would make seconds after midnight
            raise ValueError(f'{value!r} is no time of day; write for example "05:30Z"')
        return value

    @field_validator("deadline")
    @classmethod
    def _deadline_has_zone(cls, value: time | None) -> time | None:
        if value is not None and value.tzinfo is None:
            raise ValueError(f'{value} has no time zone; write for example "{value:%H:%M}Z"')
        return value

    def ends_at(self, now: datetime) -> datetime | None:
        """The first deadline after a moment, None where there is none; both with their zone."""
        if self.deadline is None:
            return None
        local = now.astimezone(self.deadline.tzinfo)
        today = datetime.combine(local, self.deadline)
        return today if today > local else today + timedelta(days=1)


class EvaluationSettings(Settings):
    """How it is measured."""

    systems: Literal["floors", "ours", "all"] = "ours"
    """`floors`: without a policy; `ours`: the policy before and after GRPO, too; `all`: every system to beat, hours."""
    max_anchors: Positive | None = None
    """Only so many evaluation anchors; unset: all."""
    responsiveness_anchors: Positive = 1000
    """Users whose list is generated again with one more event."""
    resamples: Positive = 1000
    """Bootstrap resamples by user."""
    long_tail_user: Positive = 3
    """Users with fewer rejections in the history are long-tail."""
    long_tail_item: Positive = 5
    """Items with fewer rejections in training are long-tail."""


class Config(Settings):
    """The settings of one run."""

    root: Location
    """Folder that every stage writes to, any fsspec URL."""
    seed: Annotated[Count, Field(lt=2**63)] = 0
    """Seed of everything that draws random numbers."""
    interactions: InteractionSettings
    items: ItemSettings
    timeline: TimelineSettings
    swing: SwingSettings = SwingSettings()
    embedding: EmbeddingSettings = EmbeddingSettings()
    quantizer: QuantizerSettings = QuantizerSettings()
    catalogue: CatalogueSettings = CatalogueSettings()
    policy: PolicySettings = PolicySettings()
    model: ModelSettings = ModelSettings()
    lora: LoraSettings | None = None
    prompt: PromptSettings = PromptSettings()
    supervised: SupervisedSettings = SupervisedSettings()
    grpo: GrpoSettings = GrpoSettings()
    train: TrainSettings = TrainSettings()
    generate: GenerateSettings = GenerateSettings()
    guardrails: GuardrailSettings = GuardrailSettings()
    score: ScoreSettings = ScoreSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    publish: PublishSettings = PublishSettings()
    nightly: NightlySettings = NightlySettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _possible(self) -> Config:
        if self.lora is not None and self.model.name_or_path is None:
            raise ValueError("[lora] adapts a pretrained model: set model.name_or_path, or remove [lora]")
        if self.grpo.prompts_per_step % self.train.workers:
            raise ValueError(
                f"grpo.prompts_per_step {self.grpo.prompts_per_step} is not a multiple of train.workers "
                f"{self.train.workers}; write a multiple"
            )
        if self.generate.tensor_parallel > 1 and self.generate.engine == "torch":
            raise ValueError(
                f"generate.tensor_parallel = {self.generate.tensor_parallel} cuts vLLM's model: write 1, or "
                'generate.engine = "vllm"'
            )
        head_size = self.model.hidden_size // self.model.heads
        if self.model.name_or_path is None and self.generate.engine == "vllm" and head_size not in VLLM_HEAD_SIZES:
            raise ValueError(
                f"model.hidden_size / model.heads = {head_size} is no head that vLLM computes; make it one of "
                f'{", ".join(map(str, VLLM_HEAD_SIZES))}, or write generate.engine = "torch"'
            )
        return self


def load_settings(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads a TOML file and applies `section.key=value` overrides.

    `base = "other.toml"` as a first line takes the settings of that file, found from this one, and puts these in their
    place, key by key; a list is one value. Relative local paths of inputs are relative to the working directory, as on
    any command line.
    Raises `ConfigError` naming the file, the key, the value and the remedy.
    """
    data = _read(path)
    if "base" in data:
        named, data = f"{path} over its base {data['base']}", _over_its_base(path, data)
    else:
        named = str(path)
    set_at = {_apply_override(data, override): override for override in overrides}
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(named, set_at, detail) for detail in error.errors())) from None


def _read(path: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such settings file; start from examples/kuairand/conrec.toml") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r:.200} cannot be read as a settings file: {error!s:.200}") from None


def _over_its_base(path: str | Path, data: dict[str, Any]) -> dict[str, Any]:
    name = data["base"]
    if not isinstance(name, str):
        raise ConfigError(f"{path}: base = {name!r}: write the path of another settings file")
    below = _read(Path(path).parent / name)
    if "base" in below:
        raise ConfigError(f"{path}: base = {name!r} has a base itself; name {below['base']!r}, and copy what differs")
    return _laid_over(below, {key: value for key, value in data.items() if key != "base"})


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = below | above
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            both[key] = _laid_over(below[key], value)
    return both


def _apply_override(data: dict[str, Any], override: str) -> tuple[str, ...]:
    """The place that it sets."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: write section.key=value, for example --set grpo.group_size=16")
    place = tuple(key.strip().split("."))
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    if not isinstance(value, str | list | dict) and _takes_text(_annotation(place)):
        value = text.strip()  # a version such as 123456789012 or 1234e5678901
    *sections, name = place
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
    data[name] = value
    return place


def _explain(path: str | Path, set_at: dict[tuple[str, ...], str], detail: Any) -> str:
    """One line per refused value: file, what `--set` put at, above or below the key, key, value, what to write."""
    given = [override for place, override in set_at.items() if all(map(eq, place, detail["loc"]))]
    if given:
        path = f"{path} with --set {' --set '.join(given)}"
    location = ".".join(str(part) for part in detail["loc"]) or "(whole file)"
    if detail["type"] == "extra_forbidden":
        hint = _meant(str(detail["loc"][-1]), _fields(_annotation(detail["loc"][:-1])))
        return f"{path}: unknown key {location}; {hint}"
    if detail["type"] == "missing":
        return f"{path}: {location} is missing; add it"
    return f"{path}: {explained(detail)}"


def explained(detail: Any) -> str:
    """Key, value and what to write, of one refused value as pydantic tells it."""
    location = ".".join(str(part) for part in detail["loc"]) or "(whole file)"
    message = detail["msg"].removeprefix("Value error, ")
    value = "" if detail["type"] == "value_error" else f" = {detail['input']!r}"
    return f"{location}{value}: {message}"


def _annotation(place: tuple[str | int, ...]) -> Any:
    """What the settings take at a place; None where they have none."""
    annotation: Any = Config
    for part in place:
        fields = _fields(annotation)
        if not fields:  # the values of `columns`
            annotation = next(reversed(get_args(annotation)), None)
        elif isinstance(part, str):
            annotation = fields[part].annotation if part in fields else None
    return annotation


def _fields(annotation: Any) -> dict[str, FieldInfo]:
    """Of the section that an annotation is, may be or is a list of; without one none."""
    kinds = (annotation, *get_args(annotation))
    return next((kind.model_fields for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), {})


def _takes_text(annotation: Any) -> bool:
    return annotation is str or any(map(_takes_text, get_args(annotation)))
