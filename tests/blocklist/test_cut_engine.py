"""A model cut over two processes answers as the whole one; one process ends with the other. On CPUs, over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from tiny_policy import TRIE, make_prompts, prompts_table, save_tiny

from conrec.blocklist.batches import generate_batch
from conrec.blocklist.cut_engine import alone_in
from conrec.blocklist.engines import TorchEngine
from conrec.blocklist.generate import cores, generate_night
from conrec.cluster import generation_need
from conrec.config import GenerateSettings

pytestmark = pytest.mark.long

CUT = GenerateSettings(beam_width=9, batch_size=8, tensor_parallel=2)
WIDTH = 4

ANSWERS = """
    import os, sys
    import numpy as np
    import pyarrow.parquet as pq
    import ray
    import torch
    from tiny_policy import TRIE, make_prompts, prompts_table
    from conrec.blocklist import engines
    from conrec.blocklist.generate import _Generator
    from conrec.blocklist.vllm_model import EngineGoneError
    from test_cut_engine import CUT, WIDTH, given_leaves

    if __name__ != "__main__":  # the processes: the second one has less memory, and less than it says
        def second():
            return os.environ["RANK"] == "1"
        def search(model, prompts, trie, *rest, **named):
            if second() and trie.batch_tokens > 40 and len(prompts) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return whole(model, prompts, trie, *rest, **named)
        whole, engines.judged_beam_search = engines.judged_beam_search, search
        engines.decoding_positions = lambda model: 80 if second() else 8192

    def main():
        checkpoint, rows, answers = sys.argv[1:]
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
        generator = _Generator(checkpoint, ray.put(TRIE), CUT, None)
        pq.write_table(generator(prompts_table(generator.engine.vocabulary, 3)), rows)
        engine = generator.engine
        print("positions", engine.positions)
        prompts = make_prompts(engine.vocabulary, 64, 7, 45)
        leaves, log_probs, judged = engine.generate_and_judge(prompts, WIDTH)
        try:
            engine.score(prompts, given_leaves() + 1_000_000)
        except RuntimeError:
            print("nobody's answer")
        scores, verdicts = engine.score_and_judge(prompts, given_leaves())
        again, _ = engine.generate(prompts, WIDTH)
        longest = engine.longest_prompt
        np.savez(answers, leaves=leaves, log_probs=log_probs, judged=judged, scores=scores, verdicts=verdicts,
                 again=again, longest=longest)
        engine._processes[0].kill()
        try:
            engine.generate(prompts, WIDTH)
        except EngineGoneError as error:
            print(error, [process.exitcode for process in engine._processes])

    if __name__ == "__main__":
        main()
"""


def given_leaves() -> np.ndarray:
    return np.array([[4, 0, -1], [7, 8, 9], [1, -1, 2]])


FAILURES = """
    import os, time
    from pathlib import Path
    from types import SimpleNamespace
    import numpy as np
    import torch
    from conrec.blocklist import cut_engine
    from conrec.blocklist.vllm_model import EngineGoneError
    from conrec.config import GenerateSettings
    from conrec.errors import ConfigError
    from conrec.ragged import Ragged

    class Engine:  # in the processes: the first one waits in the middle of a layer for what the second never sends
        vocabulary, longest_prompt = None, 9

        def __init__(self, *given):
            print("process", os.getpid(), flush=True)
            self.trie = SimpleNamespace(batch_tokens=100 - int(os.environ["RANK"]))
            self.work("starting", ConfigError("generate.gpu_memory_share = 0.5: lower it"))

        def generate(self, prompts, width):
            self.work("raising", ValueError("of one alone"))
            self.work("full", torch.OutOfMemoryError("CUDA out of memory"))
            if os.environ["SECOND"] == "ending" and os.environ["RANK"] == "1":
                os._exit(3)
            time.sleep(600)

        def work(self, what, error):
            if os.environ["SECOND"] == what:
                if os.environ["RANK"] == "1":
                    raise error
                time.sleep(600)

    if __name__ != "__main__":
        cut_engine.VllmEngine = Engine

    def main():
        cut_engine.GRACE_SECONDS = 2
        one = Ragged.from_lengths(np.zeros(99, np.int32), np.array([99]))
        two = Ragged.from_lengths(np.zeros(4, np.int32), np.array([2, 2]))
        for name, prompts in ("starting", one), ("raising", two), ("ending", two), ("full", two), ("full", one):
            os.environ["SECOND"] = name
            try:
                engine = cut_engine.CutEngine(Path("none"), None, GenerateSettings(tensor_parallel=2), 1)
                engine.generate(prompts, 1)
            except (ConfigError, EngineGoneError) as error:
                print(type(error).__name__, error, flush=True)

    if __name__ == "__main__":
        main()
