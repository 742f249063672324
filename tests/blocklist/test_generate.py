"""Both engines against exhaustive scoring by plain transformers; a night that is killed and resumes."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from tiny_policy import CODES, LEVELS, SEMANTIC_IDS, TRIE, committed, make_prompts, prompts_table, save_tiny
from transformers import LlamaForCausalLM

from conrec import storage
from conrec.blocklist import generate
from conrec.blocklist.batches import generate_batch, judged_beams, require_finite
from conrec.blocklist.engines import Engine, TorchEngine, VllmEngine, open_engine, require_cache
from conrec.blocklist.generate import committed_files, generate_night
from conrec.blocklist.vllm_model import EngineGoneError, told_of_start
from conrec.config import GenerateSettings
from conrec.errors import ArtefactError, ConfigError, StorageError
from conrec.policy.prompts import CACHE_BLOCK
from conrec.policy.vocabulary import Vocabulary
from conrec.progress import progress
from conrec.ragged import Ragged
from conrec.tables import GENERATED

pytestmark = pytest.mark.long

SETTINGS = GenerateSettings(beam_width=9, batch_size=8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    save_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def torch_engine(checkpoint: Path) -> TorchEngine:
    return TorchEngine.load(checkpoint, TRIE)


@pytest.fixture(scope="module")
def vllm_engine(checkpoint: Path) -> VllmEngine:
    return VllmEngine(checkpoint, TRIE, SETTINGS, threads=1)


@pytest.fixture(params=["torch", "vllm"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.getfixturevalue(f"{request.param}_engine")


def plain_log_probs(checkpoint: Path, vocabulary: Vocabulary, prompt: np.ndarray) -> np.ndarray:
    """Every leaf by a forward of its own, each step a softmax over a dictionary of the allowed codes."""
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    ids = [tuple(row) for row in TRIE.semantic_ids.tolist()]
    scores = []
    for semantic_id in ids:
        tokens = torch.tensor([[*prompt.tolist(), *vocabulary.code_tokens(np.array(semantic_id)).tolist()]])
        with torch.no_grad():
            logits = model(tokens).logits[0, len(prompt) - 1 :].double()
        total = 0.0
        for level in range(LEVELS):
            allowed = {one[level] for one in ids if one[:level] == semantic_id[:level]}
            step = {code: logits[level, vocabulary.first_code_token + level * CODES + code].item() for code in allowed}
            total += step[semantic_id[level]] - np.logaddexp.reduce(list(step.values()))
        scores.append(total)
    return np.array(scores)


def test_engines_equal_exhaustive_scoring(checkpoint: Path, engine: Engine) -> None:
    # 32 fills a cache block, 16 half of one, 45 is odd; more beams than leaves make the search exact.
    prompts = make_prompts(engine.vocabulary, 2 * CACHE_BLOCK, 16, 45)
    leaves, log_probs = engine.generate(prompts, len(TRIE) + 3)
    for row in range(3):
        expected = plain_log_probs(checkpoint, engine.vocabulary, prompts[row])
        assert leaves[row, : len(TRIE)].tolist() == np.argsort(-expected, kind="stable").tolist()
        np.testing.assert_allclose(log_probs[row, : len(TRIE)], np.sort(expected)[::-1], atol=1e-4)
    assert (leaves[:, len(TRIE) :] == -1).all() and np.isneginf(log_probs[:, len(TRIE) :]).all()
    given = np.array([[4, 0, -1], [7, 8, 9], [1, -1, 2]])
    scores = engine.score(prompts, given)
    assert np.isneginf(scores[given < 0]).all()
    for row in range(3):
        expected = plain_log_probs(checkpoint, engine.vocabulary, prompts[row])
        real = given[row] >= 0
        np.testing.assert_allclose(scores[row, real], expected[given[row, real]], atol=1e-4)


def plain_verdict(checkpoint: Path, vocabulary: Vocabulary, prompt: np.ndarray, leaf: int) -> float:
    """From the whole softmax after prompt and ID."""
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    tokens = torch.tensor([[*prompt.tolist(), *vocabulary.code_tokens(TRIE.semantic_ids[leaf]).tolist()]])
    with torch.no_grad():
        log_probs = model(tokens).logits[0, -1].double().log_softmax(-1)
    return (log_probs[vocabulary.rejected] - log_probs[vocabulary.liked]).item()


def test_engines_judge_as_a_plain_forward_does(checkpoint: Path, engine: Engine) -> None:
    """Tolerance 1e-4. The last prompt is the longest that the engine takes."""
    prompts = make_prompts(engine.vocabulary, 2 * CACHE_BLOCK, 45, engine.longest_prompt)
    assert engine.longest_prompt == 256 - LEVELS - 1
    given = np.array([[4, 0, -1], [7, 4, 7], [-1, 2, 9]])
    scores, judged = engine.score_and_judge(prompts, given)
    assert judged.dtype == np.float32 and (judged[given < 0] == 0).all()
    for row, at in np.argwhere(given >= 0).tolist():
        expected = plain_verdict(checkpoint, engine.vocabulary, prompts[row], given[row, at])
        assert judged[row, at] == pytest.approx(expected, abs=1e-4)
    np.testing.assert_allclose(scores, engine.score(prompts, given), atol=1e-5)
    leaves, log_probs, found = engine.generate_and_judge(prompts, len(TRIE) + 3)
    for wanted, one in zip(engine.generate(prompts, len(TRIE) + 3), (leaves, log_probs), strict=True):
        np.testing.assert_allclose(one, wanted, atol=1e-5)
    np.testing.assert_allclose(found, engine.score_and_judge(prompts, leaves)[1], atol=1e-4)


def test_narrow_beams_agree_between_engines(torch_engine: TorchEngine, vllm_engine: VllmEngine) -> None:
    prompts = make_prompts(torch_engine.vocabulary, 64, 32, 96, 7, 200, 33)
    for width in (1, 4, 9):
        leaves, log_probs = torch_engine.generate(prompts, width)
        same, close = vllm_engine.generate(prompts, width)
        assert same.tolist() == leaves.tolist()
        np.testing.assert_allclose(close, log_probs, atol=1e-4)


def test_prompts_beyond_a_step_and_beyond_the_cache_are_those_of_the_other_engine(
    checkpoint: Path, torch_engine: TorchEngine, vllm_engine: VllmEngine
) -> None:
    """More tokens than vLLM computes in a step, and a cache that holds one prompt at a time. Tolerance 1e-4."""
    prompts = make_prompts(torch_engine.vocabulary, *([32, 200, 7, 96] * 15))
    one_prompt = SETTINGS.model_copy(update={"kv_cache_gib": 1.3 * 2 * 2 * 2 * 32 * 256 * 4 / 2**30})
    leaves, log_probs, judged = torch_engine.generate_and_judge(prompts, 4)
    for engine in (vllm_engine, VllmEngine(checkpoint, TRIE, one_prompt, threads=1)):
        found = engine.generate_and_judge(prompts, 4)
        assert found[0].tolist() == leaves.tolist()
        np.testing.assert_allclose(found[1], log_probs, atol=1e-4)
        np.testing.assert_allclose(found[2], judged, atol=1e-4)


def test_other_tokens_than_those_asked_for_are_an_engine_gone(vllm_engine: VllmEngine) -> None:
    prompts = make_prompts(vllm_engine.vocabulary, 32, 45)
    model = vllm_engine.model
    compute = model._compute
    try:
        model._compute = lambda given: compute(given.take(np.array([1, 0])))
        with pytest.raises(EngineGoneError, match="in another order"):
            vllm_engine.generate(prompts, 4)
    finally:
        model._compute = compute


def test_a_model_of_which_vllm_computes_something_else_is_refused(checkpoint: Path, vllm_engine: VllmEngine) -> None:
    """Of the layers, the last state and the scale of the keys, one that differs is enough; so is what follows."""
    model, head = vllm_engine.model, vllm_engine.model.head
    prompt = make_prompts(vllm_engine.vocabulary, 45)[0]
    plain = LlamaForCausalLM.from_pretrained(checkpoint)
    try:
        model.take(plain, prompt)
        for change in ("model.norm.weight", "model.layers.1.self_attn.k_proj.weight"):
            other = copy.deepcopy(plain)
            other.get_parameter(change).data.mul_(1.1)
            with pytest.raises(ConfigError, match=r"write generate\.engine = 'torch'"):
                model.take(other, prompt)
        deeper, fewer = copy.deepcopy(plain.config), copy.deepcopy(plain.config)
        deeper.num_hidden_layers += 1
        fewer.num_key_value_heads //= 2
        for config, told in ((deeper, "tells what 2 of its 3 layers attend to"), (fewer, "computes something else")):
            with pytest.raises(ConfigError, match=told + r".*write generate\.engine = 'torch'"):
                model.take(LlamaForCausalLM(config), prompt)
        # Prompts are vLLM's own attention; what follows them is not.
        last, scale = [one for one in model.layers.modules() if hasattr(one, "impl")][-1], plain.config.head_dim**-0.5
        last.impl.scale = 2 * scale
        try:
            with pytest.raises(ConfigError, match=r"something else .*write generate\.engine = 'torch'"):
                model.take(plain, prompt)
        finally:
            last.impl.scale = scale
    finally:
        model.head = head


def test_a_cache_too_small_for_a_prompt_is_told_before_the_engine_and_by_it(checkpoint: Path) -> None:
    model = json.loads((checkpoint / "config.json").read_text())
    # Keys and values of 2 layers, 2 heads of 32 and 256 tokens, four bytes each.
    needed = 2 * 2 * 2 * 32 * 256 * 4 / 2**30
    small = SETTINGS.model_copy(update={"kv_cache_gib": needed * 0.99})
    with pytest.raises(ConfigError, match=r"generate.kv_cache_gib = .* holds no prompt of 256 tokens"):
        require_cache(model, small)
    with pytest.raises(ConfigError, match=r"generate.kv_cache_gib = .* leaves vLLM too little memory"):
        VllmEngine(checkpoint, TRIE, small, threads=1)
    require_cache(model, SETTINGS.model_copy(update={"kv_cache_gib": needed}))
    require_cache(model | {"sliding_window": 32}, small)  # needs less, which vLLM knows
    require_cache({"n_embd": 768, "n_head": 12}, small)  # whose sizes vLLM reads
    require_cache(model, small.model_copy(update={"engine": "torch"}))


@pytest.mark.parametrize(
    ("why", "told"),
    [
        (
            # As vLLM 0.32 words it.
            "Free memory on device cuda:0 (19.1/79.2 GiB) on startup is less than desired GPU memory utilization (0.5, "
            "39.6 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
            r"^generate\.gpu_memory_share = 0\.5 is more than is free of the GPU: Free .*19\.1.*; end what else",
        ),
        ("No available memory for the cache blocks.", r"^generate\.gpu_memory_share = 0\.5 leaves .*; raise it$"),
    ],
)
def test_why_vllm_does_not_start_is_told_as_the_setting_that_it_lies_at(why: str, told: str) -> None:
    error = told_of_start(why, SETTINGS.model_copy(update={"use_gpu": True}))
    assert isinstance(error, ConfigError)
    assert re.search(told, str(error))
    assert told_of_start("something else", SETTINGS) is None


def test_the_cache_is_looked_at_before_ray_starts(checkpoint: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"kv_cache_gib": 1e-6})
    with pytest.raises(ConfigError, match="kv_cache_gib"):
        generate_night("none", "none", str(checkpoint), TRIE, settings, str(tmp_path / "progress"), 1)
    assert not ray.is_initialized()


def test_every_beam_that_is_not_excluded_is_kept_best_first_with_its_verdict(
    checkpoint: Path, torch_engine: TorchEngine
) -> None:
    prompts, vocabulary = make_prompts(torch_engine.vocabulary, 32, 45), torch_engine.vocabulary
    expected = [plain_log_probs(checkpoint, vocabulary, prompt) for prompt in prompts]
    orders = [np.argsort(-one, kind="stable") for one in expected]
    # Row 0 excludes its first and third, row 1 excludes nothing; what the one excludes the other keeps.
    excluded = Ragged.from_lengths(orders[0][[0, 2]], np.array([2, 0]))
    leaves, log_probs, verdicts = judged_beams(torch_engine, prompts, excluded, len(TRIE) + 1)
    assert leaves.shape == (2, len(TRIE) + 1)
    for row, left in enumerate((np.delete(orders[0], [0, 2]), orders[1])):
        assert leaves[row, : len(left)].tolist() == left.tolist()
        np.testing.assert_allclose(log_probs[row, : len(left)], expected[row][left], atol=1e-4)
        assert (leaves[row, len(left) :] == -1).all() and np.isneginf(log_probs[row, len(left) :]).all()
        assert (verdicts[row, len(left) :] == 0).all()
        for at in (0, 3, len(left) - 1):
            wanted = plain_verdict(checkpoint, vocabulary, prompts[row], leaves[row, at])
            assert verdicts[row, at] == pytest.approx(wanted, abs=1e-4)


def test_prompt_that_the_engine_cannot_take_is_an_error_of_its_row(torch_engine: TorchEngine) -> None:
    prompts = make_prompts(torch_engine.vocabulary, 32, 300, 16)
    table = prompts_table(torch_engine.vocabulary, 3).set_column(1, "prompt", prompts.to_arrow())
    generated = generate_batch(torch_engine, table, SETTINGS.beam_width)
    assert generated.schema == GENERATED
    assert generated["error"].to_pylist() == [None, "prompt of 300 tokens, the engine takes 252", None]
    # Of nine beams each, leaf 0 is excluded where it is among them.
    excluded = Ragged.from_lengths(np.zeros(2, int), np.ones(2, int))
    beams = judged_beams(torch_engine, prompts.take(np.array([0, 2])), excluded, SETTINGS.beam_width)
    counts = (beams[0] >= 0).sum(1)
    for name, values in zip(("leaves", "log_probs", "verdicts"), beams, strict=True):
        rows = [np.array(row) for row in generated[name].to_pylist()]
        assert [len(row) for row in rows] == [counts[0], 0, counts[1]]
        np.testing.assert_allclose(np.concatenate(rows), values[beams[0] >= 0], atol=1e-6)
    assert not any(0 in row for row in generated["leaves"].to_pylist())
    alone = generate_batch(torch_engine, table.slice(2, 1), SETTINGS.beam_width)
    assert alone["leaves"].to_pylist() == generated["leaves"].to_pylist()[2:]


def test_a_user_on_whom_an_engine_fails_is_found_and_the_others_get_their_lists(engine: Engine) -> None:
    """A token that the model does not have. In the middle of a batch, what vLLM holds of the others is not computed."""
    table = prompts_table(engine.vocabulary, 5, length=3 * CACHE_BLOCK)
    prompts = Ragged.from_arrow(table["prompt"])
    values = np.where(np.arange(len(prompts.values)) == prompts.offsets[3] + 7, 1_000_000, prompts.values)
    broken = table.set_column(1, "prompt", Ragged(values.astype(np.int32), prompts.offsets).to_arrow())
    rows = generate_batch(engine, broken, SETTINGS.beam_width)
    alone = generate_batch(engine, table, SETTINGS.beam_width)
    assert [error is None for error in rows["error"].to_pylist()] == [True, True, True, False, True]
    others = pa.array([0, 1, 2, 4])
    assert rows["leaves"].to_pylist()[3] == [] and rows["leaves"].take(others).equals(alone["leaves"].take(others))
    for name in ("log_probs", "verdicts"):
        found, wanted = (Ragged.from_arrow(one[name].take(others)).values for one in (rows, alone))
        np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("kind", ["torch", "vllm"])
def test_weights_that_are_no_numbers_are_found_before_the_first_batch(checkpoint: Path, tmp_path, kind) -> None:
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = torch.nan
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    model.save_pretrained(folder)
    engine = open_engine(folder, TRIE, SETTINGS.model_copy(update={"engine": kind}))
    with pytest.raises(ArtefactError, match="these weights give no finite number"):
        require_finite(engine, str(folder))


NIGHT = textwrap.dedent(
    """
    import sys
    import numpy as np
    from conrec.blocklist.generate import generate_night
    from conrec.catalogue.trie import Trie
    from conrec.config import GenerateSettings

    folder, checkpoint, ids, users = sys.argv[1:]
    settings = GenerateSettings(beam_width=36, batch_size=8, engine="torch")
    trie = Trie.build(np.load(ids), 6)
    night = [f"{folder}/{name}" for name in ("prompts", "generated")]
    print(generate_night(*night, checkpoint, trie, settings, f"{folder}/progress", int(users)), flush=True)
    """
)


def test_night_resumes_after_a_kill_without_generating_anyone_twice(checkpoint: Path, tmp_path: Path) -> None:
    users = 160  # five files
    vocabulary = TorchEngine.load(checkpoint, TRIE).vocabulary
    (tmp_path / "prompts").mkdir()
    table = prompts_table(vocabulary, users, length=224)
    pq.write_table(table, tmp_path / "prompts" / "000000.parquet")
    np.save(tmp_path / "ids.npy", SEMANTIC_IDS)
    command = [sys.executable, "-c", NIGHT, str(tmp_path), str(checkpoint), str(tmp_path / "ids.npy"), str(users)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    night = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(committed(tmp_path)) >= 1, night)
    kill_with_children(night)
    kept = committed(tmp_path)
    finished = sum(pq.read_metadata(path).num_rows for path in kept)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "generated").glob("*.parquet")}
    assert 0 < finished < users
    names = committed_files(str(tmp_path / "generated"), str(tmp_path / "progress"))
    assert sum(pq.read_metadata(tmp_path / "generated" / name).num_rows for name in names) == finished

    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert int(again.stdout.split()[-1]) == users
    generated = pq.read_table(tmp_path / "generated")
    assert sorted(generated["user_id"].to_pylist()) == table["user_id"].to_pylist()
    assert generated["error"].null_count == users
    # Whoever generated, every user has what the prompt's beams are here.
    rows = np.array([table["user_id"].to_pylist().index(user) for user in generated["user_id"].to_pylist()[:40]])
    prompts = Ragged.from_arrow(table["prompt"]).take(rows)
    excluded = Ragged.from_lengths(np.zeros(40, int), np.ones(40, int))
    beams = judged_beams(TorchEngine.load(checkpoint, TRIE), prompts, excluded, 36)
    for name, values in zip(("log_probs", "verdicts"), beams[1:], strict=True):
        found = np.concatenate([np.array(row) for row in generated[name].to_pylist()[:40]])
        np.testing.assert_allclose(found, values[beams[0] >= 0], atol=1e-4)
    assert not any(0 in row for row in generated["leaves"].to_pylist())
    # What was committed was not written again.
    stems = tuple(path.stem for path in kept)
    untouched = [path for path in written if path.name.startswith(stems)]
    assert len(untouched) >= len(kept) and all(path.stat().st_mtime_ns == written[path] for path in untouched)

    # Complete: a third call starts neither Ray nor an engine.
    finally_ = generate_night(
        *(str(tmp_path / name) for name in ("prompts", "generated")),
        "no such checkpoint",
        TRIE,
        SETTINGS,
        str(tmp_path / "progress"),
        users,
    )
    assert finally_ == users


def test_a_store_that_fails_for_a_moment_does_not_stop_the_bar(tmp_path, monkeypatch):
    calls, list_files = [], storage.list_files

    def hiccup(url):
        calls.append(url)
        if len(calls) == 1:
            raise StorageError(f"{url}: the store is out of reach")
        return list_files(url)

    monkeypatch.setattr(storage, "list_files", hiccup)
    monkeypatch.setattr(generate, "POLL_SECONDS", 0.01)
    pq.write_table(pa.table({"user_id": ["a", "b", "c"]}), tmp_path / "0.parquet")
    until = time.monotonic() + 10
    with progress("generating", 3) as bar, generate._watching(str(tmp_path), bar):
        while bar.done < 3:
            assert time.monotonic() < until
            time.sleep(0.01)


def kill_with_children(process: subprocess.Popen) -> None:
    """SIGKILL to the driver, Ray's daemons and the workers, as when the machine goes."""
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    psutil.wait_procs(everyone, timeout=30)


