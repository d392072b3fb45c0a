"""llama.cpp, through its server in a thread of this process; requests of a batch take parallel slots."""

import time
from typing import Any

from benchmarks.decoding.contestants import Load
from benchmarks.decoding.rivals.baseline_llama import Baseline
from benchmarks.decoding.rivals.gguf_file import WORD, write_gguf
from benchmarks.decoding.rivals.rival import Decoded, Prompts, Rival
from stagdist.errors import StagdistError

SPARE_POSITIONS = 8


class LlamaCpp(Rival):
    """llama.cpp. In fp32 caches and attention are fp32 too; else caches are fp16 and attention is its own choice."""

    title, packages, kinds = "llama.cpp", ("xllamacpp", "gguf"), ("cpu",)
    weight_bytes = {"fp32": 4.0, "bf16": 2.0, "int8": 34 / 32}
    cache_bytes = {"fp32": 4.0, "bf16": 2.0, "int8": 2.0}
    timed_by = "callback of each token"

    def __init__(self, baseline: Baseline, precision: str, load: Load, threads: int):
        import xllamacpp

        path = baseline.folder / f"{precision}.gguf"
        if not path.exists():
            write_gguf(path, baseline.model, baseline.on_cpu(), precision)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_parallel, params.n_ctx = load.batch, load.batch * (load.length + SPARE_POSITIONS)
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        kind = xllamacpp.ggml_type
        params.cache_type_k = params.cache_type_v = kind.GGML_TYPE_F32 if precision == "fp32" else kind.GGML_TYPE_F16
        if precision == "fp32":  # its flash attention rounds: tokens then differ at 2,048 positions
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.n_gpu_layers, params.verbosity = 0, -1
        params.fit_params = params.warmup = params.cache_prompt = params.cache_idle_slots = False
        params.cache_ram_mib = params.n_ctx_checkpoints = 0  # every run computes its prompt again
        self._server: Any = xllamacpp.Server(params)

    def decode(self, prompts: Prompts, new_tokens: int) -> Decoded:
        """The steps counted lie between the first token of the last request and the last token of the first."""
        times: list[list[float]] = [[] for _ in prompts]
        words: list[list[str]] = [[] for _ in prompts]
        errors: list[Any] = []

        def took(chunk: dict[str, Any] | None) -> bool:
            for choice in (chunk or {}).get("choices", ()):
                if choice["text"]:
                    times[choice["index"]].append(time.perf_counter())
                    words[choice["index"]].append(choice["text"])
            errors.extend([chunk] if chunk and "choices" not in chunk else ())
            return False

        request = {"prompt": [list(prompt) for prompt in prompts], "n_predict": new_tokens, "stream": True}
        request |= {"temperature": 0.0, "samplers": ["top_k"], "top_k": 1, "cache_prompt": False}
        self._server.handle_completions(request, took)
        if errors or {len(row) for row in words} != {new_tokens}:
            raise StagdistError(f"llama.cpp gave {list(map(len, words))} of {new_tokens} tokens; errors: {errors}")
        begin, end = max(row[0] for row in times), min(row[-1] for row in times)
        rows = (tuple(int(word.removeprefix(WORD)) for word in row) for row in words)
        return Decoded(tuple(each for each in times[0] if begin <= each <= end), tuple(rows))

    def close(self) -> None:
        """End the server's thread."""
        self._server = None
