# SPDX-License-Identifier: MIT
"""The table of routes: what each takes, gives and refuses. The document is made of it.

A route that is not in it fails a test. Outside the ten steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import msgspec

from candle_vllm.openai import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    EmbeddingList,
    EmbeddingRequest,
    ErrorEnvelope,
    Ranking,
    RerankRequest,
    ScoreList,
    ScoreRequest,
)
from candle_vllm.openai.anthropic import (
    CountTokensRequest,
    ErrorBody,
    Message,
    MessageEvent,
    MessagesRequest,
    TokenCount,
)
from candle_vllm.openai.fim import FimRequest
from candle_vllm.openai.llama_server import InfillRequest, LlamaCompletionRequest, LlamaText
from candle_vllm.openai.protocol.embeddings import ClassifiedList, ClassifyRequest, PooledList, PoolingRequest
from candle_vllm.openai.protocol.generation import LoraScale
from candle_vllm.openai.protocol.tokenizing import (
    Detokenized,
    DetokenizeRequest,
    RenderedPrompt,
    TokenizeChatRequest,
    Tokenized,
    TokenizeTextRequest,
)
from candle_vllm.responses.protocol.events import ResponseEvent
from candle_vllm.responses.protocol.request import CompactRequest, InputTokensRequest, ResponsesRequest
from candle_vllm.responses.protocol.response import CompactedResponse, InputTokens, Response
from candle_vllm.responses.store.entries import MAX_ID
from candle_vllm.server.mailbox.record import Record, RecordList
from candle_vllm.server.mcp.wire import McpCallRequest, McpCallResult, McpServerInfo, McpToolInfo
from candle_vllm.server.models.cards import (
    AdapterCard,
    LoadedCard,
    LoadProgress,
    ManagerStatus,
    ModelRequest,
    NewModelRequest,
    Queues,
    SlotStatus,
    UnloadedCard,
)
from candle_vllm.server.models.inventory import Inventory
from candle_vllm.server.models.manager import Changes
from candle_vllm.server.openapi.components import Naming
from candle_vllm.server.openapi.kept_operations import KEPT_OPERATIONS, RESPONSES
from candle_vllm.server.openapi.ollama_operations import OLLAMA_OPERATIONS
from candle_vllm.server.openapi.operation import BODY_ERRORS, Key, Operation
from candle_vllm.server.routes.adapters import LoadAdapterRequest, NumberedAdapter, Succeeded, UnloadAdapterRequest
from candle_vllm.server.routes.mailbox import DEFAULT_LIST, MAX_LIST, Delivered, PushRequest
from candle_vllm.server.routes.relatives import Load, Properties, ServerInfo, Sleeping, Slot, TokenizerInfo

MODEL_ERRORS = (404, 503)
QUEUE_ERRORS = (*MODEL_ERRORS, 429, 504)


class Standing(msgspec.Struct, frozen=True):
    """One word on how things stand."""

    status: str


class Readiness(msgspec.Struct, frozen=True):
    """Whether the default model can answer, and while it is loaded how far that is."""

    status: str
    loading: LoadProgress | msgspec.UnsetType = msgspec.UNSET


class Version(msgspec.Struct, frozen=True):
    """The version of the server package."""

    version: str


class Welcome(msgspec.Struct, frozen=True):
    """What this is and where to go on."""

    name: str
    version: str
    models: tuple[str, ...]
    openai_base_url: str


class Selected(msgspec.Struct, frozen=True):
    """The model that was chosen: ready, or switching while requests for it wait."""

    status: str
    model: str
    queue_length: int


class UsageCounts(msgspec.Struct, frozen=True):
    """Requests that have ended, and their tokens."""

    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class UsageRow(msgspec.Struct, frozen=True):
    """The counts of one API key with one model."""

    model: str
    key: str
    counts: UsageCounts


def _aliases(paths: tuple[str, ...], operation: Operation) -> dict[Key, Operation]:
    """One operation under several paths, each with an id of its own."""
    names = [operation.id, *(operation.id + "_" + path.strip("/").replace("/", "_") for path in paths[1:])]
    return {
        ("POST", path): Operation(**{**vars(operation), "id": name}) for path, name in zip(paths, names, strict=True)
    }


_MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
_MAILBOX = (400, 404, 503)
_RECORD = {"request_id": "The id of the answer."}
_ANTHROPIC = Naming("Anthropic", "Out")
_WHICH = {"model": {"type": "string", "description": "A served name; without it the default model."}}
_NAMED = {"model": {"type": "string", "description": "A served name; without it every loaded model."}}
_CARDS = (LoadedCard, UnloadedCard, AdapterCard)
_CHANGED = (400, 409)
_MANAGED = (*BODY_ERRORS, *MODEL_ERRORS)

OPERATIONS: Mapping[Key, Operation] = {
    ("POST", "/v1/chat/completions"): Operation(
        id="create_chat_completion",
        tag="generation",
        summary="Continue a conversation",
        body=(ChatCompletionRequest,),
        example={"messages": _MESSAGES, "max_tokens": 64},
        answers={200: (ChatCompletion,)},
        events=(ChatCompletionChunk, ErrorEnvelope),
        errors=(*BODY_ERRORS, *QUEUE_ERRORS),
    ),
    ("POST", "/v1/completions"): Operation(
        id="create_completion",
        tag="generation",
        summary="Continue a text",
        body=(CompletionRequest,),
        example={"prompt": "Once upon a time", "max_tokens": 32},
        answers={200: (Completion,)},
        events=(Completion, ErrorEnvelope),
        errors=(*BODY_ERRORS, *QUEUE_ERRORS),
    ),
    ("POST", "/v1/messages"): Operation(
        id="create_message",
        tag="generation",
        summary="Continue a conversation, in Anthropic's words",
        body=(MessagesRequest,),
        example={"model": "default", "messages": _MESSAGES, "max_tokens": 64},
        answers={200: (Message,)},
        events=(*get_args(MessageEvent), ErrorBody),
        errors=(*BODY_ERRORS, *QUEUE_ERRORS, 529),
        error=ErrorBody,
        naming=_ANTHROPIC,
    ),
    ("POST", "/v1/messages/count_tokens"): Operation(
        id="count_message_tokens",
        tag="tokens",
        summary="How many tokens a message's prompt has",
        body=(CountTokensRequest,),
        example={"model": "default", "messages": _MESSAGES},
        answers={200: (TokenCount,)},
        errors=(*BODY_ERRORS, *MODEL_ERRORS, 504, 529),
        error=ErrorBody,
        naming=_ANTHROPIC,
    ),
    ("POST", "/v1/responses"): Operation(
        id="create_response",
        tag="responses",
        summary="Answer with tools and memory: whole, streamed, in the background, or over a WebSocket",
        body=(ResponsesRequest,),
        example={"input": "What is the capital of France?", "max_output_tokens": 64},
        answers={200: (Response,)},
        events=get_args(ResponseEvent),
        errors=(*BODY_ERRORS, *QUEUE_ERRORS, 409),
        naming=RESPONSES,
    ),
    ("POST", "/v1/responses/compact"): Operation(
        id="compact_response",
        tag="responses",
        summary="Make a conversation shorter",
        body=(CompactRequest,),
        example={"model": "default", "input": [{"role": "user", "content": "We launch on Tuesday."}]},
        answers={200: (CompactedResponse,)},
        errors=(*BODY_ERRORS, *QUEUE_ERRORS),
        naming=RESPONSES,
    ),
    ("POST", "/v1/responses/input_tokens"): Operation(
        id="count_response_tokens",
        tag="tokens",
        summary="How many tokens a response's prompt has",
        body=(InputTokensRequest,),
        example={"input": "What is the capital of France?"},
        answers={200: (InputTokens,)},
        errors=(*BODY_ERRORS, *MODEL_ERRORS, 504),
        naming=RESPONSES,
    ),
    ("POST", "/v1/chat/completions/input_tokens"): Operation(
        id="count_chat_tokens",
        tag="tokens",
        summary="How many tokens a chat request's prompt has, images included",
        body=(ChatCompletionRequest,),
        example={"messages": _MESSAGES},
        answers={200: (InputTokens,)},
        errors=(*BODY_ERRORS, *MODEL_ERRORS, 504),
    ),
    ("POST", "/v1/embeddings"): Operation(
        id="create_embedding",
        tag="vectors and scores",
        summary="The vectors of texts",
        body=(EmbeddingRequest,),
        example={"input": "The sky is blue."},
        answers={200: (EmbeddingList,)},
        errors=(*BODY_ERRORS, *QUEUE_ERRORS),
    ),
    **_aliases(
        ("/v1/score", "/score"),
        Operation(
            id="create_score",
            tag="vectors and scores",
            summary="How well the texts of pairs belong together",
            body=(ScoreRequest,),
            example={"text_1": "The sky is blue.", "text_2": ["What colour is the sky?", "Who are you?"]},
            answers={200: (ScoreList,)},
            errors=(*BODY_ERRORS, *QUEUE_ERRORS),
        ),
    ),
    **_aliases(
        ("/v1/rerank", "/rerank", "/v2/rerank"),
        Operation(
            id="create_ranking",
            tag="vectors and scores",
            summary="Documents in order of how well they fit a query",
            body=(RerankRequest,),
            example={"query": "What colour is the sky?", "documents": ["I am a cat.", "The sky is blue."]},
            answers={200: (Ranking,)},
            errors=(*BODY_ERRORS, *QUEUE_ERRORS),
        ),
    ),
    ("POST", "/tokenize"): Operation(
        id="tokenize",
        tag="tokens",
        summary="The tokens of a text or of a conversation",
        body=(TokenizeTextRequest, TokenizeChatRequest),
        example={"prompt": "Once upon a time", "return_token_strs": True},
        answers={200: (Tokenized,)},
        errors=(*BODY_ERRORS, *MODEL_ERRORS, 504),
    ),
    ("POST", "/detokenize"): Operation(
        id="detokenize",
        tag="tokens",
        summary="The text of tokens",
        body=(DetokenizeRequest,),
        example={"tokens": [1, 2, 3]},
        answers={200: (Detokenized,)},
        errors=(*BODY_ERRORS, *MODEL_ERRORS, 504),
    ),
    ("GET", "/v1/models"): Operation(
        id="list_models",
        tag="models",
        summary="All served names, the default first",
        answers={200: _CARDS},
        listed=True,
    ),
    ("GET", "/v1/models/{model_id:path}"): Operation(
        id="get_model",
        tag="models",
        summary="One served name",
        answers={200: _CARDS},
        errors=(404,),
        path_parameters={"model_id": "A served name. It may hold slashes, percent-encoded or not."},
    ),
    ("GET", "/v1/models/status"): Operation(
        id="models_status",
        tag="operators",
        summary="What is loaded, what waits, and what went wrong",
        answers={200: (ManagerStatus,)},
        manages=True,
    ),
    ("GET", "/v1/models/inventory"): Operation(
        id="models_inventory",
        tag="operators",
        summary="What models take and whether they fit, known names, and what is being fetched",
        answers={200: (Inventory,)},
        errors=(403,),
        manages=True,
    ),
    ("GET", "/v1/queues"): Operation(
        id="queues",
        tag="operators",
        summary="The requests that wait, for every model",
        answers={200: (Queues,)},
        manages=True,
    ),
    ("GET", "/v1/queues/{model_id:path}"): Operation(
        id="queue_of_model",
        tag="operators",
        summary="The requests that wait for one model",
        answers={200: (Queues,)},
        errors=(404,),
        path_parameters={"model_id": "A served name. It may hold slashes, percent-encoded or not."},
        manages=True,
    ),
    ("POST", "/v1/load_lora_adapter"): Operation(
        id="load_lora_adapter",
        tag="operators",
        summary="Load an adapter and serve it by a name; answers when it is in memory",
        body=(LoadAdapterRequest,),
        example={"lora_name": "tone", "lora_path": "/srv/adapters/tone"},
        answers={200: ()},
        media="text/plain",
        errors=(*_MANAGED, 409),
        manages=True,
    ),
    ("POST", "/v1/unload_lora_adapter"): Operation(
        id="unload_lora_adapter",
        tag="operators",
        summary="Serve an adapter no more; answers that go on end with it",
        body=(UnloadAdapterRequest,),
        example={"lora_name": "tone"},
        answers={200: ()},
        media="text/plain",
        errors=(*_MANAGED, 409),
        manages=True,
    ),
    ("GET", "/lora-adapters"): Operation(
        id="list_lora_adapters",
        tag="server",
        summary="The adapters that the operator named, with their numbers and scales, in llama.cpp's words",
        query=_WHICH,
        answers={200: (NumberedAdapter,)},
        bare=True,
        errors=(403, *MODEL_ERRORS),
    ),
    ("POST", "/lora-adapters"): Operation(
        id="scale_lora_adapters",
        tag="operators",
        summary="How much of each adapter is added where a request says nothing, in llama.cpp's words",
        query=_WHICH,
        body=(LoraScale,),
        bare_body=True,
        example=[{"id": 0, "scale": 0.5}],
        answers={200: (Succeeded,)},
        errors=_MANAGED,
        manages=True,
    ),
    ("POST", "/v1/models/load"): Operation(
        id="load_model",
        tag="operators",
        summary="Load a model; answers when it is ready",
        body=(ModelRequest,),
        example={"model": "default"},
        answers={200: (SlotStatus,)},
        errors=_MANAGED,
        manages=True,
    ),
    ("POST", "/v1/models/unload"): Operation(
        id="unload_model",
        tag="operators",
        summary="Unload a model once it has finished its requests; answers when it is gone",
        body=(ModelRequest,),
        example={"model": "default"},
        answers={200: (SlotStatus,)},
        errors=(*_MANAGED, 409),
        manages=True,
    ),
    ("POST", "/v1/models/reload"): Operation(
        id="reload_models",
        tag="operators",
        summary="Read models.yaml again, where the operator allows that",
        answers={200: (Changes,)},
        errors=_CHANGED,
        manages=True,
    ),
    ("POST", "/v1/models/add"): Operation(
        id="add_model",
        tag="operators",
        summary="Serve one model more, where the operator allows that",
        body=(NewModelRequest,),
        example={"name": "small", "hf_id": "HuggingFaceTB/SmolLM2-135M-Instruct", "params": {"mem": 512}},
        answers={200: (SlotStatus,)},
        errors=(*BODY_ERRORS, *_CHANGED),
        manages=True,
    ),
    ("POST", "/v1/models/remove"): Operation(
        id="remove_model",
        tag="operators",
        summary="Serve a model no more, where the operator allows that",
        body=(ModelRequest,),
        example={"model": "small"},
        answers={200: (Changes,)},
        errors=(*BODY_ERRORS, 404, *_CHANGED),
        manages=True,
    ),
    ("POST", "/v1/models/select"): Operation(
        id="select_model",
        tag="operators",
        summary="Make a model the default and begin to load it",
        body=(ModelRequest,),
        example={"model": "default"},
        answers={200: (Selected,), 202: (Selected,)},
        errors=_MANAGED,
        manages=True,
    ),
    ("GET", "/v1/mailbox"): Operation(
        id="list_records",
        tag="mailbox",
        summary="Your kept answers, newest first, without what they say",
        answers={200: (RecordList,)},
        errors=_MAILBOX,
        query={
            "limit": {"type": "integer", "minimum": 1, "maximum": MAX_LIST, "default": DEFAULT_LIST},
            "after": {"type": "string", "maxLength": MAX_ID, "description": "The last request_id of the page before."},
        },
    ),
    ("GET", "/v1/mailbox/{request_id}"): Operation(
        id="get_record",
        tag="mailbox",
        summary="One kept answer",
        answers={200: (Record,)},
        errors=_MAILBOX,
        path_parameters=_RECORD,
        query={"auto_delete": {"enum": ["true", "false"], "default": "false", "description": "Delete it as well."}},
    ),
    ("DELETE", "/v1/mailbox/{request_id}"): Operation(
        id="delete_record",
        tag="mailbox",
        summary="Delete a kept answer",
        answers={204: ()},
        errors=_MAILBOX,
        path_parameters=_RECORD,
    ),
    ("POST", "/v1/mailbox/{request_id}/webhook"): Operation(
        id="push_record",
        tag="mailbox",
        summary="Push a kept answer to a webhook, once",
        body=(PushRequest,),
        example={},
        answers={200: (Delivered,)},
        errors=(*_MAILBOX, *BODY_ERRORS, 502),
        path_parameters=_RECORD,
    ),
    **KEPT_OPERATIONS,
    **OLLAMA_OPERATIONS,
    ("GET", "/v1/mcp/servers"): Operation(
        id="list_mcp_servers",
        tag="mcp",
        summary="The MCP servers, and how they are",
        answers={200: (McpServerInfo,)},
        errors=(404,),
        listed=True,
    ),
    ("GET", "/v1/mcp/tools"): Operation(
        id="list_mcp_tools",
        tag="mcp",
        summary="The tools of all MCP servers",
        answers={200: (McpToolInfo,)},
        errors=(404,),
        listed=True,
    ),
    ("POST", "/v1/mcp/call"): Operation(
        id="call_mcp_tool",
        tag="mcp",
        summary="Call a tool once; needs an API key and somebody's approval",
        body=(McpCallRequest,),
        example={"name": "time__get_current_time", "arguments": {"timezone": "UTC"}, "approved": True},
        answers={200: (McpCallResult,)},
        errors=(*BODY_ERRORS, 404, 429, 504),
    ),
    ("GET", "/metrics"): Operation(
        id="metrics",
        tag="operators",
        summary="Every count, as Prometheus reads it",
        media="text/plain",
        answers={200: ()},
        manages=True,
    ),
    ("GET", "/v1/usage"): Operation(
        id="usage",
        tag="operators",
        summary="Requests that have ended and their tokens, by model and API key, since the start",
        answers={200: (UsageRow,)},
        listed=True,
        manages=True,
    ),
    ("GET", "/health"): Operation(
        id="health",
        tag="server",
        summary="200 while the process can do its work",
        answers={200: (Standing,), 503: (Standing,)},
        public=True,
    ),
    ("GET", "/ping"): Operation(
        id="ping",
        tag="server",
        summary="The same as /health",
        answers={200: (Standing,), 503: (Standing,)},
        public=True,
    ),
    ("GET", "/load"): Operation(
        id="load", tag="server", summary="How many sequences run or wait", answers={200: (Load,)}
    ),
    ("GET", "/server_info"): Operation(
        id="server_info",
        tag="operators",
        summary="What the server was started with, without secrets",
        answers={200: (ServerInfo,)},
        manages=True,
    ),
    ("POST", "/reset_prefix_cache"): Operation(
        id="reset_prefix_cache",
        tag="operators",
        summary="Have loaded models forget what prompts began with",
        answers={204: ()},
        manages=True,
    ),
    ("POST", "/sleep"): Operation(
        id="sleep",
        tag="operators",
        summary="Have loaded models give their memory back; requests to them are refused with 503 from then on",
        answers={200: ()},
        media="",
        errors=(400, 404, 409, 503),
        query={
            "level": {
                "type": "integer",
                "enum": [1, 2],
                "default": 1,
                "description": "1 gives back the KV cache and a GPU's memory of the weights, 2 the weights as well.",
            },
            "mode": {
                "type": "string",
                "enum": ["abort", "wait"],
                "default": "abort",
                "description": "Whether requests that run or wait end now, or are waited for.",
            },
            **_NAMED,
        },
        manages=True,
    ),
    ("POST", "/wake_up"): Operation(
        id="wake_up",
        tag="operators",
        summary="Have models that sleep fill their memory again",
        answers={200: ()},
        media="",
        errors=(400, 404, 409, 503),
        query={
            "tags": {
                "type": "array",
                "items": {"type": "string", "enum": ["weights", "kv_cache"]},
                "description": "What is filled; without it everything. Requests are taken once both are.",
            },
            **_NAMED,
        },
        manages=True,
    ),
    ("GET", "/is_sleeping"): Operation(
        id="is_sleeping",
        tag="operators",
        summary="Whether a loaded model sleeps",
        answers={200: (Sleeping,)},
        errors=(404,),
        query=_NAMED,
        manages=True,
    ),
    ("GET", "/tokenizer_info"): Operation(
        id="tokenizer_info",
        tag="tokens",
        summary="What is known of the model's tokenizer",
        answers={200: (TokenizerInfo,)},
        errors=(*MODEL_ERRORS, 504),
        query=_WHICH,
    ),
    ("GET", "/props"): Operation(
        id="props",
        tag="server",
        summary="The model and its defaults, as llama.cpp's clients ask for them",
        answers={200: (Properties,)},
        errors=(*MODEL_ERRORS, 504),
        query=_WHICH,
    ),
    ("GET", "/slots"): Operation(
        id="slots",
        tag="server",
        summary="The sequences that may run at the same time, as llama.cpp's clients ask for them",
        answers={200: (Slot,)},
        errors=(*MODEL_ERRORS, 504),
        query=_WHICH,
        bare=True,
    ),
    ("POST", "/apply-template"): Operation(
        id="apply_template",
        tag="tokens",
        summary="The text that a chat request with the same fields would begin with",
        body=(ChatCompletionRequest,),
        example={"messages": _MESSAGES},
        answers={200: (RenderedPrompt,)},
        errors=(*BODY_ERRORS, *MODEL_ERRORS, 504),
    ),
    ("POST", "/completion"): Operation(
        id="llama_completion",
        tag="generation",
        summary="Continue a text, perhaps one with images, in llama.cpp's words",
        body=(LlamaCompletionRequest,),
        example={"prompt": "Once upon a time", "n_predict": 32},
        answers={200: (LlamaText,)},
        one_or_more=True,
        events=(LlamaText, ErrorEnvelope),
        errors=(*BODY_ERRORS, *QUEUE_ERRORS),
    ),
    ("POST", "/completions"): Operation(
        id="llama_completions",
        tag="generation",
        summary="The same as `/completion`",
        body=(LlamaCompletionRequest,),
        example={"prompt": "Once upon a time", "n_predict": 32},
        answers={200: (LlamaText,)},
        one_or_more=True,
        events=(LlamaText, ErrorEnvelope),
        errors=(*BODY_ERRORS, *QUEUE_ERRORS),
    ),
    ("POST", "/v1/fim/completions"): Operation(
        id="create_fim_completion",
        tag="generation",
        summary="Fill a gap in a text, in Mistral's words",
        body=(FimRequest,),
        example={"prompt": "def add(a, b):\n    ", "suffix": "", "max_tokens": 32},
        answers={200: (ChatCompletion,)},
        events=(ChatCompletionChunk, ErrorEnvelope),
        errors=(*BODY_ERRORS, *QUEUE_ERRORS),
    ),
    ("POST", "/infill"): Operation(
        id="llama_infill",
        tag="generation",
        summary="Fill a gap in a text, in llama.cpp's words",
        body=(InfillRequest,),
        example={"input_prefix": "def add(a, b):\n    ", "input_suffix": "", "n_predict": 32},
        answers={200: (LlamaText,)},
        events=(LlamaText, ErrorEnvelope),
        errors=(*BODY_ERRORS, *QUEUE_ERRORS),
    ),
    ("POST", "/classify"): Operation(
        id="classify",
        tag="vectors and scores",
        summary="What texts are, as a classifier tells them apart, in vLLM's words",
        body=(ClassifyRequest,),
        example={"input": "The sky is blue."},
        answers={200: (ClassifiedList,)},
        errors=(*BODY_ERRORS, *QUEUE_ERRORS),
    ),
    ("POST", "/pooling"): Operation(
        id="pool",
        tag="vectors and scores",
        summary="The vectors of texts, in vLLM's words",
        body=(PoolingRequest,),
        example={"input": "The sky is blue."},
        answers={200: (PooledList,)},
        errors=(*BODY_ERRORS, *QUEUE_ERRORS),
    ),
    ("GET", "/ready"): Operation(
        id="ready",
        tag="server",
        summary="200 while a request for the default model would be answered at once",
        answers={200: (Readiness,), 503: (Readiness,)},
        public=True,
    ),
    ("GET", "/version"): Operation(
        id="version", tag="server", summary="The server's version", answers={200: (Version,)}
    ),
    ("GET", "/"): Operation(
        id="root", tag="server", summary="What this is and where to go on", answers={200: (Welcome,)}
    ),
}

# The document itself, and the pages that show it.
FOR_PEOPLE = frozenset({"/openapi.json", "/docs", "/docs/{name}"})
