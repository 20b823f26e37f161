# SPDX-License-Identifier: MIT
"""LangChain's standard tests of chat models and embeddings: OpenAI's two APIs, Ollama's and Anthropic's."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from langchain_anthropic import ChatAnthropic
from langchain_ollama import ChatOllama, OllamaEmbeddings
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_tests.integration_tests import ChatModelIntegrationTests, EmbeddingsIntegrationTests

ADDRESS, EMBEDDER = os.environ["SUITE_ADDRESS"], os.environ["SUITE_EMBEDDER"]
OPENAI: dict[str, Any] = {
    "model": "qwen", "base_url": f"{ADDRESS}/v1", "api_key": "none", "temperature": 0, "max_tokens": 400,
    "stream_usage": True,
}  # fmt: skip


class TestOpenAIChat(ChatModelIntegrationTests):
    chat_model_class = ChatOpenAI
    chat_model_params: ClassVar[dict[str, Any]] = OPENAI
    supports_json_mode = True
    model_override_value = "other"


class TestOpenAIResponses(TestOpenAIChat):
    chat_model_params: ClassVar[dict[str, Any]] = {**OPENAI, "use_responses_api": True}


class TestOpenAIResponsesV1(TestOpenAIChat):
    chat_model_params: ClassVar[dict[str, Any]] = {
        **OPENAI, "use_responses_api": True, "output_version": "responses/v1",
    }  # fmt: skip


class TestOllamaChat(ChatModelIntegrationTests):
    chat_model_class = ChatOllama
    chat_model_params: ClassVar[dict[str, Any]] = {
        "model": "qwen", "base_url": ADDRESS, "temperature": 0, "num_predict": 400,
    }  # fmt: skip
    has_tool_choice = False  # as in ChatOllama's own tests: the API has none
    supports_json_mode = True
    model_override_value = "other"


class TestAnthropicChat(ChatModelIntegrationTests):
    chat_model_class = ChatAnthropic
    chat_model_params: ClassVar[dict[str, Any]] = {
        "model": "qwen", "base_url": ADDRESS, "api_key": "none", "temperature": 0, "max_tokens": 400,
    }  # fmt: skip
    supports_anthropic_inputs = True
    model_override_value = "other"


class TestOpenAIEmbedding(EmbeddingsIntegrationTests):
    embeddings_class = OpenAIEmbeddings
    embedding_model_params: ClassVar[dict[str, Any]] = {
        "model": "minilm", "base_url": f"{EMBEDDER}/v1", "api_key": "none", "check_embedding_ctx_length": False,
    }  # fmt: skip


class TestOllamaEmbedding(EmbeddingsIntegrationTests):
    embeddings_class = OllamaEmbeddings
    embedding_model_params: ClassVar[dict[str, Any]] = {"model": "minilm", "base_url": EMBEDDER}
