"""`ka serve` beside a real client, on this machine alone."""

import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ka_attention.commands.serve import command
from ka_attention.errors import UserError
from ka_attention.hf import register

pytest.importorskip("fastapi", reason="the server needs fastapi")
pytest.importorskip("uvicorn", reason="the server needs uvicorn")
openai = pytest.importorskip("openai", reason="no client to ask with")

LONG = " ".join("abcdefghijklmnop"[i * i % 16] for i in range(60))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(folder, client) of a model with windows of 4 and 100 tokens."""
    from conftest import ka_model, save_words

    from ka_attention.hf import KAConfig, reconfigure

    folder = tmp_path_factory.mktemp("served")
    model = ka_model()
    reconfigure(model, KAConfig(window=(4, 100), gate="head"))
    model.save_pretrained(folder)
    save_words(folder, chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    sizes = ["--cb-block-size", "8", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "64"]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "ka_attention", *words, *sizes], stdout=log, stderr=log)
    try:
        for _ in range(120):
            assert server.poll() is None, (folder / "log").read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                    break
            except OSError:
                time.sleep(0.5)
        yield folder, openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=30)
    finally:
        server.kill()
        server.wait()


def alone(folder, text, count):
    """What `generate` says after ``text``."""
    register()
    model, words = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = words(text, return_tensors="pt").input_ids
    with torch.no_grad():
        found = model.generate(ids, max_new_tokens=count, do_sample=False)
    return words.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


def ask(served, text, count=8, **options):
    folder, client = served
    return client.chat.completions.create(
        model=str(folder),
        messages=[{"role": "user", "content": text}],
        max_tokens=count,
        temperature=0,
        **options,
    )


def test_a_chat_and_a_text_of_many_windows(served):
    for text in ("a b c", LONG):
        assert ask(served, text).choices[0].message.content == alone(served[0], text, 8)


def test_streaming(served):
    parts = [chunk.choices[0].delta.content or "" for chunk in ask(served, "d e", stream=True) if chunk.choices]
    assert len(parts) > 1
    assert "".join(parts) == alone(served[0], "d e", 8)


def test_a_stop_string_ends_a_text_and_no_other(served):
    whole = alone(served[0], "d e", 24)
    letter = whole.split()[5]
    until = whole[: whole.index(letter) + 1]
    with ThreadPoolExecutor(3) as pool:
        stopped = pool.submit(ask, served, "d e", 24, stop=[letter, "no such"])
        free = pool.submit(ask, served, "d e", 24)
        parts = pool.submit(lambda: list(ask(served, "d e", 24, stop=letter, stream=True)))
    assert stopped.result().choices[0].message.content == until
    assert stopped.result().choices[0].finish_reason == "stop"
    assert free.result().choices[0].message.content == whole
    assert "".join(chunk.choices[0].delta.content or "" for chunk in parts.result() if chunk.choices) == until


@pytest.mark.parametrize("words", [["--cb-num-blocks", "x"], ["--no-such", "1"]])
def test_an_option_that_the_server_refuses(served, words):
    with pytest.raises(UserError, match=words[0]):
        command(str(served[0]), words)


def test_two_at_once(served):
    texts = ["a b c d e f", "z"]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda text: ask(served, text, 16).choices[0].message.content, texts))
    assert found == [alone(served[0], text, 16) for text in texts]


def test_a_bad_request_and_one_that_hangs_up_leave_the_server_up(served):
    folder, client = served
    with pytest.raises(openai.APIStatusError) as refusal:
        client.chat.completions.create(model=str(folder), messages=[], extra_body={"no_such_field": 1})
    assert 400 <= refusal.value.status_code < 500
    stream = ask(served, "a", 64, stream=True)
    next(iter(stream))
    stream.close()
    assert ask(served, "a b c").choices[0].message.content == alone(folder, "a b c", 8)
