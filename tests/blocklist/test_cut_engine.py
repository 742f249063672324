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
    import sys
    import numpy as np
    from pathlib import Path
    from tiny_policy import TRIE, make_prompts
    from conrec.blocklist.engines import open_engine
    from conrec.blocklist.vllm_model import EngineGoneError
    from test_cut_engine import CUT, WIDTH, given_leaves

    if __name__ != "__main__":  # the processes: the second one as on a GPU with less memory, a prompt at a time
        import os
        import conrec.blocklist.engines
        conrec.blocklist.engines.decoding_positions = lambda model: 80 if os.environ["RANK"] == "1" else 8192

    def main():
        engine = open_engine(Path(sys.argv[1]), TRIE, CUT)
        prompts = make_prompts(engine.vocabulary, 64, 7, 45)
        leaves, log_probs, judged = engine.generate_and_judge(prompts, WIDTH)
        try:
            engine.score(prompts, given_leaves() + 1_000_000)
        except EngineGoneError:
            raise
        except Exception as error:
            print("nobody's answer", type(error).__name__)
        scores, verdicts = engine.score_and_judge(prompts, given_leaves())
        again, _ = engine.generate(prompts, WIDTH)
        longest = engine.longest_prompt
        np.savez(sys.argv[2], leaves=leaves, log_probs=log_probs, judged=judged, scores=scores, verdicts=verdicts,
                 again=again, longest=longest)
        engine._processes[0].kill()
        try:
            engine.generate(prompts, WIDTH)
        except EngineGoneError as error:
            print(error, [process.exitcode for process in engine._processes])

    if __name__ == "__main__":
        main()
"""


STARTS = """
    import os, sys, time
    from pathlib import Path
    from conrec.blocklist import cut_engine
    from conrec.blocklist.vllm_model import EngineGoneError
    from conrec.errors import ConfigError
    from test_cut_engine import CUT, TRIE

    if __name__ != "__main__":  # the processes: the first one waits for what never comes
        def start(*given):
            if os.environ["RANK"] == "0":
                print("process", os.getpid(), flush=True)
                time.sleep(600)
            if os.environ["SECOND"] == "refuses":
                raise ConfigError("generate.gpu_memory_share = 0.5: lower it")
            os._exit(3)
        cut_engine.VllmEngine = start

    def main():
        for os.environ["SECOND"] in ("refuses", "ends"):
            try:
                cut_engine.CutEngine(Path("none"), TRIE, CUT, 1)
            except (ConfigError, EngineGoneError) as error:
                print(type(error).__name__, error, flush=True)

    if __name__ == "__main__":
        main()
"""


def given_leaves() -> np.ndarray:
    return np.array([[4, 0, -1], [7, 8, 9], [1, -1, 2]])


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


def test_one_that_cannot_start_says_why_while_the_others_wait_for_it(tmp_path: Path) -> None:
    """What can be mended is the error that it was; the others have ended."""
    lines = run(tmp_path, STARTS).splitlines()
    processes = [int(line.split()[1]) for line in lines if line.startswith("process ")]
    assert [line for line in lines if not line.startswith("process ")] == [
        "ConfigError generate.gpu_memory_share = 0.5: lower it",
        "EngineGoneError process 1 of the engine is gone: EOFError()",
    ]
    assert not any(psutil.pid_exists(process) for process in processes)


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


def test_a_model_in_two_processes_answers_as_the_whole_one_and_they_end_together(tmp_path: Path) -> None:
    """Tolerance 1e-4. The program kills the first process once it has its answers: the second waits in a layer."""
    save_tiny(tmp_path / "policy")
    said = run(tmp_path, ANSWERS, tmp_path / "policy", tmp_path / "answers.npz")
    assert "nobody's answer" in said and "process 0 of the engine is gone" in said and "[-9, -9]" in said
    found = np.load(tmp_path / "answers.npz")
    engine = TorchEngine.load(tmp_path / "policy", TRIE)
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
