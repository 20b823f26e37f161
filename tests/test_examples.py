# SPDX-License-Identifier: MIT
"""Every file of `examples/` runs as its head says, on a toy checkpoint."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.server.settings.derived import demo_model
from packages.core.tests.toy_encoder import toy_encoder_config, write_toy_encoder
from tests.live_server import serving

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`run(name, *arguments)`: what `python examples/NAME.py ARGUMENTS` prints."""

    def run(name: str, *arguments: str) -> str:
        path = EXAMPLES / f"{name}.py"
        assert f"python examples/{name}.py" in path.read_text()
        monkeypatch.setattr("sys.argv", [str(path), *arguments])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_example_has_a_test() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {
        "library_generate",
        "library_stream",
        "agent_three_tools",
        "anthropic_client",
        "openai_client",
        "classification",
        "custom_loop",
        "embeddings",
        "reranking",
        "reward",
        "structured_output",
        "tool_calls",
    }


@pytest.mark.one_of_each(8)
@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_without_a_model_or_a_server_it_is_a_sentence(name: str, run: Callable[..., str]) -> None:
    client = name.endswith("_client")
    arguments = ["default", "http://127.0.0.1:9"] if client else []  # where nobody listens
    with pytest.raises(SystemExit) as end:
        run(name, *arguments)
    words = "no server answers at http://127.0.0.1:9/" if client else "name a model, for example: python"
    assert str(end.value.code).startswith(words)


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_with_a_wrong_model_it_is_a_sentence(
    name: str, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(ScriptedEngine("Paris.", name="scripted"), strict_model_names=True) as url:
        clients = {"openai_client": ["no", f"{url}/v1"], "anthropic_client": ["no", url]}
        with pytest.raises(SystemExit) as end:
            run(name, *clients.get(name, ["no.gguf"]))
    assert "'no" in str(end.value.code)
    assert "\n" not in str(end.value.code)


def test_library_generate(run: Callable[..., str], toy_model: Path) -> None:
    lines = run("library_generate", str(toy_model)).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("'The capital of France is' -> ")


def test_library_stream_pieces_add_up(run: Callable[..., str], toy_model: Path) -> None:
    printed = run("library_stream", str(toy_model))
    assert "[Name three colours.] " in printed
    assert "\nWhat is the capital of France?\n" in printed


def test_reranking(run: Callable[..., str], tmp_path: Path) -> None:
    folder = write_toy_encoder(tmp_path, toy_encoder_config("BertForSequenceClassification"), pooling=None)
    lines = [line.split(" ", 2) for line in run("reranking", str(folder)).splitlines()]
    assert [place for place, _, _ in lines] == ["1.", "2.", "3."]
    scores = [float(score) for _, score, _ in lines]
    assert scores == sorted(scores, reverse=True)
    assert len({document for _, _, document in lines}) == 3


def test_classification(run: Callable[..., str], tmp_path: Path) -> None:
    config = toy_encoder_config("BertForSequenceClassification", id2label={"0": "NEGATIVE", "1": "POSITIVE"})
    lines = run("classification", str(write_toy_encoder(tmp_path, config, pooling=None))).splitlines()
    for line, text in zip(lines, ["What a wonderful film!", "I want my money back."], strict=True):
        label, probability, shown = line.split(" ", 2)
        assert label in ("NEGATIVE", "POSITIVE")
        assert 0.5 <= float(probability) <= 1
        assert shown == text


def test_reward(run: Callable[..., str], toy_model: Path, tmp_path: Path) -> None:
    """The toy with a head; its rewards need not say which answer is right."""
    for path in toy_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    name = config["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")
    config |= {"architectures": [name], "num_labels": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["score.weight"] = np.linspace(-9, 9, config["hidden_size"], dtype=np.float32)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    rewards = [float(line.split(" ")[0]) for line in run("reward", str(tmp_path)).splitlines()]
    assert len(set(rewards)) == 2
    assert rewards == sorted(rewards, reverse=True)


def test_embeddings(run: Callable[..., str], toy_model: Path) -> None:
    lines = run("embeddings", str(toy_model)).splitlines()
    assert lines[0].endswith("vectors of 64 numbers")
    nearest = [float(line.split(" ")[0]) for line in lines[1:4]]
    assert nearest == sorted(nearest, reverse=True)
    assert lines[4] == "best: " + lines[1].split(" ", 1)[1]


def test_custom_loop_runs_the_urgent_and_drops_the_unwanted(run: Callable[..., str], toy_model: Path) -> None:
    lines = run("custom_loop", str(toy_model)).splitlines()
    ends = [line.split(": ", 1)[1] for line in lines[:3]]
    assert ends == ["unwanted ends (abort)", "story ends (length)", "urgent ends (length)"]
    texts = {line.split(": ")[0] for line in lines[3:-1]}
    assert texts >= {"story", "urgent", "unwanted"}
    steps, tokens, blocks = lines[-1].split(", ")
    assert (steps, tokens) == ("19 steps", "35 tokens")  # 16 + 16 + 3; the last began after the third step
    free, total = blocks.removesuffix(" blocks free").split(" of ")
    assert free == total


@pytest.mark.parametrize("flags", [(), ("--sync",)])
def test_tool_calls(run: Callable[..., str], calling_model: Path, flags: tuple[str, ...]) -> None:
    first, rest = run("tool_calls", str(calling_model), *flags).split("\n", 1)
    assert re.fullmatch(r"add\(-?\d{1,3}, -?\d{1,3}\)", first)
    assert rest.strip()


def test_agent_three_tools(run: Callable[..., str]) -> None:
    demo = demo_model()
    assert demo is not None
    lines = run("agent_three_tools", str(demo)).splitlines()
    temperature = re.fullmatch(r'look_up\({ ?"city": "(Oslo|Cairo|Lima)" ?}\) -> (-3.0|31.5|19.0)', lines[0])
    fahrenheit = re.fullmatch(r'to_fahrenheit\({ ?"celsius": (-?[0-9.]+) ?}\) -> (-?[0-9.]+)', lines[1])
    assert temperature is not None
    assert fahrenheit is not None
    assert float(fahrenheit[2]) == round(float(fahrenheit[1]) * 9 / 5 + 32, 1)
    assert re.fullmatch(r"note\({.*}\) -> 1 notes", lines[2])
    assert re.fullmatch(r"answer: \S.*", lines[3])
    assert re.fullmatch(r"notes: \['(Oslo|Cairo|Lima) is (cold|mild|hot)'\]", lines[-1])


def test_structured_output(run: Callable[..., str], toy_model: Path) -> None:
    person, colour, number = run("structured_output", str(toy_model)).splitlines()
    assert re.fullmatch(r"['\"].* is \d{1,3}", person)
    assert colour in ("the sky is blue", "the sky is green")
    assert re.fullmatch(r"call \d{3}-\d{4}", number)


def test_openai_client(run: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(ScriptedEngine("Paris.", name="scripted")) as url:
        printed = run("openai_client", "default", f"{url}/v1")
    assert "models: scripted\nParis.\n" in printed
    assert printed.endswith(" + 7 tokens\n")  # a token per character, and the end


def test_anthropic_client(run: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(ScriptedEngine("Paris.", name="scripted")) as url:
        lines = run("anthropic_client", "default", url).splitlines()
    assert lines[1] == "Paris."
    prompt = lines[0].removeprefix("prompt: ").removesuffix(" tokens")
    assert lines[2] == f"end_turn: {prompt} + 7 tokens"  # a token per character, and the end
