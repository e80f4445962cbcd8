"""Two processes with gloo on a CPU give the same perplexities as one process with the same global batch."""

import json
import os
import subprocess
import sys

import pytest
import tiny
import torch
from typer.testing import CliRunner

from ka_attention.cli import app, main


def test_torchrun_gives_the_perplexities_of_one_process(tmp_path):
    corpus = tmp_path / "text.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny.documents()))
    arguments = ["train", "--data", str(corpus), *tiny.arguments(arms=("softmax", "ka-w4"), train_samples=60)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = subprocess.run(
        [*torchrun, "-m", "ka_attention.cli", *arguments, "--out", str(tmp_path / "two")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("| Epoch |") == 2, "one table an arm: only the main process prints"
    one = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "one")], catch_exceptions=False)
    assert one.exit_code == 0
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert results[1]["environment"]["processes"] == 2
    for name in ("softmax", "ka-w4"):
        rows, others = (result["arms"][name]["seeds"][0]["training"]["epochs"] for result in results)
        assert len(rows) == len(others)
        for row, other in zip(rows, others, strict=True):
            # The same sums in another order: float32 rounding, grown over a few AdamW steps.
            assert other["train_ppl"] == pytest.approx(row["train_ppl"], rel=1e-4)
            assert other["val_ppl"] == pytest.approx(row["val_ppl"], rel=1e-4)


def test_a_process_of_torchrun_gives_its_group_back(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sys, "argv", ["ka", "recipes"])
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert not torch.distributed.is_initialized()