"""


def run(folder: Path, text: str, *arguments: Path) -> str:
    """What a program prints that starts such engines: their processes read it anew."""
    program = folder / "program.py"
    program.write_text(textwrap.dedent(text))
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here, here.parent, here.parents[1])))
    done = subprocess.run(
        [sys.executable, program, *arguments],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_one_that_fails_alone_says_why_and_ends_the_others_that_wait_for_it(tmp_path: Path) -> None:
    """Within the time that they have been given, two seconds here."""
    lines = run(tmp_path, FAILURES).splitlines()
    processes = [int(line.split()[1]) for line in lines if line.startswith("process ")]
    share = "generate.gpu_memory_share = 0.5"
    silent = "process 0 of the engine says nothing: it waits in a layer, or hangs"
    assert [line for line in lines if not line.startswith("process ")] == [
        f"ConfigError {share}: lower it",
        f"EngineGoneError {silent} (1: ValueError: of one alone)",
        "EngineGoneError process 1 of the engine is gone: EOFError()",
        "EngineFullError out of memory with 99 positions at once: CUDA out of memory",
        f"ConfigError {share} leaves a GPU too little memory beside vLLM for one prompt at a time: CUDA out of memory; "
        "lower it, or raise generate.tensor_parallel",
    ]
    assert processes and not any(psutil.pid_exists(process) for process in processes)


def test_engines_on_cpus_start_one_after_the_other_and_leave_alone_what_is_not_theirs(tmp_path: Path) -> None:
    """vLLM gives the shared memory of all engines that are cut one name."""
    left, others = tmp_path / "-tp:0-[0-1]-cpushm_0", tmp_path / "29500-tp:0-[0-1]-cpushm_0"
    left.touch()
    others.touch()
    started = threading.Event()

    def second() -> None:
        with alone_in(tmp_path):
            started.set()

    with alone_in(tmp_path):
        assert not left.exists() and others.exists()
        left.touch()  # of the engine that starts here
        thread = threading.Thread(target=second)
        thread.start()
        assert not started.wait(0.2) and left.exists()
    thread.join(60)
    assert started.is_set() and not left.exists() and others.exists()


@pytest.mark.ray
def test_a_model_in_two_processes_answers_as_the_whole_one_and_they_end_together(tmp_path: Path) -> None:
    """Tolerance 1e-4. The second process has room for half of what it computed at once, which ends both: another engine
    answers. The program kills its first process in the end: the second waits in a layer."""
    save_tiny(tmp_path / "policy")
    places = [tmp_path / name for name in ("policy", "rows.parquet", "answers.npz")]
    said = run(tmp_path, ANSWERS, *places)
    assert "positions 40" in said and "nobody's answer" in said
    assert "process 0 of the engine is gone" in said and "[-9, -9]" in said
    found = np.load(places[2])
    engine = TorchEngine.load(tmp_path / "policy", TRIE)
    wanted = generate_batch(engine, prompts_table(engine.vocabulary, 3), CUT.beam_width)
    assert pq.read_table(places[1])["leaves"].to_pylist() == wanted["leaves"].to_pylist()
    prompts = make_prompts(engine.vocabulary, 64, 7, 45)
    leaves, log_probs, judged = engine.generate_and_judge(prompts, WIDTH)
    assert found["leaves"].tolist() == found["again"].tolist() == leaves.tolist()
    np.testing.assert_allclose(found["log_probs"], log_probs, atol=1e-4)
    np.testing.assert_allclose(found["judged"], judged, atol=1e-4)
    scores, verdicts = engine.score_and_judge(prompts, given_leaves())
    np.testing.assert_allclose(found["scores"], scores, atol=1e-4)
    np.testing.assert_allclose(found["verdicts"], verdicts, atol=1e-4)
    assert found["longest"] == engine.longest_prompt


@pytest.mark.ray
@pytest.mark.usefixtures("ray_driver")
def test_a_night_generates_with_a_model_that_is_cut(tmp_path: Path) -> None:
    save_tiny(tmp_path / "policy")
    engine = TorchEngine.load(tmp_path / "policy", TRIE)
    table = prompts_table(engine.vocabulary, 12)
    (tmp_path / "prompts").mkdir()
    pq.write_table(table, tmp_path / "prompts" / "0.parquet")
    root = str(tmp_path)
    assert generation_need(CUT).bundle == {"CPU": 2.0} and cores(CUT) == 3
    made = generate_night(
        f"{root}/prompts", f"{root}/generated", f"{root}/policy", TRIE, CUT, f"{root}/progress", len(table)
    )
    rows = pq.read_table(f"{root}/generated")
    assert made == len(rows) == len(table)
    expected = generate_batch(engine, table, CUT.beam_width).sort_by("user_id")
    assert rows.sort_by("user_id")["leaves"].to_pylist() == expected["leaves"].to_pylist()
