"""vLLM with what the start of an engine imports: for processes that are forked (`vllm_cli`)."""

from prefpipe.engines import vllm_process

vllm_process.prepare()

import vllm.entrypoints.llm  # noqa: E402
import vllm.model_executor.models.llama  # noqa: E402
import vllm.v1.engine.core  # noqa: E402
import vllm.v1.structured_output.backend_xgrammar  # noqa: E402
import vllm.v1.worker.cpu_worker  # noqa: E402, F401
