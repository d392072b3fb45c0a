"""The parts of megatron-core that stagdist uses outside `data`, imported without its optional dependencies."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of optional GPU packages
    from megatron.core import ModelParallelConfig
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        copy_to_tensor_model_parallel_region,
        set_tensor_model_parallel_attributes,
    )

__all__ = [
    "ColumnParallelLinear",
    "ModelParallelConfig",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "copy_to_tensor_model_parallel_region",
    "set_tensor_model_parallel_attributes",
]
