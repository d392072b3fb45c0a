"""The floating-point types of weights, under each name that they have in options and files."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
"""By the short name that configurations and options use. fp64 exists for comparisons and is never stored."""

STORED_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""By the name in `config.json` of a model directory."""

SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""By the name in the header of a safetensors file."""
