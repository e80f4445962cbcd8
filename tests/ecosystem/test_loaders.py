"""Libraries that load a folder by themselves get KA-attention, or say what is missing: never softmax attention."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ka_model, logits

from ka_attention.hf import is_attached, register


def test_trl_trains_a_ka_model(folder, tmp_path):
    trl = pytest.importorskip("trl", reason="make test-versions has an environment with TRL")
    datasets = pytest.importorskip("datasets")
    register()
    args = trl.SFTConfig(
        str(tmp_path / "out"), max_steps=1, report_to="none", use_cpu=True, bf16=False, per_device_train_batch_size=2
    )
    data = datasets.Dataset.from_dict({"text": ["a b c d e f", "g h i j k"] * 2})
    trainer = trl.SFTTrainer(model=folder, args=args, train_dataset=data)
    assert is_attached(trainer.model)
    assert torch.equal(logits(trainer.model.eval().cpu()), logits(ka_model()))
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    again = ka_model().from_pretrained(tmp_path / "trained").eval()
    assert torch.equal(logits(again), logits(trainer.model.eval().cpu()))


def test_lm_eval_measures_a_ka_model(folder):
    models = pytest.importorskip("lm_eval.models.huggingface", reason="make test-versions has one with lm-eval")
    instance = pytest.importorskip("lm_eval.api.instance")
    register()
    harness = models.HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=1)
    assert is_attached(harness.model)
    request = instance.Instance("loglikelihood", {}, ("a b c d e f", " g"), 0)
    ((found, _),) = harness.loglikelihood([request], disable_tqdm=True)
    ids = torch.tensor([[4, 5, 6, 7, 8, 9]])
    with torch.no_grad():
        want = ka_model()(ids).logits[0, -1].log_softmax(-1)[10]
    assert found == pytest.approx(want.item(), abs=1e-4)


UNREGISTERED = """
import json, sys
from datasets import Dataset
from transformers import AutoModelForCausalLM
from lm_eval.models.huggingface import HFLM
from peft import AutoPeftModelForCausalLM
from trl import SFTConfig, SFTTrainer

folder, lora, out = sys.argv[1:]
data = Dataset.from_dict({"text": ["a b"]})
tried = {
    "lm_eval": lambda: HFLM(pretrained=folder, device="cpu"),
    "peft": lambda: AutoPeftModelForCausalLM.from_pretrained(lora),
    "trl": lambda: SFTTrainer(model=folder, args=SFTConfig(out, use_cpu=True), train_dataset=data),
    "lm_eval with remote code": lambda: HFLM(pretrained=folder, device="cpu", trust_remote_code=True).model,
}
for name, load in tried.items():
    try:
        found = type(load()).__name__
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    print(json.dumps([name, found]))
"""


def test_a_process_that_has_not_heard_of_ka_attention_says_so(folder, tmp_path):
    for name in ("trl", "lm_eval"):
        pytest.importorskip(name, reason="make test-versions has an environment with TRL and lm-eval")
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(ka_model().from_pretrained(folder), peft.LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "lora")
    command = [sys.executable, "-c", UNREGISTERED, folder, str(tmp_path / "lora"), str(tmp_path / "out")]
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200)
    # transformers asks on the same line whether it may run code
    found = dict(json.loads(line[line.index('["') :]) for line in run.stdout.splitlines() if '["' in line)
    assert found.pop("lm_eval with remote code") == "KALlamaForCausalLM", run.stderr[-2000:]
    assert set(found) == {"lm_eval", "peft", "trl"}
    for said in found.values():
        assert "trust_remote_code" in said or "ka_llama" in said, found
