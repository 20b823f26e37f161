# SPDX-License-Identifier: MIT
"""vLLM's `LLM`: the same tokens as the engine's own calls, in vLLM's outputs and with its defaults."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from candle_vllm.core import (
    LLM,
    BeamSearchParams,
    ConfigError,
    EngineConfig,
    InferenceEngine,
    InvalidParameterError,
    PoolingParams,
    PromptTooLongError,
    RemoteEngine,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
    TextPrompt,
    TokensPrompt,
)
from packages.core.tests.toy_encoder import toy_encoder_config, write_toy_encoder

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def engine(toy_model: Path) -> Iterator[InferenceEngine]:
    with InferenceEngine(str(toy_model), threads=1) as made:
        yield made


@pytest.fixture
def llm(engine: InferenceEngine) -> LLM:
    return LLM(engine)


def test_sequences_end_with_the_context_as_in_vllm(llm: LLM, engine: InferenceEngine) -> None:
    room = engine.model_info.max_model_len - 3
    greedy = SamplingParams(temperature=0, max_tokens=room + 1, ignore_eos=True)
    for output in (*llm.generate(["abc", "ab"], greedy, use_tqdm=False), *llm.chat([USER], greedy, use_tqdm=False)):
        (made,) = output.outputs
        length = len(output.prompt_token_ids) + len(made.token_ids)
        assert (made.finish_reason, length) == ("length", min(room + 3, len(output.prompt_token_ids) + room + 1))
    with pytest.raises(PromptTooLongError, match=f"ask for at most {room}"):
        engine.generate("abc", greedy)
    with pytest.raises(PromptTooLongError, match="shorten the prompt"):
        llm.generate([[1] * (room + 3)], greedy)
    with pytest.raises(InvalidParameterError, match=f"the context of {room + 3} leaves {room} after the prompt"):
        llm.generate("abc", SamplingParams(min_tokens=room + 1, max_tokens=room + 5))


def test_prompts_of_every_kind_in_their_order(llm: LLM, engine: InferenceEngine) -> None:
    ids = engine.tokenize("abc")
    prompts: list[Any] = ["abc", ids, TextPrompt(prompt="abc"), TokensPrompt(prompt_token_ids=ids), {"prompt": "z"}]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    wanted = engine.generate(["abc"] * 4 + ["z"], GREEDY, use_tqdm=False)
    assert [each.outputs[0].token_ids for each in outputs] == [list(each.token_ids) for each in wanted]
    assert [each.prompt for each in outputs] == ["abc", None, "abc", None, "z"]
    assert outputs[0].prompt_token_ids == ids
    first = outputs[0]
    assert isinstance(first, RequestOutput)
    assert first.finished
    assert first.outputs[0].finished()
    assert (first.outputs[0].finish_reason, first.outputs[0].text) == ("length", wanted[0].text)
    assert llm.generate(ids, GREEDY)[0].outputs[0].token_ids == first.outputs[0].token_ids


def test_log_probabilities_by_token(llm: LLM, engine: InferenceEngine) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    (output,), (wanted,) = llm.generate("abc", params), engine.generate("abc", params)
    sequence, entries = output.outputs[0], wanted.outputs[0].logprobs
    assert sequence.logprobs is not None
    assert entries is not None
    for token, found, entry in zip(sequence.token_ids, sequence.logprobs, entries, strict=True):
        assert found[token].logprob == entry.chosen.logprob
        assert list(found) == [top.token_id for top in entry.top]  # greedy: the chosen one is the likeliest
        assert [each.rank for each in found.values()] == [1, 2]
        assert found[token].decoded_token == entry.chosen.text
    assert sequence.cumulative_logprob == wanted.outputs[0].cumulative_logprob
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert set(output.prompt_token_ids[1:]) <= {token for entry in output.prompt_logprobs[1:] for token in entry or ()}


def test_log_probabilities_of_tokens_that_a_request_names(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=2, logprob_token_ids=[5, 200], ignore_eos=True)
    found = llm.generate("abc", params, use_tqdm=False)[0].outputs[0]
    assert found.logprobs is not None
    for token, entry in zip(found.token_ids, found.logprobs, strict=True):
        assert set(entry) == {token, 5, 200}
        assert [entry[each].rank for each in (token, 5, 200)] == [1, None, None]
    forced = SamplingParams(temperature=0, max_tokens=1, logprobs=0, allowed_token_ids=[5], ignore_eos=True)
    alone = llm.generate("abc", forced, use_tqdm=False)[0].outputs[0].logprobs
    assert alone is not None
    assert alone[0][5].logprob == found.logprobs[0][5].logprob
    with pytest.raises(InvalidParameterError, match="logprob_token_ids has ids above"):
        llm.generate("abc", SamplingParams(logprob_token_ids=[1 << 20]), use_tqdm=False)


def test_a_chat_gives_a_list_and_sixteen_tokens(llm: LLM, engine: InferenceEngine) -> None:
    one = llm.chat([USER], SamplingParams(temperature=0, ignore_eos=True))
    assert len(one) == 1
    assert len(one[0].outputs[0].token_ids) == 16
    several = llm.chat([[USER], [USER, {"role": "assistant", "content": "x"}, USER]], GREEDY, use_tqdm=False)
    prompts = [engine.tokenize(engine.apply_chat_template([USER]), False), several[1].prompt_token_ids]
    assert several[0].prompt_token_ids == prompts[0]
    assert len(prompts[1]) > len(prompts[0])
    short = llm.chat([USER], GREEDY, chat_template="{{ messages[0].content }}")
    assert short[0].prompt_token_ids == engine.tokenize("hi", False)
    for form in ("auto", "string", "openai"):
        assert llm.chat([USER], GREEDY, chat_template_content_format=form)[0].prompt_token_ids == prompts[0]
    with pytest.raises(InvalidParameterError, match=r"^messages\[1\]\.content"):
        llm.chat([USER, {"role": "user"}])


def test_what_is_left_open_is_vllms_and_not_ours(llm: LLM, engine: InferenceEngine) -> None:
    assert engine.default_sampling_params.temperature == 0.8
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.max_tokens) == (1, 1, 0, 0, 16)
    plain = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, seed=5, ignore_eos=True)
    wanted = engine.generate("abc", plain)[0].token_ids
    assert wanted != engine.generate("abc", SamplingParams(seed=5, ignore_eos=True))[0].token_ids
    assert tuple(llm.generate("abc", SamplingParams(seed=5, ignore_eos=True))[0].outputs[0].token_ids) == wanted
    params.max_tokens = 3
    params.ignore_eos = True
    assert len(llm.generate("abc", params)[0].outputs[0].token_ids) == 3


def test_a_seed_of_minus_one_is_no_seed_as_in_vllm(llm: LLM) -> None:
    params = SamplingParams(seed=-1, max_tokens=60, ignore_eos=True)
    first, second = (llm.generate("abc", params)[0].outputs[0].token_ids for _ in range(2))
    assert first != second


def test_the_models_own_defaults_count_without_parameters_alone(toy_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(toy_model, tmp_path / "toy")
    said = {"temperature": 0.3, "top_k": 5, "max_new_tokens": 7, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(said))
    with InferenceEngine(str(folder), threads=1) as engine:
        params = LLM(engine).get_default_sampling_params()
        assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.3, 5, 1, 7)
        assert "max_tokens" not in engine.model_info.default_sampling
        assert len(LLM(engine).generate("abc")[0].outputs[0].token_ids) == 7
    other = tmp_path / "other"
    other.mkdir()
    (other / "generation_config.json").write_text('{"temperature": 0.5}')
    for given, wanted in (
        ({"generation_config": "vllm"}, (1.0, 0, 16)),
        ({"generation_config": str(other)}, (0.5, 0, 16)),
        ({"override_generation_config": {"top_k": 9, "max_new_tokens": 2}}, (0.3, 9, 2)),
    ):
        with LLM(str(folder), threads=1, max_model_len=64, **given) as llm:
            params = llm.get_default_sampling_params()
        assert (params.temperature, params.top_k, params.max_tokens) == wanted


def test_vectors_and_scores(llm: LLM, engine: InferenceEngine) -> None:
    params = [PoolingParams(pooling="mean"), PoolingParams(normalize=False)]
    outputs = llm.embed(["abc", {"prompt": "z"}], pooling_params=params, use_tqdm=False)
    for output, text, each in zip(outputs, ("abc", "z"), params, strict=True):
        assert output.outputs.embedding == pytest.approx(engine.embed(text, each)[0].embedding, rel=1e-4, abs=1e-6)
        assert output.prompt_token_ids == engine.tokenize(text)
        assert output.outputs.hidden_size == engine.model_info.embedding_size
    data = llm.encode("abc", params[0])[0].outputs.data
    assert isinstance(data, np.ndarray)
    assert data.tolist() == pytest.approx(outputs[0].outputs.embedding, rel=1e-4, abs=1e-6)
    scores = [each.outputs.score for each in llm.score("a", ["b", "c"])]
    wanted = [each.score for each in engine.score([("a", "b"), ("a", "c")])]
    assert scores == pytest.approx(wanted, abs=1e-5)
    assert [each.outputs.score for each in llm.score(["a", "a"], ["b", "c"])] == pytest.approx(wanted, abs=1e-5)
    assert llm.score("a", "b")[0].prompt_token_ids == engine.tokenize("a") + engine.tokenize("b")
    with pytest.raises(InvalidParameterError, match="not 2 and 3"):
        llm.score(["a", "b"], ["c", "d", "e"])
    with pytest.raises(InvalidParameterError, match="not 1 and 0 texts"):
        llm.score("a", [])
    for other in ({"prompt": "a"}, 5):
        with pytest.raises(InvalidParameterError, match="a pair must be two texts"):
            llm.score(other, "b")  # type: ignore[arg-type]
    with pytest.raises(InvalidParameterError, match="2 inputs need as many params, not 1"):
        llm.embed(["a", "b"], pooling_params=params[:1])


def test_the_pooler_of_a_model_holds_in_every_call(tmp_path: Path) -> None:
    """The fields of `pooler_config` that a call leaves out, and its pooling for scores too."""
    folder = str(write_toy_encoder(tmp_path / "m"))
    with LLM(folder, threads=1, pooler_config={"pooling_type": "CLS", "normalize": False}) as llm:

        def vector(text: str, params: PoolingParams | None = None) -> np.ndarray:
            return np.array(llm.embed(text, pooling_params=params, use_tqdm=False)[0].outputs.embedding)

        first, second = (vector(text) for text in ("hello", "bye"))
        assert np.linalg.norm(first) > 1.1
        unit = vector("hello", PoolingParams(normalize=True))
        assert vector("hello", PoolingParams(use_activation=True)).tolist() == unit.tolist()
        assert unit == pytest.approx(first / np.linalg.norm(first), rel=1e-5)
        (each,) = llm.embed(["hello"], pooling_params=[PoolingParams(normalize=True)], use_tqdm=False)
        assert each.outputs.embedding == unit.tolist()
        cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
        assert llm.score("hello", "bye", use_tqdm=False)[0].outputs.score == pytest.approx(cosine, abs=1e-5)


def test_a_cross_encoder_tells_the_tokens_of_its_pairs(tmp_path: Path) -> None:
    folder = write_toy_encoder(tmp_path / "m", toy_encoder_config("BertForSequenceClassification"), pooling=None)
    with LLM(str(folder), runner="pooling", threads=1) as llm:
        (output,) = llm.score("a b", "c")
        assert 0 < output.outputs.score < 1
        assert len(output.prompt_token_ids) == 6  # with [CLS] and two [SEP]
        with pytest.raises(InvalidParameterError, match="cross-encoder"):
            llm.embed("a")


def test_classes(tmp_path: Path, llm: LLM) -> None:
    labels = {"id2label": {"0": "sad", "1": "glad", "2": "mad"}}
    config = toy_encoder_config("BertForSequenceClassification", **labels)
    with LLM(str(write_toy_encoder(tmp_path / "m", config, pooling=None)), runner="pooling", threads=1) as classifier:
        outputs = classifier.classify(["a b", {"prompt": "c"}], use_tqdm=False)
        assert [each.outputs.num_classes for each in outputs] == [3, 3]
        assert sum(outputs[0].outputs.probs) == pytest.approx(1)
        assert outputs[0].outputs.probs == list(classifier.engine.classify("a b")[0].probs)
        data = classifier.encode("a b", pooling_task="classify")[0].outputs.data
        assert data.tolist() == outputs[0].outputs.probs
        logits = classifier.encode("a b", PoolingParams(use_activation=False), pooling_task="classify")[0].outputs.data
        assert np.exp(logits) / np.exp(logits).sum() == pytest.approx(data, rel=1e-5)
    with pytest.raises(InvalidParameterError, match="no head for scores or classes"):
        llm.classify("a")


def test_the_activation_of_a_pooler_holds_for_classes(tmp_path: Path) -> None:
    config = toy_encoder_config("BertForSequenceClassification", id2label={"0": "sad", "1": "glad", "2": "mad"})
    folder = str(write_toy_encoder(tmp_path / "m", config, pooling=None))
    with LLM(folder, threads=1, pooler_config={"use_activation": False}) as classifier:
        active = PoolingParams(use_activation=True)
        logits = np.array(classifier.classify("a b", use_tqdm=False)[0].outputs.probs)
        probs = np.array(classifier.classify("a b", pooling_params=active, use_tqdm=False)[0].outputs.probs)
        assert np.exp(logits) / np.exp(logits).sum() == pytest.approx(probs, rel=1e-5)
        assert classifier.encode("a b", pooling_task="classify")[0].outputs.data.tolist() == logits.tolist()
    with LLM(folder, threads=1, pooler_config={"normalize": False}) as classifier:  # of vectors only
        assert classifier.classify("a b", use_tqdm=False)[0].outputs.probs == probs.tolist()


def test_vectors_of_tokens_are_not_one_vector(tmp_path: Path, llm: LLM) -> None:
    with pytest.raises(
        InvalidParameterError, match="tokens have a row each: use encode with pooling_task='token_embed'"
    ):
        llm.embed("abc", pooling_params=PoolingParams(pooling="all"), use_tqdm=False)
    config = toy_encoder_config("BertModel") | {"architectures": ["BertForTokenClassification"]}
    folder = write_toy_encoder(tmp_path / "m", pooling=None)
    (folder / "config.json").write_text(json.dumps(config))
    head = {"classifier.weight": np.ones((2, 32), np.float32), "classifier.bias": np.zeros(2, np.float32)}
    save_file(load_file(folder / "model.safetensors") | head, folder / "model.safetensors")
    with (
        LLM(str(folder), threads=1) as tagger,
        pytest.raises(InvalidParameterError, match="use encode with pooling_task='token_classify'"),
    ):
        tagger.classify("a b", use_tqdm=False)


def test_a_tokenizer_as_programs_use_it(llm: LLM, engine: InferenceEngine) -> None:
    tokenizer = llm.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"
    assert tokenizer.decode(np.int64(97)) == tokenizer.decode(np.array([97])) == "a"
    assert tokenizer.convert_ids_to_tokens(np.int64(97)) == tokenizer.convert_ids_to_tokens(97)
    assert tokenizer("abc")["input_ids"] == tokenizer("abc").input_ids == tokenizer.encode("abc")
    assert tokenizer("abc").attention_mask == [1] * len(tokenizer.encode("abc"))
    with pytest.raises(AttributeError, match="token_type_ids"):
        tokenizer("abc").token_type_ids  # noqa: B018
    assert tokenizer.eos_token_id == engine.model_info.eos_token_ids[0]
    text = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert text == engine.apply_chat_template([USER])
    ids = engine.tokenize(str(text), False)
    assert tokenizer.apply_chat_template([USER], add_generation_prompt=True) == ids
    several = tokenizer.apply_chat_template([[USER], [USER]], tokenize=False, add_generation_prompt=True)
    assert several == [text, text]
    two = tokenizer(["abc", "a"])
    assert two["input_ids"] == [tokenizer.encode("abc"), tokenizer.encode("a")]
    assert tokenizer.batch_decode(two["input_ids"]) == [tokenizer.decode(each) for each in two["input_ids"]]
    names = tokenizer.convert_ids_to_tokens(ids)
    assert tokenizer.convert_tokens_to_ids(names) == ids
    assert tokenizer.get_vocab()[tokenizer.convert_ids_to_tokens(ids[0])] == ids[0]
    assert tokenizer.convert_tokens_to_ids("no such token") == tokenizer.get_vocab().get(tokenizer.unk_token or "")
    conventions = engine.chat_conventions
    assert tokenizer.chat_template == conventions.chat_template
    assert dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids)) == dict(conventions.special_tokens)
    for kind in ("bos", "eos", "pad"):
        name = conventions.token_names.get(f"{kind}_token")
        assert getattr(tokenizer, f"{kind}_token") == name
        if name in conventions.special_tokens:
            assert getattr(tokenizer, f"{kind}_token_id") == conventions.special_tokens[name]


def test_a_form_and_functions_of_a_request(llm: LLM) -> None:
    form: dict[str, Any] = {"choice": ["yes", "no"], "disable_additional_properties": False}
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**form), max_tokens=8)
    assert llm.generate("abc", params)[0].outputs[0].text in ("yes", "no")

    def only_a(_: Any, row: Any) -> Any:
        row[:97], row[98:] = -np.inf, -np.inf
        return row

    output = llm.generate("abc", SamplingParams(logits_processors=[only_a], max_tokens=4, ignore_eos=True))[0]
    assert output.outputs[0].text == "aaaa"


def test_waking_up_says_whether_everything_is_awake(llm: LLM) -> None:
    llm.sleep()
    assert llm.wake_up(["weights"]) is False
    assert llm.wake_up() is True
    assert llm.generate("abc", GREEDY, use_tqdm=False)


def test_a_bar_of_the_callers_own_is_moved(llm: LLM) -> None:
    made: list[tuple[dict[str, Any], list[int]]] = []

    class Bar:
        def __init__(self, **given: Any) -> None:
            made.append((given, []))

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None: ...

        def update(self) -> None:
            made[-1][1].append(1)

    llm.generate(["a", "b"], GREEDY, use_tqdm=Bar)
    assert [(given["total"], len(moved)) for given, moved in made] == [(2, 2)]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda llm: llm.generate("a", lora_request=object()),
            "lora_request must be a LoRARequest, or pairs .*, not object",
        ),
        (
            lambda llm: llm.chat([USER], lora_request=object()),
            "lora_request must be a LoRARequest, or pairs .*, not object",
        ),
        (
            lambda llm: llm.generate("a", mm_processor_kwargs={}),
            "takes no mm_processor_kwargs: images are preprocessed",
        ),
        (lambda llm: llm.generate("a", tokenization_kwargs={"truncation": True}), "may only have add_special_tokens"),
        (lambda llm: llm.chat([USER], chat_template_content_format="parts"), "must be auto, string or openai"),
        (lambda llm: llm.encode("a", tokenization_kwargs={"x": 1}), "^encode takes no tokenization_kwargs"),
        (lambda llm: llm.embed("a", tokenization_kwargs={"truncate_prompt_tokens": -1}), "never truncated"),
        (lambda llm: llm.score("a", "b", pooling_params=PoolingParams()), "files set the activation of scores"),
        (lambda llm: llm.encode("a", pooling_task="score"), "for pairs of texts use score"),
        (lambda llm: llm.generate("a", {"temperature": 0}), r"not dict: write SamplingParams\(temperature=\.\.\.\)"),
        (lambda llm: llm.generate({"multi_modal_data": {}, "prompt": "a"}), "the model takes text only"),
        (lambda llm: llm.generate(["a", "b"], priority=1.5), "priority must be a whole number"),
        (lambda llm: llm.generate(["a", "b"], priority=np.array([1, 0])), "priority must be a whole number"),
        (
            lambda llm: llm.beam_search("a", BeamSearchParams(beam_width=1, max_tokens=1), priority=1.5),
            "priority must be a whole number",
        ),
    ],
)
def test_what_there_is_not_is_refused_by_name(llm: LLM, call: Any, said: str) -> None:
    with pytest.raises(InvalidParameterError, match=said):
        call(llm)


def test_methods_and_arguments_that_there_are_not(llm: LLM) -> None:
    with pytest.raises(AttributeError, match=r"no 'llm_engine': the engine is `engine`"):
        llm.llm_engine  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(TypeError, match=r"^generate has no argument 'max_tokens': it is a field of SamplingParams"):
        llm.generate("a", max_tokens=5)  # type: ignore[call-arg]


def test_the_engine_itself_says_whose_output_kind_is(engine: InferenceEngine) -> None:
    params = SamplingParams(output_kind=RequestOutputKind.DELTA, max_tokens=2)
    with pytest.raises(InvalidParameterError, match="output_kind is for AsyncLLM"):
        engine.generate("a", params)
    assert LLM(engine).generate("a", params)[0].finished  # as vLLM's does


def test_over_an_engine_in_a_process_of_its_own(toy_model: Path, engine: InferenceEngine) -> None:
    with RemoteEngine(str(toy_model), threads=1) as remote:
        llm = LLM(remote)
        found = llm.generate("abc" * 40, GREEDY)[0]
        assert found.outputs[0].token_ids == list(engine.generate("abc" * 40, GREEDY)[0].token_ids)
        assert llm.get_default_sampling_params() == LLM(engine).get_default_sampling_params()
        assert (llm.generate("abc" * 40, GREEDY)[0].num_cached_tokens or 0) > 0
        assert llm.reset_prefix_cache()
        assert llm.generate("abc" * 40, GREEDY)[0].num_cached_tokens == 0


def test_whose_an_engine_is(engine: InferenceEngine, toy_model: Path) -> None:
    with LLM(engine):
        pass
    assert engine.is_alive
    with pytest.raises(TypeError, match="takes no arguments: seed"):
        LLM(engine, seed=1)
    with pytest.raises(ConfigError, match="not both: dtype"):
        LLM(EngineConfig(model=str(toy_model)), dtype="half")
