"""What the parts of the configuration are built from: the base class and the types of numbers."""

import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo


def _not_a_bool(value: Any) -> Any:
    """Refuse `steps: true`, which Python would accept as 1."""
    if isinstance(value, bool):
        raise ValueError(f"is {str(value).lower()}, must be a number")
    return value


def _bounded(value: int) -> int:
    """Refuse integers far above any size, whose products a float would not hold."""
    if value > 2**53:
        raise ValueError("is an integer above 2**53")
    return value


def _path(value: str) -> str:
    """Refuse text that no file system takes: control characters, half a character, or too much of it."""
    if re.search("[\0-\x1f\x7f\ud800-\udfff]", value) or max(len(os.fsencode(part)) for part in value.split("/")) > 200:
        raise ValueError(f"is {value[:80]!r}; a path has no control characters, and names of at most 200 bytes")
    return value


Number = BeforeValidator(_not_a_bool)
PathText = Annotated[str, Field(max_length=2000), AfterValidator(_path)]
Positive = Annotated[int, Field(ge=1), Number, AfterValidator(_bounded)]
NonNegative = Annotated[int, Field(ge=0), Number, AfterValidator(_bounded)]
PositiveFloat = Annotated[float, Field(gt=0), Number]
NonNegativeFloat = Annotated[float, Field(ge=0), Number]
Share = Annotated[float, Field(ge=0, le=1), Number]


class ConfigPart(BaseModel):
    """Base of every part of the configuration: frozen, unknown keys refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), validate_default=True, allow_inf_nan=False
    )


def report_problems(problems: list[str], found: ValidationInfo) -> None:
    """Append the problems to the list that the caller passed as validation context, or raise them without one."""
    if problems and isinstance(found.context, list):
        found.context.extend(problems)
    elif problems:
        raise ValueError("; ".join(problems))
