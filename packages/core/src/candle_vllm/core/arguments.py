# SPDX-License-Identifier: MIT
"""What is said to an argument that there is not: the nearest name, and to the names of other libraries ours.

A row of the tables is the names and the answer: a name of ours that does the same, perhaps with what else there is to
say, or a sentence that says why there is none. Behind them may stand the values that say what is so anyway: who gives
one of these is let by. What exists here under that very name is not in the tables; a test sees to that.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import msgspec

from candle_vllm.core.setting_kinds import nearest
from candle_vllm.core.shown import ShownStruct

# Why some things are not here, in words without arguments or flags: other tables of foreign names say it as well.
NO_CODE = "code of a model's repository is never run: its architecture is built in, or refused"
PREPARED = "pictures are read as they are, and prepared as the model's files say"

_WHOLE = "cpu_experts, cpu_offload_gb and gpu_layers say what of a model is not on its GPU"
_ONE_DEVICE = (
    "a model is divided among GPUs (tensor_parallel_size, pipeline_parallel_size, nnodes) or copied to those of one "
    "machine (data_parallel_size), and in no other way"
)
_STORED = "the checkpoint says how it is quantised; isq quantises plain weights while they are loaded"
_FORM = "structured_outputs, as in structured_outputs=StructuredOutputsParams("

P = ParamSpec("P")
R = TypeVar("R")
Rows = tuple[tuple[str, str] | tuple[str, str, tuple[object, ...]], ...]

_SETTINGS: Rows = (
    ("model_path model_name model_id model_name_or_path pretrained_model_name_or_path repo_id", "model"),
    ("filename gguf_file", "weight_file"),
    ("token use_auth_token", "hf_token"),
    ("cache_dir", "download_dir"),
    ("local_files_only", "offline"),
    ("tokenizer_path tokenizer_name", "tokenizer, which is a folder"),
    ("tokenizer_mode tokenizer_revision hf_config_path config_format", "the model's files say it",
     (None, "auto")),
    ("hf_overrides override_generation_config", "the model's files say it", (None, {})),
    ("generation_config", "the model's files say it", ("auto",)),
    ("skip_tokenizer_init", "texts are always read and written", (False,)),
    ("trust_remote_code", NO_CODE,
     (False,)),
    ("chat_format", "chat_template, which is Jinja source; without it the model's own counts"),
    ("n_ctx num_ctx ctx_size context_length context_size max_seq_len max_seq_length max_sequence_length",
     "max_model_len"),
    ("max_batch_size batch_size n_seq_max n_parallel max_running_requests", "max_num_seqs"),
    ("n_batch n_ubatch prefill_chunk_size chunked_prefill_size", "max_num_batched_tokens"),
    ("n_threads n_threads_batch num_threads", "threads"),
    ("gpu_memory_fraction mem_fraction_static", "gpu_memory_utilization"),
    ("kv_cache_memory_bytes num_gpu_blocks_override", "kv_cache_memory, in bytes"),
    ("type_k", "key_cache_dtype"),
    ("type_v", "value_cache_dtype"),
    ("flash_attn attn_implementation use_flash_attention_2", "attention_backend, on a GPU"),
    ("torch_dtype", "dtype"),
    ("device_map main_gpu", "device"),
    ("random_seed", "seed"),
    ("rope_scaling rope_freq_base rope_freq_scale rope_scaling_type yarn_ext_factor",
     "yarn_scaling_factor, for a longer context; else the model's files say it"),
    ("n_gpu_layers", "gpu_layers"),
    ("offload_kqv max_memory", _WHOLE),
    ("swap_space offload_group_size", _WHOLE, (0, 0.0)),
    ("decode_context_parallel_size prefill_context_parallel_size", _ONE_DEVICE, (1,)),
    ("enable_eplb enable_dbo", _ONE_DEVICE, (False,)),
    ("disable_custom_all_reduce", _ONE_DEVICE, (False, True)),
    ("tp_size", "tensor_parallel_size"),
    ("dp_size", "data_parallel_size"),
    ("pp_size", "pipeline_parallel_size"),
    ("tensor_split split_mode", _ONE_DEVICE),
    ("quantization quantization_config", _STORED, (None,)),
    ("load_in_4bit load_in_8bit", _STORED, (False,)),
    ("lora_path lora_base lora_scale", "enable_lora; a request says which adapter (lora_request)"),
    ("speculative_model num_speculative_tokens draft_model spec_method spec_model spec_tokens",
     "speculative_config, which has method, model and num_speculative_tokens", (None,)),
    ("limit_mm_per_prompt", "max_images, how many pictures a prompt may have", (None, {})),
    ("clip_model_path", "mmproj, the GGUF file of what the model sees by", (None,)),
    ("use_mmap use_mlock low_cpu_mem_usage", "weights are mapped while they are loaded"),
    ("enable_chunked_prefill", "it is always so", (True, None)),
    ("task runner", "an engine does whatever the model can",
     (None, "auto", "generate", "pooling", "embed", "score", "classify")),
    ("convert", "an engine does whatever the model can", (None, "auto", "none", "embed", "classify")),
    ("embedding", "an engine does whatever the model can"),
    ("disable_log_stats", "what is logged goes to Python's logging, by the name candle_vllm", (True, False)),
    ("verbose", "what is logged goes to Python's logging, by the name candle_vllm"),
    ("compilation_config optimization_level", "nothing of a model is compiled by torch", (None, 0, {})),
    ("attention_config kernel_config profiler_config kv_transfer_config pooler_config worker_cls",
     "it has no counterpart here", (None, {}, "auto")),
    ("structured_outputs_config guided_decoding_backend", "forms of texts are held by llguidance",
     (None, {}, {"backend": "auto"}, {"backend": "guidance"}, "auto", "guidance")),
    ("logits_processors", "requests have them, as functions: SamplingParams(logits_processors=[...])", (None, [])),
    ("served_model_name", "names are a server's: candle-vllm serve --served-model-name", (None,)),
    ("max_num_queued_reqs", "max_queued_requests", (None,)),
    ("max_num_scheduled_tokens", "max_num_batched_tokens", (None,)),
    ("cudagraph_capture_sizes", "max_cudagraph_capture_size", (None,)),
    ("device_ids numa_bind numa_bind_nodes numa_bind_cpus data_parallel_rank "
     "data_parallel_size_local data_parallel_address data_parallel_backend eplb_config ubatch_size",
     _ONE_DEVICE, (None, 0, False, "mp")),
    ("moe_backend linear_backend mamba_backend", "kernels are chosen for the machine", (None, "auto")),
    ("model_weights model_loader_extra_config ignore_patterns safetensors_load_strategy pt_load_map_location "
     "max_parallel_loading_workers", "weights are mapped while they are loaded", (None, "", {}, [], "cpu", "lazy")),
    ("use_tqdm_on_load", "a bar is shown on a terminal", (True,)),
    ("fully_sharded_loras default_mm_loras max_lora_cls_labels", "adapters lie whole beside the model",
     (None, False)),
    ("lora_target_modules", "an adapter's own files say what it changes", (None,)),
    ("language_model_only", "max_images=0 leaves out what a model sees by", (False,)),
    ("enable_mm_embeds interleave_mm_strings media_io_kwargs mm_processor_cache_gb mm_encoder_only skip_mm_profiling "
     "io_processor_plugin video_pruning_rate", PREPARED, (None, False, {}, 0)),
    ("reasoning_parser tool_call_parser reasoning_config",
     "texts are read by candle_vllm.openai's OpenAIAdapter, by the model's own format", (None, "")),
    ("kv_offloading_backend offload_params cpu_offload_params kv_events_config ec_transfer_config",
     "the cache lies where the engine computes", (None,)),
    ("enable_log_requests log_level logging_config log_config_file otlp_traces_endpoint",
     "what is logged goes to Python's logging, by the name candle_vllm; traces are a server's", (None, False)),
    ("disable_log_requests", "an engine logs no requests", (True,)),
    ("mamba_cache_dtype mamba_ssm_cache_dtype mamba_block_size scheduler_cls worker_extension_cls additional_config "
     "disable_sliding_window disable_cascade_attn long_prefill_token_threshold max_num_active_seqs",
     "it has no counterpart here", (None, False, "auto", {}, 0)),
    ("scheduling_policy", "lower priorities run first, equal ones in order of arrival", ("fcfs", "priority")),
    ("max_logprobs", "a request may ask for the 20 likeliest tokens", (20,)),
    ("logprobs_mode", "log-probabilities are the model's own, before penalties and temperature", ("raw_logprobs",)),
    ("async_scheduling enable_sleep_mode enable_prompt_embeds enable_return_routed_experts return_sampling_mask",
     "there is no such thing here", (None, False)),
    ("n temperature top_p top_k min_p presence_penalty frequency_penalty repetition_penalty max_tokens min_tokens stop "
     "stop_token_ids ignore_eos skip_special_tokens logprobs prompt_logprobs logit_bias allowed_token_ids bad_words "
     "structured_outputs max_new_tokens", "requests have it: generate(prompts, SamplingParams(...))"),
)  # fmt: skip

_PARAMETERS: Rows = (
    ("max_new_tokens max_length max_completion_tokens max_output_tokens max_gen_len n_predict num_predict",
     "max_tokens"),
    ("min_new_tokens min_length", "min_tokens"),
    ("do_sample", "temperature: 0 takes the likeliest token, anything above it samples"),
    ("temp", "temperature"),
    ("repeat_penalty", "repetition_penalty"),
    ("num_return_sequences num_samples num_completions", "n"),
    ("stop_sequences stop_words stop_strings", "stop"),
    ("eos_token_id stop_tokens", "stop_token_ids"),
    ("random_seed manual_seed", "seed"),
    ("bad_words_ids", "bad_words, which are texts"),
    ("top_logprobs output_scores output_logits", "logprobs, a number of alternatives"),
    ("guided_decoding response_format", f"{_FORM}json=...)"),
    ("guided_json json_schema", f"{_FORM}json=...)"),
    ("guided_regex", f"{_FORM}regex=...)"),
    ("guided_choice", f"{_FORM}choice=[...])"),
    ("guided_grammar grammar", f"{_FORM}grammar=...)"),
    ("num_beams use_beam_search beam_width length_penalty early_stopping", "LLM.beam_search does it"),
    ("best_of", "n of them are made and given, as in vLLM today"),
    ("mirostat_mode", "mirostat"),
    ("typical", "typical_p"),
    ("logits_processor", "logits_processors"),
    ("extra_args", "nothing reads them", (None,)),
    ("tfs_z epsilon_cutoff eta_cutoff top_a penalty_alpha no_repeat_ngram_size samplers",
     "the samplers are temperature, top_k, top_p, min_p, top_n_sigma, typical_p, XTC, mirostat, penalties and DRY"),
    ("use_cache detokenize", "it is always so", (True,)),
    ("spaces_between_special_tokens", "tokenizers of tokenizer.json and GGUF files put none between", (True, False)),
    ("skip_clone", "an engine takes a copy of what was given", (False, True)),
    ("flat_logprobs", "log-probabilities come in one form", (False,)),
    ("logprob_token_ids prompt_logprob_token_ids prompt_logprob_start",
     "logprobs and prompt_logprobs give the likeliest tokens, at every place", (None,)),
    ("stream_interval", "a piece comes with every step that has something to say", (None, 1)),
    ("reasoning_budget reasoning_budget_tokens thinking_budget thinking_budget_tokens", "thinking_token_budget"),
    ("repetition_detection", "repetition_penalty is there, and max_tokens", (None,)),
    ("watermarking", "texts are not marked", (None, False)),
    ("routed_experts_prompt_start", "which experts were taken is not told", (0,)),
    ("trace_decode_token_ids", "tokens are drawn, never dictated", (None,)),
    ("truncate_prompt_tokens", "a prompt is run whole or refused: cut its token ids", (None,)),
    ("model max_model_len n_ctx max_num_seqs threads device dtype",
     "it is a setting of the engine: InferenceEngine(...)"),
)  # fmt: skip

_POOLING: Rows = (
    ("use_activation softmax activation", "normalize, of a vector"),
    ("pooling_type seq_pooling_type", "pooling"),
    ("task", "the method says it: embed, classify or score, and encode's pooling_task", (None,)),
    ("step_tag_id returned_token_ids requires_token_ids late_interaction_params late_chunking_params extra_kwargs",
     "a text gives one vector, or the numbers of its classes", (None,)),
    ("truncate_prompt_tokens", "a text is run whole or refused: cut its token ids", (None,)),
)  # fmt: skip

_FORMS: Rows = (
    ("disable_additional_properties", 'additionalProperties: false in the schema itself does it', (False,)),
    ("backend disable_fallback", "forms of texts are held by llguidance", (None, "auto", "guidance")),
)  # fmt: skip

_BEAMS: Rows = (
    ("temperature", "beams are ranked by the model's own log-probabilities, and none are drawn", (0, 0.0)),
    ("structured_outputs allowed_token_ids", "beams are continued by whatever tokens are likeliest", (None,)),
    ("include_stop_str_in_output", "tokens end with the end token; skip_special_tokens=False writes it", (False,)),
    ("watermarking", "texts are not marked", (None, False)),
    ("num_beams n", "beam_width"),
    ("max_new_tokens", "max_tokens"),
    ("early_stopping", "a search goes on until no beam is left, or to max_tokens", (False,)),
)  # fmt: skip

_ARGUMENTS: Rows = (
    ("prompt inputs texts prompt_token_ids", "prompts, each a text or token ids"),
    ("params generation_config", "sampling_params"),
    ("conversation conversations", "messages"),
    ("stream streamer", "there are generate_stream and chat_stream, and stream in an event loop"),
    ("mm_processor_kwargs", PREPARED),
    ("progress show_progress", "use_tqdm"),
    ("functions", "tools"),
    ("tool_choice parallel_tool_calls tool_parser",
     "chat shows tools and gives the text; calls are held to a choice and read by candle_vllm.openai's OpenAIAdapter"),
    ("chat_template_content_format", "parts of a content are always joined to one text"),
    ("tokenize return_tensors return_dict",
     "a conversation's token ids are engine.tokenize(engine.apply_chat_template(messages), add_special_tokens=False)"),
    ("priority request_id watcher",
     "agenerate, achat, stream, achat_stream, generate_stream and chat_stream have priority and request_id"),
)  # fmt: skip

_IMPORTED: Rows = (
    ("LLMEngine Llama Engine LlamaCpp AutoModelForCausalLM pipeline", "InferenceEngine"),
    ("AsyncLLMEngine", "AsyncLLM"),
    ("GuidedDecodingParams", "StructuredOutputsParams"),
    ("ModelConfig", "EngineConfig"),
    ("GenerationConfig GenerationParams", "SamplingParams"),
)  # fmt: skip

_TABLES: Mapping[str, Rows] = MappingProxyType(
    {
        "EngineConfig": _SETTINGS,
        "SamplingParams": _PARAMETERS,
        "PoolingParams": _POOLING,
        "BeamSearchParams": _BEAMS,
        "StructuredOutputsParams": _FORMS,
    }
)


@functools.cache
def foreign_names(owner: str) -> Mapping[str, str]:
    """The answer to each name that a class of the tables or (for any other owner) a method lacks.

    It begins with a name of ours where that does the same.
    """
    return dict(_told(_TABLES.get(owner, _ARGUMENTS if owner.islower() else ())))


def says_what_is_so(owner: str, name: str, value: object) -> bool:
    """Whether a name that `owner` lacks was given with a value by which nothing would change."""
    agreeing = _agreeing(owner).get(name, ())
    return any(type(value) is type(each) and value == each for each in agreeing)


@functools.cache
def _agreeing(owner: str) -> Mapping[str, tuple[object, ...]]:
    rows = _TABLES.get(owner, ())
    return {name: row[2] for row in rows if len(row) == 3 for name in row[0].split()}


def unknown_name(owner: str, name: str, known: Iterable[str], within: Mapping[str, Iterable[str]] | None = None) -> str:
    """What is said to somebody who gave `owner` an argument that it does not have.

    Args:
        owner: a class or a method.
        name: what was given.
        known: what `owner` takes.
        within: the fields of what `owner` takes, by the class; perhaps it is one of them.
    """
    known = list(known)
    head = f"{owner} has no argument {name[:60]!r}"
    for other, fields in (within or {}).items():
        if name in fields:
            return f"{head}: it is a field of {other}"
    answer = foreign_names(owner).get(name)
    if answer is not None:
        called = "it is called " if answer.partition(",")[0].partition(":")[0] in known else ""
        return f"{head}: {called}{answer}"
    for other, fields in (within or {}).items():
        if name in foreign_names(other):
            return f"{head}: {unknown_name(other, name, fields)}"
    return f"{head}{nearest(name[:60], known)}"


def missing_name(module: str, name: str, known: Iterable[str]) -> Exception:
    """What a package's `__getattr__` raises for a name that it does not have.

    Python forgets what an `AttributeError` says when it turns it into the failure of `from module import name`. Where
    a hint can be given, that statement, which looks for the name by a function of importlib first, gets its own.

    Args:
        module: the package.
        name: what was looked for.
        known: the names that it has.
    """
    known = list(known)
    ours = dict(_told(_IMPORTED)).get(name)
    hint = f": the name here is {ours}" if ours in known else nearest(name[:60], known)
    if sys._getframe(2).f_code.co_name != "_handle_fromlist" or not hint:
        return AttributeError(f"module {module!r} has no attribute {name[:60]!r}{hint}", name=name)
    if importlib.util.find_spec(f"{module}.{name}") is not None:
        return AttributeError(name)  # a module, which is imported next
    return ImportError(f"cannot import name {name[:60]!r} from {module!r}{hint}", name=module)


class _Explaining(type):
    """Makes objects of a class, and explains an argument that the class does not have."""

    if not TYPE_CHECKING:  # the class's own signature is what is checked

        def __call__(cls, *arguments: Any, **named: Any) -> Any:
            try:
                return super().__call__(*arguments, **named)
            except TypeError:
                wanted = {
                    name: value for name, value in named.items() if not says_what_is_so(cls.__name__, name, value)
                }
                if len(wanted) < len(named):
                    return cls(*arguments, **wanted)
                fields = getattr(cls, "__struct_fields__", None)
                known = fields or inspect.signature(cls.__init__).parameters
                for name in named:
                    if name not in known:
                        raise TypeError(unknown_name(cls.__name__, name, known)) from None
                if fields and arguments:
                    names = ", ".join(fields[:4])
                    raise TypeError(f"{cls.__name__} takes its arguments by name ({names}, ...)") from None
                raise


class ExplainedSettings(metaclass=_Explaining):
    """A base of dataclasses that explains arguments which they do not have."""


class _ExplainingStruct(_Explaining, msgspec.StructMeta):
    pass


class ExplainedStruct(ShownStruct, metaclass=_ExplainingStruct, frozen=True):
    """A base of structs that explains arguments which they do not have."""


def explained(**within: Iterable[str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a method explain arguments which it does not have.

    Args:
        within: the fields of what it takes, by the class.
    """

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        known = [name for name in inspect.signature(method).parameters if name != "self"]

        @functools.wraps(method)
        def call(*arguments: P.args, **named: P.kwargs) -> R:
            for name in named:
                if name not in known:
                    raise TypeError(unknown_name(method.__name__, name, known, within))
            try:
                return method(*arguments, **named)
            except TypeError as error:
                if not _is_call_error(method, arguments, named):
                    raise
                said = f"{method.__name__} takes {', '.join(known)}: {error}".replace(
                    method.__qualname__, method.__name__
                )
                raise TypeError(said) from None

        return call

    return decorate


def _is_call_error(method: Callable[..., Any], arguments: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
    """Whether a method cannot be called with these, whatever it does with them."""
    try:
        inspect.signature(method).bind(*arguments, **named)
    except TypeError:
        return True
    return False


def refuse_lost(
    owner: str,
    given: Iterable[str],
    known: Iterable[str],
    variables: Iterable[str],
    within: Mapping[str, Iterable[str]],
) -> None:
    """Refuses variables that a template does not read: they would be lost.

    Args:
        owner: the method that takes them.
        given: their names.
        known: arguments of the method.
        variables: what the template reads.
        within: as for `unknown_name`.

    Raises:
        TypeError: one is lost.
    """
    taken = {*known, *variables}
    for name in given:
        if name not in taken:
            said = unknown_name(owner, name, taken, within)
            if not said.startswith(f"{owner} has no argument {name[:60]!r}:"):
                said += ", and the model's template does not read it; chat_template_kwargs may have what others read"
            raise TypeError(said)


def _told(rows: Rows) -> Iterator[tuple[str, str]]:
    for row in rows:
        for name in row[0].split():
            yield name, row[1]
