"""By autograd: what a position may depend on, and that it depends on all of it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from stagdist.model.megatron import TensorParallel
from stagdist.model.section import Section
from stagdist.model.stagformer import StagFormer
from tests.model.double_precision import loaded, tokens
from tests.reference.variants import BASE, VARIANTS

LENGTH = 10
STAGGERS = (0, 1, 2)
WINDOWS = (None, 1, 3, LENGTH)
LAYERS = (1, 3)


def model_keys(**keys: Any) -> dict[str, Any]:
    """The small model with some keys changed."""
    return BASE | keys


def second_section(alone: TensorParallel, **keys: Any) -> Section:
    """The first section with a memory."""
    section = loaded(model_keys(**keys), alone).sections[1]
    assert isinstance(section, Section)
    return section


def random_states(seed: int) -> Tensor:
    """Hidden states that ask for their gradient, [1, S, H]."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(1, LENGTH, BASE["hidden_size"], generator=generator, dtype=torch.float64)
    return states.requires_grad_()


def seen(output: Tensor, position: int, source: Tensor) -> set[int]:
    """Positions of `source` that the output at a position depends on. Shapes: both [1, S, ...]."""
    direction = torch.randn(output[0, position].shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    (gradient,) = torch.autograd.grad(output[0, position] @ direction, source, retain_graph=True)
    return set(torch.nonzero(gradient[0].abs().amax(-1)).flatten().tolist())


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("stagger", STAGGERS)
def test_one_layer_sees_exactly_the_window_that_ends_stagger_before_it(
    stagger: int, window: int | None, alone: TensorParallel
) -> None:
    section = second_section(alone, stagger=stagger, cross_attention_window=window)
    embedded, previous = random_states(1), random_states(2)
    output = section(embedded, previous)
    for position in range(LENGTH):
        first = 0 if window is None else max(position - window + 1 - stagger, 0)
        assert seen(output, position, previous) == set(range(first, position - stagger + 1)), position
        assert seen(output, position, embedded) == set(range(position + 1))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("stagger", (1, 2))
def test_the_null_vector_fills_the_gap_and_counts_as_slots(
    stagger: int, window: int | None, alone: TensorParallel
) -> None:
    section = second_section(alone, stagger=stagger, cross_attention_window=window)
    output = section(random_states(1), random_states(2))
    assert section.null_memory is not None
    for position in range(LENGTH):
        (gradient,) = torch.autograd.grad(output[0, position].sum(), section.null_memory, retain_graph=True)
        inside = window is None or position - window + 1 < stagger
        assert bool(gradient.any()) == inside, position


@pytest.mark.parametrize("window", (None, 3))
@pytest.mark.parametrize("stagger", STAGGERS)
@pytest.mark.parametrize("layers", LAYERS)
def test_no_depth_of_a_section_sees_later_memory(
    layers: int, stagger: int, window: int | None, alone: TensorParallel
) -> None:
    """Deeper layers reach memory before the window through their self-attention, never memory after it."""
    section = second_section(alone, section_layers=[1, layers], stagger=stagger, cross_attention_window=window)
    previous = random_states(2)
    output = section(random_states(1), previous)
    for position in range(LENGTH):
        visible = seen(output, position, previous)
        assert all(source <= position - stagger for source in visible)
        if window is None or layers > 1:
            assert visible == set(range(position - stagger + 1))


def section_outputs(stagformer: StagFormer, input_ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Output of every section, in the graph, and the logits."""
    outputs: list[Tensor] = []
    hooks = [
        section.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        for section in stagformer.sections
    ]
    logits = stagformer(input_ids)
    for hook in hooks:
        hook.remove()
    return outputs, logits


@pytest.mark.parametrize("stagger", STAGGERS)
def test_every_section_of_a_full_model_lags_behind_the_one_before(stagger: int, alone: TensorParallel) -> None:
    stagformer = loaded(model_keys(section_layers=[2, 1, 2], stagger=stagger), alone)
    outputs, _ = section_outputs(stagformer, tokens(BASE, LENGTH)[0][:1])
    for later in (1, 2):
        for earlier in range(later):
            for position in range(LENGTH):
                lag = stagger * (later - earlier)
                assert seen(outputs[later], position, outputs[earlier]) == set(range(position - lag + 1))


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_depend_on_every_token_so_far_and_on_no_later_one(name: str, alone: TensorParallel) -> None:
    model = BASE | VARIANTS[name]
    stagformer = loaded(model, alone)
    input_ids = tokens(model, LENGTH)[0][:1]
    with torch.no_grad():
        logits = stagformer(input_ids)
        for changed in range(LENGTH):
            other = input_ids.clone()
            other[0, changed] = (other[0, changed] + 1) % model["vocab_size"]
            differs = (stagformer(other) != logits)[0].any(-1).tolist()
            assert differs == [position >= changed for position in range(LENGTH)], changed


@pytest.mark.parametrize(
    ("broken", "replacement"),
    [
        ("shift_memory", lambda memory, null_memory, stagger: memory),
        ("window_mask", lambda length, window, device: None),
    ],
)
def test_these_checks_notice_what_they_are_for(
    broken: str, replacement: Any, alone: TensorParallel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"stagdist.model.section.{broken}", replacement)
    with pytest.raises(AssertionError):
        test_one_layer_sees_exactly_the_window_that_ends_stagger_before_it(1, 3, alone)
