"""Decode steps on tensors without storage: which kernels they launch, and how these compile without a GPU."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from stagdist.config.parts import ModelConfig
from stagdist.decode.layers.weights import Device, Shard, WeightFormat, WeightLoader
from stagdist.decode.runtime.graphs import FixedStep
from stagdist.decode.runtime.setup import StageSetup
from stagdist.decode.runtime.stage import Stage
from stagdist.decode.sampling.sampling_plan import Mode
from stagdist.decode.topology import Limits, topology_for
from stagdist.model.precision import DTYPES
from stagdist.parallel.layout import ParameterSpec

CONTEXT = 1024
LAUNCHES_NOTHING = {"aten.empty.memory_format", "aten.empty_like.default", "aten.new_empty.default"}
POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8", torch.int8: "*i8", torch.bool: "*i1",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel.

    Attributes:
        values: of all parameters by name; types of tensors.
        options: of the compiler, such as the number of warps.
    """

    kernel: Any
    grid: tuple[int, ...]
    values: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """Name of the kernel."""
        return str(self.kernel.fn.__name__)

    def resources(self, capability: int) -> dict[str, int]:
        """Compile as a launch would, for a compute capability (80, 90), and return what a thread and a block need.

        Returns: registers, bytes of the stack and of local memory (where spilled registers go), bytes of shared memory.
        """
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}
        for index, (name, value) in enumerate(self.values):
            if isinstance(value, torch.dtype):
                signature[name] = POINTERS[value]
                attributes[index,] = [["tt.divisibility", 16]]
            elif isinstance(value, int) and not isinstance(value, bool) and value != 1 and name.islower():
                signature[name] = "i32" if value < 1 << 31 else "i64"
                if value % 16 == 0:
                    attributes[index,] = [["tt.divisibility", 16]]
            else:
                signature[name], constants[name] = "constexpr", value
        source = ASTSource(self.kernel, signature=signature, constexprs=constants, attrs=attributes)
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options=dict(self.options))
        return _resources(compiled.asm["cubin"])


def _resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(tool), "--dump-resource-usage", file.name]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", printed)}


@dataclass
class Recording:
    """What ran, one after the other: names of torch's operators and kernels of Triton.

    Attributes:
        launches: those of Triton alone.
    """

    names: list[str] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)


class _Operators(TorchDispatchMode):
    """Notes every operator that is neither a view nor an allocation; each is one kernel."""

    def __init__(self, names: list[str]):
        super().__init__()
        self._names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if not is_view and str(func) not in LAUNCHES_NOTHING:
            self._names.append(str(func))
        return result


@contextmanager
def recording() -> Iterator[Recording]:
    """Note the kernels of the block, which runs on the `meta` device; kernels of Triton do not run.

    A GPU has one kernel each for RMSNorm and attention, which `meta` decomposes; a mask of bools costs two more, to
    become a bias.
    """
    recorded = Recording()

    def launch(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        names = [parameter.name for parameter in kernel.params]
        options = tuple((name, kwargs.pop(name)) for name in list(kwargs) if name not in names)
        values = {**dict(zip(names, args, strict=False)), **kwargs}
        plain = ((name, value.dtype if isinstance(value, Tensor) else value) for name, value in values.items())
        recorded.launches.append(Launch(kernel, tuple(grid), tuple(plain), options))
        recorded.names.append(recorded.launches[-1].name)

    def norm(hidden: Tensor, *args: Any) -> Tensor:
        recorded.names.append("rms_norm")
        return torch.empty_like(hidden)

    def attention(query: Tensor, *args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        recorded.names.extend(["attention"] if attn_mask is None else ["fill", "where", "attention"])
        return torch.empty_like(query)

    with pytest.MonkeyPatch.context() as patch, _Operators(recorded.names), torch.inference_mode():
        patch.setattr(JITFunction, "run", launch)
        patch.setattr(F, "rms_norm", norm)
        patch.setattr(F, "scaled_dot_product_attention", attention)
        yield recorded


class EmptyModel:
    """A model on the `meta` device and its step of fixed shape."""

    def __init__(
        self,
        model: ModelConfig,
        slots: int,
        *,
        kernels: bool,
        precision: str = "bf16",
        weights: WeightFormat | None = None,
    ):
        device, topology = Device("meta", DTYPES[precision]), topology_for(model, 1)

        def read(spec: ParameterSpec, dim: int, start: int, stop: int) -> Tensor:
            shape = list(spec.shape)
            shape[dim] = stop - start
            return torch.empty(shape, device="meta")

        held = WeightLoader(model, read, Shard(), device, weights).stage(topology, 0)
        limits = Limits(slots, min(CONTEXT, model.max_position_embeddings), 128)
        stage = Stage(StageSetup(model, topology, limits, device, held, fixed=True, kernels=kernels))
        self._step = FixedStep(stage.executor)

    def step(self, rows: int, mode: Mode = Mode.OTHER) -> Recording:
        """Run a step."""
        positions = torch.zeros(rows, dtype=torch.int64, device="meta")
        with recording() as recorded:
            self._step(positions, mode)
        return recorded
