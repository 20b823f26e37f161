# SPDX-License-Identifier: MIT
"""Rows of vectors, scores, rankings, tokens, and of the routes for operators."""

from __future__ import annotations

from candle_vllm.openai.protocol.cohere import CohereEmbedRequest
from candle_vllm.openai.protocol.embeddings import EMBEDDING_REFUSED_FIELDS
from candle_vllm.openai.protocol.score import RerankRequest, ScoreRequest
from candle_vllm.openai.protocol.tokenizing import MAX_DETOKENIZED
from packages.server.tests.wrong_requests.rows import BIG, GONE, LONG, MODEL, Route, Row, not_served, switches, texts

POOLING = [
    *MODEL,
    *texts("user", "request_id"),
    Row("request_id", "a b"),
    Row("priority", "1"),
    Row("priority", -1, code="unsupported_parameter"),
    Row("priority", BIG),
    Row("encoding", "float"),
]
EMBEDDING_ROWS = [
    *POOLING,
    *not_served(EMBEDDING_REFUSED_FIELDS),
    *switches("normalize", "normalized", "use_activation", "truncate", "return_multivector", "add_special_tokens"),
    Row("task", 1),
    Row("truncate_prompt_tokens", 0),
    Row("input_type", ""),
    Row("input", GONE),
    Row("input", None),
    Row("input", ""),
    Row("input", []),
    Row("input", 1),
    Row("input", {}),
    Row("input", ["a", ""], "input.1"),
    Row("input", ["a", 1], "input.1"),
    Row("input", [1, "a"], "input.1"),
    Row("input", [-1], "input.0"),
    Row("input", [99999]),
    Row("input", [[1], []], "input.1"),
    Row("input", [[1], [99999]], "input.1"),
    Row("input", ["a"] * 2049),
    Row("input", "x" * 5000),
    Row("input", ["a", "x" * 5000], "input.1"),
    Row("encoding_format", "hex"),
    Row("encoding_format", 1),
    Row("dimensions", 0),
    Row("dimensions", "4"),
    Row("dimensions", 1.5),
    Row("dimensions", BIG),
    Row("dimensions", 9999),
    Row("pooling", "max"),
    Row("pooling", 1),
    Row("embedding_type", "cls"),  # another one than pooling
]
MODERATION_ROWS = [*MODEL, Row("input", []), Row("input", [1], "input.0")]
COHERE_ROWS = [
    *not_served(CohereEmbedRequest.refused_fields),
    Row("texts", []),
    Row("texts", ["a", 1], "texts.1"),
    Row("input_type", "weather"),
    Row("embedding_types", ["float", "f8"], "embedding_types.1"),
    Row("output_dimension", 9999),
    Row("truncate", "MIDDLE"),
]
SCORING = [
    *POOLING,
    Row("truncate_prompt_tokens", -2),
    Row("truncate_prompt_tokens", 1 << 30),
    Row("max_tokens_per_doc", -1),
    Row("max_tokens_per_doc", "1"),
]
SCORE_ROWS = [
    *SCORING,
    *not_served(ScoreRequest.refused_fields),
    Row("text_1", GONE, "text_2"),
    Row("text_2", GONE, "text_1"),
    Row("text_1", 1),
    Row("text_1", ""),
    Row("text_1", []),
    Row("text_1", ["a", ""], "text_1.1"),
    Row("text_1", ["a", 1], "text_1.1"),
    Row("text_1", ["a", "b", "c"]),  # as many as on the other side, or one
    Row("text_1", "x" * 5000),
    Row("text_1", ["a", "x" * 5000], "text_1.1"),
    Row("text_2", ["a", "x" * 5000], "text_2.1"),
    Row("text_2", ["a"] * 2049),
    Row("queries", "a"),
]
RERANK_ROWS = [
    *SCORING,
    *not_served(RerankRequest.refused_fields),
    *switches("return_documents"),
    Row("query", GONE),
    Row("query", ""),
    Row("query", 1),
    Row("query", ["a"]),
    Row("query", "x" * 5000),
    Row("documents", GONE),
    Row("documents", []),
    Row("documents", "a"),
    Row("documents", {}),
    Row("documents", ["a"] * 2049),
    Row("documents.0", 1),
    Row("documents.0", ""),
    Row("documents.0", {}, "documents.0.text"),
    Row("documents.0", {"text": ""}, "documents.0.text"),
    Row("documents.0", {"text": "a", "image": "b"}, "documents.0.image"),
    Row("documents.0", {"text": "a", "txt": "b"}, "documents.0.txt"),
    Row("documents.1", "x" * 5000),
    Row("top_n", -1),
    Row("top_n", "1"),
    Row("top_n", 1.5),
    Row("top_n", BIG),
]
TOKENIZE_ROWS = [
    *MODEL,
    *switches("add_special_tokens", "return_token_strs"),
    Row("prompt", GONE),
    Row("prompt", 1),
    Row("prompt", ["a"]),
    Row("messages", [{"role": "user", "content": "a"}], "prompt"),
    Row("tools", []),
    Row("add_generation_prompt", True),
    Row("mm_processor_kwargs", {"a": 1}),
    Row("content", "a"),
]
MESSAGES = [{"role": "user", "content": "a"}]
TOKENIZE_CHAT_ROWS = [
    *MODEL,
    *switches("add_special_tokens", "return_token_strs", "add_generation_prompt", "continue_final_message"),
    Row("messages", []),
    Row("messages", "a"),
    Row("messages.0.role", "bot"),
    Row("messages.0.content", GONE),
    Row("messages.1", {"role": "tool", "tool_call_id": "x", "content": "a"}, "messages.1.tool_call_id"),
    Row("tools", {}),
    Row("tools", [{"type": "function"}], "tools.0.function"),
    Row("chat_template", "{{ messages }}", code="unsupported_parameter"),
    Row("chat_template_kwargs", {"self": 1}, "chat_template_kwargs.self"),
    Row("temperature", 1),
    Row("max_tokens", 1),
]
DETOKENIZE_ROWS = [
    *MODEL,
    Row("tokens", GONE),
    Row("tokens", None),
    Row("tokens", "1"),
    Row("tokens", {}),
    Row("tokens", ["a"], "tokens.0"),
    Row("tokens", [1, 1.5], "tokens.1"),
    Row("tokens", [1, True], "tokens.1"),
    Row("tokens", [-1], "tokens.0"),
    Row("tokens", [1, 2, 99999], "tokens.2"),
    Row("tokens", [BIG], "tokens.0"),
    Row("tokens", [[1]], "tokens.0"),
    Row("tokens", [1] * (MAX_DETOKENIZED + 1)),
    Row("ids", [1]),
]
MANAGED_ROWS = [
    Row("model", GONE),
    Row("model", 1),
    Row("model", ""),
    Row("model", LONG),
    Row("model", None),
    Row("model", "other", status=404, code="model_not_found"),
    Row("model_id", "default", "model"),  # both names of the field
    Row("force", True),
]
TEMPLATE_ROWS = [
    *MODEL,
    Row("messages", []),
    Row("messages", 1),
    Row("chat_template", "{{ messages }}", code="unsupported_parameter"),
    Row("prompt", "x"),
]
LLAMA_ROWS = [
    *MODEL,
    Row("n_predict", -3),
    Row("n_predict", "1"),
    Row("temperature", -1),
    Row("top_p", 0),
    Row("seed", 0.5),
    Row("stop", 1),
    Row("json_schema", "{}"),
    Row("json_schema", {"type": "none-such"}),
    Row("grammar", "root ::= nothing ("),
    Row("grammar", 1),
    Row("n_probs", 21),
    Row("post_sampling_probs", True, code="unsupported_parameter"),
    Row("logit_bias", [[1, 101]]),
    Row("logit_bias", [[-1, 1]]),
    Row("logit_bias", [["a"]]),
    Row("response_fields", "content"),
    Row("messages", MESSAGES),
    Row("n_predct", 3),
]
COMPLETION_ROWS = [
    *LLAMA_ROWS,
    Row("prompt", GONE),
    Row("prompt", ["a", 1], "prompt.1"),
    Row("prompt", [], "prompt"),
    Row("prompt", [1, -1], "prompt.1"),
    Row("prompt", {"prompt_string": 1}, "prompt.prompt_string"),
    Row("prompt", {"multimodal_data": []}, "prompt.prompt_string"),
    Row("prompt", [{"prompt_string": "a", "multimodal_data": "a"}], "prompt.0.multimodal_data"),
    Row(
        "prompt",
        {"prompt_string": "<__media__>", "multimodal_data": ["QUJD"]},
        "prompt.multimodal_data",
        code="unsupported_parameter",
    ),
]
INFILL_ROWS = [
    *LLAMA_ROWS,
    Row("input_prefix", GONE),
    Row("input_suffix", 1),
    Row("input_extra", [{"filename": "a"}], "input_extra.0.text"),
    Row("prompt", 1),
]
FIM_ROWS = [
    *MODEL,
    Row("prompt", GONE),
    Row("prompt", ["a"]),
    Row("suffix", 1),
    Row("temperature", -1),
    Row("top_p", 0),
    Row("max_tokens", 0),
    Row("min_tokens", -1),
    Row("min_tokens", 8),
    Row("stream", "yes"),
    Row("stop", [1], "stop.0"),
    Row("random_seed", -1),
    Row("seed", 1, code="unsupported_parameter"),
    Row("n", 2, code="unsupported_parameter"),
    Row("metadata", "a"),
    Row("sufix", "a"),
]
POOLING_ROWS = [
    *MODEL,
    Row("input", []),
    Row("input", [1, "a"], "input.1"),
    Row("task", "plugin"),
    Row("task", 1),
    Row("messages", MESSAGES, code="unsupported_parameter"),
    Row("dimensions", 0),
    Row("dimensions", "4"),
    Row("encoding_format", "hex"),
    Row("pooling", "max"),
]
CLASSIFY_ROWS = [
    *MODEL,
    Row("input", []),
    Row("input", [1, "a"], "input.1"),
    Row("add_special_tokens", "yes"),
    Row("messages", MESSAGES, code="unsupported_parameter"),
    Row("softmax", False, code="unsupported_parameter"),
    Row("truncate_prompt_tokens", -2),
    Row("truncate_prompt_tokens", 1 << 30),
    Row("truncation_side", "middle"),
]
ROUTES = [
    Route("/v1/embeddings", {"model": "default", "input": "a", "pooling": "mean"}, EMBEDDING_ROWS),
    *[Route(path, {"text_1": ["a", "b"], "text_2": ["c", "d"]}, SCORE_ROWS) for path in ("/v1/score", "/score")],
    *[
        Route(path, {"query": "a", "documents": ["b", "c"]}, RERANK_ROWS)
        for path in ("/v1/rerank", "/rerank", "/v2/rerank")
    ],
    Route("/tokenize", {"prompt": "a"}, TOKENIZE_ROWS),
    Route("/tokenize", {"messages": MESSAGES}, TOKENIZE_CHAT_ROWS),
    Route("/detokenize", {"tokens": [1]}, DETOKENIZE_ROWS),
    *[Route(path, {"prompt": "a", "n_predict": 4}, COMPLETION_ROWS) for path in ("/completion", "/completions")],
    Route("/infill", {"input_prefix": "a", "input_suffix": "", "n_predict": 4}, INFILL_ROWS),
    Route("/v1/fim/completions", {"prompt": "a", "suffix": "", "max_tokens": 4}, FIM_ROWS),
    *[
        Route(path, {"messages": MESSAGES}, TEMPLATE_ROWS)
        for path in ("/apply-template", "/v1/chat/completions/input_tokens")
    ],
    Route(
        "/v1/moderations", {"model": "default", "input": "a"}, [*MODEL, Row("input", []), Row("input", [1], "input.0")]
    ),
    *[Route(path, {"texts": ["a"]}, COHERE_ROWS) for path in ("/v1/embed", "/v2/embed")],
    Route("/classify", {"model": "default", "input": "a"}, CLASSIFY_ROWS),
    Route("/pooling", {"model": "default", "input": "a", "pooling": "mean", "task": "embed"}, POOLING_ROWS),
    *[Route(f"/v1/models/{verb}", {"model": "default"}, MANAGED_ROWS) for verb in ("load", "select")],
    Route(
        "/v1/models/unload",
        {"model": "default"},
        [*MANAGED_ROWS, Row("model", "default", status=409, code="model_stays")],
    ),
]
