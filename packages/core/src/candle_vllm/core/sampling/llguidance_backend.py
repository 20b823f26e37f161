# SPDX-License-Identifier: MIT
"""Grammar backend with llguidance, over the tokenizer's token bytes (step 7 of a request's life).

The vocabulary's trie is built once, for the first grammar. Compiled grammars are cached, and copied for each text.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from candle_vllm.core.errors import EngineDeadError, InvalidParameterError
from candle_vllm.core.sampling.structured import StructuredOutputsParams, plain_json, refused
from candle_vllm.core.sampling.token_trie import TokenTrie, Vocabulary

if TYPE_CHECKING:
    from candle_vllm.core.sampling.llguidance_compiler import Compiled, Compiler
    from candle_vllm.core.sampling.llguidance_grammar import LlguidanceGrammar

MAX_CACHED = 64  # maximum number of compiled grammars in the cache
MAX_CACHED_CHARACTERS = 4 << 20  # maximum characters of these, unless there is only one; each takes about 30 bytes

_AT_WORK: set[object] = set()
_CHANGED = threading.Condition()  # guards `_AT_WORK`
_OVER = threading.Event()
_LONGEST = 60.0  # maximum seconds that shutdown waits; a forked process has entries of threads that do not exist


class LlguidanceBackend:
    """Compiler of grammars for one vocabulary. Thread-safe.

    Its construction is cheap, because the first grammar builds the trie.

    Args:
        tokenizer: the vocabulary. Ids without bytes are never allowed, except end tokens.
        vocab_size: V, the width of the logits.
        eos_token_ids: every token that ends a text; ids outside the vocabulary are ignored.
        open_objects: whether JSON objects may have keys that their schemas do not mention.
    """

    def __init__(
        self, tokenizer: Vocabulary, vocab_size: int, eos_token_ids: Sequence[int], *, open_objects: bool = False
    ) -> None:
        self._open_objects = open_objects
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = tuple(token for token in eos_token_ids if 0 <= token < vocab_size)
        self._lock = threading.Lock()  # guards the cache and the running compilations
        self._building = threading.Lock()
        self._compiler: Compiler | None = None
        self._workers: ThreadPoolExecutor | None = None
        self._compiled: OrderedDict[bytes, Compiled] = OrderedDict()
        self._under_way: dict[bytes, Future[Compiled]] = {}
        self._closed = False

    @property
    def workers(self) -> Executor:
        """Threads in which masks are computed. Raises EngineDeadError if the backend was closed."""
        with self._lock:
            if self._closed:
                raise EngineDeadError("the engine was closed; create a new one")
            if self._workers is None:
                self._workers = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "candle-vllm-grammar")
            return self._workers

    def compile(self, spec: StructuredOutputsParams) -> LlguidanceGrammar:
        """Compile a grammar, at the start of a text.

        Raises:
            InvalidParameterError: `spec` is invalid, or has a constraint that cannot be guaranteed.
            EngineDeadError: the program is ending.
        """
        with _awaited_at_the_end():
            return self._compile(spec)

    def _compile(self, spec: StructuredOutputsParams) -> LlguidanceGrammar:
        compiler = self._built()
        key = hashlib.blake2b(_described(spec)).digest()
        with self._lock:
            known = self._compiled.get(key)
            if known is not None and not known.is_spent:
                self._compiled.move_to_end(key)
                return compiler.grammar(known)
            mine: Future[Compiled] = Future()
            other = self._under_way.setdefault(key, mine)
        if other is not mine:
            return compiler.grammar(_awaited(other))
        try:
            compiled = compiler.compile(spec)
            self._keep(key, compiled)
            mine.set_result(compiled)
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._under_way[key]
            del mine, other  # their error refers to this frame
        return compiler.grammar(compiled)

    def close(self) -> None:
        """End the threads, and release compiled grammars."""
        with self._lock:
            workers, self._workers, self._closed = self._workers, None, True
            self._compiled.clear()
        if workers is not None:
            workers.shutdown()

    def _built(self) -> Compiler:
        with self._building:
            if self._compiler is None:
                from candle_vllm.core.sampling.llguidance_compiler import Compiler

                compiler = Compiler(TokenTrie(self._tokenizer, self._vocab_size, self._eos_ids), self._open_objects)
                compiler.compile(StructuredOutputsParams(json_object=True))  # does a first mask's one-time work
                self._compiler = compiler
            return self._compiler

    def _keep(self, key: bytes, compiled: Compiled) -> None:
        with self._lock:
            self._compiled[key] = compiled
            while len(self._compiled) > 1 and not self._fits():
                self._compiled.popitem(last=False)

    def _fits(self) -> bool:
        size = sum(compiled.size for compiled in self._compiled.values())
        return len(self._compiled) <= MAX_CACHED and size <= MAX_CACHED_CHARACTERS


@contextmanager
def _awaited_at_the_end() -> Iterator[None]:
    """Make the interpreter's shutdown wait for llguidance's work in this thread.

    During shutdown the interpreter unwinds threads that request the GIL, which llguidance's build does not allow: a
    daemon thread within llguidance would end the process by signal 11.
    """
    work = object()
    with _CHANGED:
        if _OVER.is_set():
            raise EngineDeadError("the program is ending, and grammars can no longer be compiled")
        _AT_WORK.add(work)
    try:
        yield
    finally:
        with _CHANGED:
            _AT_WORK.remove(work)
            _CHANGED.notify_all()


@atexit.register
def _await_work() -> None:
    with _CHANGED:
        _OVER.set()
        _CHANGED.wait_for(lambda: not _AT_WORK, _LONGEST)


def _awaited(other: Future[Compiled]) -> Compiled:
    """Wait for the thread that compiles the same form. Copy an `InvalidParameterError`, because threads add frames."""
    try:
        return other.result()
    except InvalidParameterError as error:
        raise InvalidParameterError(str(error), error.param) from None


def _described(spec: StructuredOutputsParams) -> bytes:
    """Return a form as bytes, for its cache key; the order of a schema's keys matters: it is the order in the text."""
    try:
        return msgspec.json.encode(msgspec.structs.asdict(spec), enc_hook=plain_json)
    except (TypeError, ValueError, RecursionError) as error:
        raise refused(f"the {spec.kind} is not JSON, or nested too deeply: {error}") from None
