"""Layers on several devices, and weights on disk, change no logit and no generated token."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stagdist.hf.modeling_stagformer import StagFormerForCausalLM
from tests.hf.models import DEEP, STAGGERED, build, generated, tokens
from tests.hf.placement import FIRST, SECOND, Devices, offload, spread

USUAL = {"one section", "stagger 0", "window", "tied", "three sections with everything", "four combined sections"}
"""Variants that `make test` runs here beside the deep ones: others change sizes of tensors, not where they are used."""


def every(variants: list[str]) -> pytest.MarkDecorator:
    """Run a test with each variant, with most of them in `make test-all` alone."""
    usual = USUAL | DEEP.keys()
    marked = [pytest.param(name, marks=[pytest.mark.slow] * (name not in usual)) for name in variants]
    return pytest.mark.parametrize("variant", marked)


def batch() -> dict[str, Tensor]:
    """Two rows, the second one padded on the left."""
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, :3] = 0
    return {"input_ids": tokens(2, 7), "attention_mask": mask}


def results(model: Any, device: torch.device | str = "cpu", generate: bool = True) -> list[Tensor]:
    """Logits with and without cache and padding; texts of greedy and beam search, or logits of one more token."""
    padded = {name: tensor.to(device) for name, tensor in batch().items()}
    with torch.no_grad():
        found = [model(**padded).logits, model(padded["input_ids"], use_cache=False).logits]
        if not generate:
            cache = model(padded["input_ids"]).past_key_values
            return [*found, model(padded["input_ids"][:, :1], past_key_values=cache).logits]
    for options in ({}, {"use_cache": False}, {"num_beams": 2}):
        found.append(generated(model, padded["input_ids"], padded["attention_mask"], **options))
    return found


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Bit by bit."""
    assert [one.equal(other) for one, other in zip(found, expected, strict=True)] == [True] * len(expected)


@every(STAGGERED)
def test_weights_that_are_there_only_while_their_module_runs_suffice(variant: str) -> None:
    model, _ = build(variant)
    expected = results(model)
    offload(model)
    assert model.head.weight.is_meta and next(model.sections.parameters()).is_meta
    assert_same(results(model), expected)


def by_section(model: Any) -> dict[str, torch.device]:
    """Complete sections, in turns."""
    return {f"sections.{index}": (SECOND, FIRST)[index % 2] for index in range(len(model.sections))}


def by_layer(model: Any) -> dict[str, torch.device]:
    """Layers in turns, and the parameters of a section apart from each other."""
    places: dict[str, torch.device] = {}
    for index, section in enumerate(model.sections):
        places |= {f"sections.{index}.null_memory": FIRST, f"sections.{index}.memory_norm": SECOND}
        for number in range(len(section.layers)):
            places[f"sections.{index}.layers.{number}"] = (FIRST, SECOND)[(index + number) % 2]
    return places


@pytest.mark.parametrize(("divide", "begin", "end"), [(by_section, FIRST, SECOND), (by_layer, SECOND, FIRST)])
@every(STAGGERED + list(DEEP))
def test_no_operation_meets_tensors_of_two_devices(
    variant: str, divide: Any, begin: torch.device, end: torch.device
) -> None:
    model, _ = build(variant)
    expected = results(model, generate=variant in DEEP)
    last = begin if model.config.tie_word_embeddings else end
    spread(model, divide(model) | {"embedding": begin, "output_norm": end, "head": last, "section_mix": begin})
    with Devices():
        found = results(model, FIRST, generate=variant in DEEP)
    assert_same(found, expected)


def test_the_stand_in_for_two_devices_notices_a_tensor_of_the_other() -> None:
    model, _ = build("tied")
    spread(model, {"embedding": FIRST, "sections.0": FIRST, "sections.1": SECOND, "output_norm": FIRST, "head": FIRST})
    model.sections[1].layers[0].cross_attention_norm.weight.device_name = FIRST
    with Devices(), pytest.raises(AssertionError, match="rms_norm has tensors on"):
        model(tokens(1, 3).to(FIRST))


@pytest.mark.parametrize("place", ["auto", "layers", "disk"])
@every(STAGGERED + list(DEEP))
def test_a_device_map_with_weights_on_disk_changes_nothing(tmp_path: Path, variant: str, place: str) -> None:
    pytest.importorskip("accelerate", reason="needs the extra `eval`")
    model, _ = build(variant)
    model.save_pretrained(tmp_path / "model")
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    layers = {name: ("cpu", "disk")["1" in name] for name, _ in by_layer(model).items() if "null" not in name}
    rest = dict.fromkeys(("embedding", "output_norm", "head", "section_mix"), "cpu")
    null = {f"sections.{index}.null_memory": "cpu" for index in range(len(model.sections))}
    device_map: Any = {"auto": "auto", "disk": {"": "disk"}, "layers": layers | rest | null}[place]
    loaded = StagFormerForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, max_memory={"cpu": size // 2}, offload_folder=tmp_path / "offloaded"
    )
    assert any(parameter.is_meta for parameter in loaded.parameters())
    assert_same(results(loaded), results(model))
