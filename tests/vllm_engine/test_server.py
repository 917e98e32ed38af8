"""A vLLM server with processors: asked whether it has them, and as the sampler of two steps of GRPO.

Its weights stay: they travel over NCCL, which a CPU does not have, so the learning rate is 0 here.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import requests
from runs import FORCING, REFLEX, TEMPERATURE, check_rollouts, make
from trl.generation.vllm_client import VLLMClient

from rltok.config import ConfigError
from rltok.trainers.vllm import PROCESSOR, probe_server

PROCESSORS = ("--logits-processors", PROCESSOR, "--logprobs-mode", "processed_logprobs")


class Server:
    """A server process, ended with all that it started."""

    def __init__(self, folder, log, *flags):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self._log = f"http://127.0.0.1:{port}", log
        environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        environment |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_USE_V2_MODEL_RUNNER": "0", "OMP_NUM_THREADS": "1"}
        sizes = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "64", "--max-num-seqs", "8"]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, *sizes, *flags]
        command += ["--host", "127.0.0.1", "--port", str(port), "--max-logprobs", "-1"]
        self._process = subprocess.Popen(
            command, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            self._wait(time.time() + 300)
        except BaseException:
            self.stop()
            raise

    def _wait(self, deadline):
        while time.time() < deadline:
            if self._process.poll() is not None:
                break
            try:
                if requests.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except requests.exceptions.RequestException:
                pass
            time.sleep(1)
        raise RuntimeError(f"the server is not up: {self._log.read_text()[-3000:]}")

    def stop(self):
        for kind in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, kind)
            except ProcessLookupError:
                return
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                continue


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    server = Server(folder, tmp_path_factory.mktemp("server") / "log", *PROCESSORS)
    yield server
    server.stop()


def test_server_with_processors_passes_the_probe(server):
    probe_server(SimpleNamespace(vllm_client=VLLMClient(base_url=server.url)))


def test_training_through_the_server(server, tmp_path, folder, tokenizer, monkeypatch):
    for name in ("init_communicator", "update_named_params"):  # NCCL
        monkeypatch.setattr(VLLMClient, name, lambda *_, **__: None)
    sent, post = [], VLLMClient._post
    monkeypatch.setattr(VLLMClient, "_post", lambda self, url, **k: sent.append(k.get("json")) or post(self, url, **k))
    changes = {"vllm_mode": "server", "vllm_server_base_url": server.url, "learning_rate": 0.0}
    trainer = make(folder, tmp_path, tokenizer, [REFLEX, FORCING, TEMPERATURE], **changes)
    trainer.train()
    check_rollouts(trainer)
    bodies = [body for body in sent if body and "prompt" in body]
    assert len(bodies) == 2 and all("vllm_xargs" in body for body in bodies)
    trainer.model.eval()
    trainer.evaluate()
    bodies = [body for body in sent if body and "prompt" in body][2:]
    assert bodies and not any("vllm_xargs" in body for body in bodies), "evaluation asks for no processors"


def test_server_without_processors_is_refused(folder, tmp_path):
    server = Server(folder, tmp_path / "log", "--logprobs-mode", "processed_logprobs")
    try:
        with pytest.raises(ConfigError, match="does not load rltok's processors"):
            probe_server(SimpleNamespace(vllm_client=VLLMClient(base_url=server.url)))
    finally:
        server.stop()
