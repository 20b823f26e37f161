# SPDX-License-Identifier: MIT
"""The example files, booted: every variable of .example.env at once, every model of example.models.yaml in turn."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import yaml

from candle_vllm.core.kernels.cpu_runtime.level import host_level
from tests.live_server import ServerProcess

ROOT = Path(__file__).parents[1]
ASK = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
# They name files that a reader has and this test has not, the model itself, a rival of another variable, what is for
# plain weights while the demo model is a GGUF file, or for images, which it does not see.
NOT_BOOTED = {
    "MODEL", "WEIGHT_PATH", "WEIGHT_FILE", "REVISION", "TOKENIZER", "CHAT_TEMPLATE", "MODELS_CONFIG", "HF_TOKEN",
    "HF_TOKEN_PATH", "API_KEY_FILE", "API_KEYS_FILE", "MEM", "KV_FRACTION", "PORT", "ATTENTION_BACKEND", "CUDA_GRAPHS",
    "THREADS", "MCP_COMMAND", "MCP_ARGS", "ISQ", "GPU_MEMORY_UTILIZATION", "SSL_CERTFILE", "SSL_KEYFILE",
    "SSL_CA_CERTS", "SSL_CERT_REQS", "SSL_CIPHERS", "ENABLE_SSL_REFRESH", "MMPROJ", "IMATRIX",
    "MM_PROCESSOR_KWARGS", "ALLOWED_LOCAL_MEDIA_PATH", "KV_OFFLOADING_SIZE", "LORA_MODULES",
    "LORA_WARMUP",
}  # fmt: skip


def test_the_variables_boot_together(tmp_path: Path) -> None:
    text = (ROOT / ".example.env").read_text()
    lines = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# CANDLE_VLLM_")]
    kept = [line for line in lines if line.split("=")[0].removeprefix("CANDLE_VLLM_") not in NOT_BOOTED]
    assert len(kept) > 40
    # The level in the file may be lower than that of this CPU, whose kernels other tests compile too.
    kept = [f"CANDLE_VLLM_CPU_LEVEL={host_level().name}" if "CPU_LEVEL=" in line else line for line in kept]
    (tmp_path / ".env").write_text("\n".join([*kept, "CANDLE_VLLM_KV_CACHE_MEMORY_BYTES=256M"]) + "\n")
    (tmp_path / "mcp.json").write_text('{"mcpServers": {"off": {"command": "none", "enabled": false}}}')
    values = dict(line.split("=", 1) for line in kept)
    server = ServerProcess(tmp_path)
    try:
        headers = {"authorization": f"Bearer {values['CANDLE_VLLM_API_KEY']}"}
        with httpx.Client(base_url=server.url, headers=headers, timeout=60, trust_env=False) as client:
            assert client.get("/ready").status_code == 200
            answer = client.post("/v1/chat/completions", json=ASK)
            assert (answer.status_code, answer.json()["model"]) == (200, "smollm2"), answer.text
            assert client.get("/metrics").status_code == 401
            manager = {"authorization": f"Bearer {values['CANDLE_VLLM_MANAGEMENT_KEY']}"}
            assert client.get("/metrics", headers=manager).status_code == 200
    finally:
        assert server.stop() == 0


@pytest.mark.every_case
def test_the_models_boot_in_turn(tmp_path: Path, toy_model: Path) -> None:
    content = yaml.safe_load((ROOT / "example.models.yaml").read_text())
    for model in content["models"]:
        for source in ("hf_id", "weight_file", "local_path"):
            model.pop(source, None)
        model["local_path"] = str(toy_model)  # what stands there cannot be had everywhere
        model["params"].update(max_model_len=2048, mem=128)
        model["params"].pop("kv_fraction", None)
    (tmp_path / "models.yaml").write_text(yaml.safe_dump(content))
    server = ServerProcess(tmp_path)
    try:
        with httpx.Client(base_url=server.url, timeout=120, trust_env=False) as client:
            for model in ("smollm2", "qwen3", "gpt-4o", "local"):
                answer = client.post("/v1/chat/completions", json={**ASK, "model": model})
                assert (answer.status_code, answer.json()["model"]) == (200, model), answer.text
            states = {model["id"]: model["status"] for model in client.get("/v1/models/status").json()["models"]}
            assert states == {"smollm2": "ready", "qwen3": "ready", "local": "ready"}
    finally:
        assert server.stop() == 0
