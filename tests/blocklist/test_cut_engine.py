"""A model cut over two processes answers as the whole one; one process ends with the other. On CPUs, over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_policy import TRIE, make_prompts, prompts_table, save_tiny

from conrec.blocklist.batches import generate_batch
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

    if __name__ != "__main__":  # the second process, as on a GPU with less memory: a prompt at a time
        import conrec.blocklist.engines
        conrec.blocklist.engines.decoding_positions = lambda model: 80

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
        sys.stdout.flush()
        engine._processes[0].kill()
        engine.generate(prompts, WIDTH)
        import time
        time.sleep(60)

    if __name__ == "__main__":
        main()
"""


def given_leaves() -> np.ndarray:
    return np.array([[4, 0, -1], [7, 8, 9], [1, -1, 2]])


def test_a_model_in_two_processes_answers_as_the_whole_one_and_they_end_together(tmp_path: Path) -> None:
    """Tolerance 1e-4. The program kills the second process once it has its answers: it would wait for it for ever."""
    save_tiny(tmp_path / "policy")
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(ANSWERS))
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here, here.parent, here.parents[1])))
    done = subprocess.run(
        [sys.executable, program, tmp_path / "policy", tmp_path / "answers.npz"],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and "nobody's answer" in done.stdout, done.stderr[-3000:]
    assert "a process of the engine has ended" in done.stderr or "process 1 of the engine is gone" in done.stderr
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