def wait_for(happened: Callable[[], bool], process: subprocess.Popen) -> None:
    limit = time.monotonic() + 300
    while not happened():
        assert process.poll() is None, "the night ended before it could be killed"
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_checkpoint_that_brings_code_is_refused_and_nothing_of_it_runs(checkpoint, tmp_path, name):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    document = json.loads((folder / name).read_text()) | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (folder / name).write_text(json.dumps(document))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: pass\n")
    for engine in ("torch", "vllm"):
        with pytest.raises(ArtefactError, match="auto_map"):
            open_engine(folder, TRIE, SETTINGS.model_copy(update={"engine": engine}))
    with pytest.raises(ArtefactError, match="auto_map"):
        TorchEngine.load(folder, TRIE)
    assert not (tmp_path / "ran").exists()


def test_weights_in_a_pickle_are_refused(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    for weights in folder.glob("*.safetensors"):
        weights.rename(folder / "pytorch_model.bin")
    for engine in ("torch", "vllm"):
        with pytest.raises(ArtefactError, match="safetensors"):
            open_engine(folder, TRIE, SETTINGS.model_copy(update={"engine": engine}))


@pytest.mark.parametrize("content", ["", "[]", "{", None])
def test_a_damaged_config_is_named(checkpoint, tmp_path, content):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    (folder / "config.json").unlink() if content is None else (folder / "config.json").write_text(content)
    with pytest.raises(ArtefactError, match=r"config\.json"):
        open_engine(folder, TRIE, SETTINGS)
