"""CTranslate2: the baseline in its own format, with requests of a batch as rows."""

import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, cat

from benchmarks.decoding.contestants import Load
from benchmarks.decoding.rivals.baseline_llama import Baseline
from benchmarks.decoding.rivals.rival import Decoded, Prompts, Rival
from stagdist.config.parts import ModelConfig

COMPUTE_TYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8_float32"}


class Ctranslate2(Rival):
    """CTranslate2. int8 has one scale for each row of a matrix and computes in integers; caches are fp32 then."""

    title, packages, kinds = "ctranslate2", ("ctranslate2",), ("cpu",)
    weight_bytes = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0}
    cache_bytes = {"fp32": 4.0, "bf16": 2.0, "int8": 4.0}
    timed_by = "callback of each token"

    def __init__(self, baseline: Baseline, precision: str, load: Load, threads: int):
        import ctranslate2

        folder, kind = baseline.folder / f"ctranslate2-{precision}", COMPUTE_TYPES[precision]
        if not folder.exists():
            write_ctranslate2(folder, baseline.model, baseline.on_cpu(), kind)
        self._generator: Any = ctranslate2.Generator(
            str(folder), device="cpu", compute_type=kind, intra_threads=threads, inter_threads=1
        )

    @staticmethod
    def obstacle(precision: str) -> str | None:
        """It has bf16 on processors that compute in it."""
        import ctranslate2

        has_it = COMPUTE_TYPES[precision] in ctranslate2.get_supported_compute_types("cpu")
        return None if has_it else f"CTranslate2 has no {precision} on this processor"

    def decode(self, prompts: Prompts, new_tokens: int) -> Decoded:
        """A step counts when the tokens of all requests are there."""
        times: dict[int, float] = defaultdict(float)

        def took(result: Any) -> bool:
            times[result.step] = time.perf_counter()
            return False

        found = self._generator.generate_batch(
            [[f"w{token}" for token in prompt] for prompt in prompts], max_length=new_tokens, end_token=[],
            include_prompt_in_result=False, cache_static_prompt=False, sampling_topk=1, callback=took,
        )  # fmt: skip
        return Decoded(tuple(times.values()), tuple(tuple(row.sequences_ids[0]) for row in found))

    def close(self) -> None:
        """End its threads."""
        self._generator = None


def write_ctranslate2(folder: Path, model: ModelConfig, weights: Mapping[str, Tensor], kind: str) -> None:
    """Write the sequential model.

    Args:
        folder: a new one.
        weights: fp32, by their names in transformers.
        kind: a compute type of CTranslate2.
    """
    from ctranslate2.specs import TransformerDecoderModelSpec, common_spec

    few = model.key_value_heads != model.num_attention_heads
    spec = TransformerDecoderModelSpec.from_config(
        model.num_layers, model.num_attention_heads, activation=common_spec.Activation.SWISH, ffn_glu=True,
        rms_norm=True, rotary_dim=0, rotary_interleave=False, rotary_base=model.rope_theta, head_dim=model.head_width,
        num_heads_kv=model.key_value_heads if few else None,
    )  # fmt: skip

    def values(*names: str) -> Any:
        return cat([weights[f"{name}.weight"] for name in names]).numpy()

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = values("model.embed_tokens")
    decoder.layer_norm.gamma = values("model.norm")
    decoder.projection.weight = values("model.embed_tokens" if model.tie_word_embeddings else "lm_head")
    for index, layer in enumerate(decoder.layer):
        attention, mlp, prefix = layer.self_attention, layer.ffn, f"model.layers.{index}."
        attention.layer_norm.gamma = values(f"{prefix}input_layernorm")
        attention.linear[0].weight = values(*(f"{prefix}self_attn.{part}_proj" for part in "qkv"))
        attention.linear[1].weight = values(f"{prefix}self_attn.o_proj")
        mlp.layer_norm.gamma = values(f"{prefix}post_attention_layernorm")
        mlp.linear_0.weight = values(f"{prefix}mlp.gate_proj")
        mlp.linear_0_noact.weight = values(f"{prefix}mlp.up_proj")
        mlp.linear_1.weight = values(f"{prefix}mlp.down_proj")
    spec.register_vocabulary([f"w{token}" for token in range(model.vocab_size)])
    spec.config.layer_norm_epsilon = model.rms_norm_eps
    spec.config.unk_token = spec.config.bos_token = spec.config.eos_token = "w0"
    spec.validate()
    spec.optimize(quantization=None if kind == "float32" else kind)
    folder.mkdir()
    spec.save(str(folder))
