"""Conversations over a candle-vllm engine."""

from candle_vllm.responses.session import ConversationOptions, ConversationResult, ResponsesSession

__all__ = ["ConversationOptions", "ConversationResult", "ResponsesSession"]
