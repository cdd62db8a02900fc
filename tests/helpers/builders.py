"""Small real things for the tests: models, tokenizers, texts, runs of the real commands.

Everything is made with the libraries users have: a model is a transformers model saved by transformers, a tokenizer a
byte-level BPE trained here, a run is `deepspeed train.py` in a process of its own.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.helpers import warm
from tests.helpers.paths import ROOT

BOOKS = ROOT / "datasets" / "sample_books"
VOCABULARY = 320


def environment(**extra: str) -> dict[str, str]:
    """For subprocesses: one thread each, no network."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **extra,
    }


def save_tokenizer(folder: Path, vocabulary: int = VOCABULARY) -> None:
    """A byte-level BPE with BOS, EOS and PAD, trained on a sample book."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<PAD>", "<BOS>", "<EOS>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    text = sorted(BOOKS.glob("*.md"))[0].read_text(encoding="utf-8")
    tokenizer.train_from_iterator([text], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<BOS>", eos_token="<EOS>", pad_token="<PAD>")
    fast.save_pretrained(folder)


def model_config(kind: str = "cohere", layers: int = 4, **changes: Any) -> Any:
    """A tiny configuration of a real family."""
    import transformers

    names = {
        "cohere": "CohereConfig",
        "cohere2": "Cohere2Config",
        "llama": "LlamaConfig",
        "gemma2": "Gemma2Config",
        "gemma3n_text": "Gemma3nTextConfig",
        "gemma4_text": "Gemma4TextConfig",
        "mamba": "MambaConfig",
        "mixtral": "MixtralConfig",
        "granite": "GraniteConfig",
        "qwen2": "Qwen2Config",
        "qwen3_moe": "Qwen3MoeConfig",
    }
    small = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return getattr(transformers, names[kind])(**{**small, **changes})


def save_model(
    folder: Path, kind: str = "cohere", layers: int = 4, seed: int = 0, dtype: Any = torch.float32, **changes: Any
) -> Any:
    """A tiny model with random weights of useful size (not the near-zero of an untrained one), saved by transformers."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(model_config(kind, layers, **changes)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def write_config(path: Path, **changes: Any) -> Path:
    """A TOML for a run of a few steps on a sample book; `changes` by key, with tables as dictionaries."""
    import tomli_w

    settings: dict[str, Any] = {
        "lora_rank": 4,
        "lora_alpha": 8,
        "target_modules": ["down_proj"],
        "layers_to_transform": "0:2",
        "max_steps": 5,
        "pipeline_stages": 2,
        "gradient_accumulation_steps": 2,
        "model_weight_dtype": "float32",
        "report_every_minutes": 0,  # a second at the end of each run; tests of reports ask for it
        "kernels": "none",  # transformers' own operations, as in the oracles; tests of kernels ask for them
        "gradient_clipping": 1.0,
        "optimizer": {"type": "adamw_kahan", "lr": 1e-2, "weight_decay": 0.01},
        "datasets": [
            {
                "name": "book",
                "dataset_type": "textfile",
                "dataset_path": str(BOOKS / "the_salt_ledger.md"),
                "sequence_len": 64,
                "eval_size": 4,
            }
        ],
    }
    settings.update(changes)
    path.write_text(tomli_w.dumps({k: v for k, v in settings.items() if v is not None}), encoding="utf-8")
    return path


def start(processes: int, *arguments: str, script: Path = ROOT / "train.py", **extra: str) -> subprocess.Popen[str]:
    """`deepspeed --num_gpus N train.py …` (or another script) in a session of its own."""
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(processes), str(script), *arguments]
    return subprocess.Popen(
        command,
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def train(processes: int, *arguments: str, expect: int = 0, timeout: float = 240, **extra: str) -> str:
    """Run the training command to its end and return what it printed; fails if it ends with another code.

    With variables of the environment (`extra`) the interpreters are new: some are read when a process starts.
    """
    if extra:
        return finish(start(processes, *arguments, **extra), expect, timeout)
    return launch(processes, ROOT / "train.py", *arguments, expect=expect, timeout=timeout)


def launch(processes: int, script: Path, *arguments: str, expect: int = 0, timeout: float = 240, **extra: str) -> str:
    """Run a script under DeepSpeed's launcher to its end and return what it printed; fails if it ends with another code.

    `extra`: variables of the environment, but for those that are read when an interpreter starts.
    """
    try:
        code, output = warm.run(processes, script, arguments, environment(**extra), timeout)
    except TimeoutError as late:
        raise AssertionError(f"timed out:\n{late}") from None
    assert code == expect, f"exit code {code}, expected {expect}:\n{output}"
    return output


def finish(process: subprocess.Popen[str], expect: int, timeout: float) -> str:
    """Wait for a process of `start` and return what it printed; fails if it ends with another code than `expect`."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"timed out:\n{output}") from None
    assert process.returncode == expect, f"exit code {process.returncode}, expected {expect}:\n{output}"
    return output


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def only_run(output_dir: Path) -> Path:
    """The one run under `output_dir`."""
    runs = [p for p in output_dir.iterdir() if (p / "config.toml").exists()]
    assert len(runs) == 1, runs
    return runs[0]
