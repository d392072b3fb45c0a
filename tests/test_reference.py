"""The reference model, compared with transformers and with the formulas."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference.small_models import BASE, LLAMA3, VARIANTS, perturbed, tokens
from tests.reference.stagformer import (
    Parameters,
    forward,
    initial_deviation,
    logits_of,
    loss,
    memory,
    parameter_shapes,
    random_parameters,
    rms_norm,
    run_section,
    section_outputs,
    shape_of,
)
from tests.reference.training import loss_and_gradients

every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


# --- against transformers ---------------------------------------------------------------------------------------


def llama(config: dict[str, Any], parameters: Parameters, dtype: torch.dtype) -> torch.nn.Module:
    """transformers' Llama with the same weights; its norms are exchanged because its own drop fp64 to fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    kept = {key: value for key, value in config.items() if key not in ("section_layers", "connection", "rope_scaling")}
    kept.pop("rope_theta")
    kept["rope_parameters"] = {"rope_theta": config["rope_theta"], **scaling}
    layers = sum(config["section_layers"])
    model: Any = LlamaForCausalLM(LlamaConfig(**kept, num_hidden_layers=layers))
    model.set_attn_implementation("sdpa")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(module, name, torch.nn.RMSNorm(config["hidden_size"], eps=config["rms_norm_eps"]))
    model.to(dtype)
    missing, unexpected = model.load_state_dict(
        {llama_name(name, config): value for name, value in parameters.items()}, strict=False
    )
    assert not unexpected and missing == (["lm_head.weight"] if config["tie_word_embeddings"] else [])
    return model


def llama_name(name: str, config: dict[str, Any]) -> str:
    plain = {
        "embedding.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    if name in plain:
        return plain[name]
    _, section, _, layer, rest = name.split(".", 4)
    index = sum(config["section_layers"][: int(section)]) + int(layer)
    for ours, theirs in (
        ("self_attention_norm", "input_layernorm"),
        ("self_attention", "self_attn"),
        ("mlp_norm", "post_attention_layernorm"),
    ):
        rest = rest.replace(ours, theirs)
    return f"model.layers.{index}.{rest}"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("scaling", [None, LLAMA3], ids=["plain rotary", "llama3 rotary"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_sequential_equals_transformers_llama_in_logits_and_gradients(
    tied: bool, scaling: dict[str, Any] | None, dtype: torch.dtype, tolerance: float
) -> None:
    config = BASE | {"connection": "sequential", "tie_word_embeddings": tied, "rope_scaling": scaling}
    parameters = perturbed(config, dtype)
    model = llama(config, parameters, dtype)
    input_ids, labels = tokens(3, 30), tokens(3, 30, seed=2)

    expected = model(input_ids).logits
    torch.testing.assert_close(forward(parameters, config, input_ids), expected, rtol=tolerance, atol=tolerance)

    loss(expected, labels).backward()
    _, gradients = loss_and_gradients(parameters, config, input_ids, labels)
    theirs = {name: value.grad for name, value in model.named_parameters()}
    for name, gradient in gradients.items():
        other = theirs[llama_name(name, config)]
        assert other is not None
        torch.testing.assert_close(gradient, other, rtol=10 * tolerance, atol=tolerance, msg=name)


# --- against the formulas, position by position -----------------------------------------------------------------


def turn(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotary embedding of one head vector as a multiplication of complex numbers."""
    half = x.shape[-1] // 2
    angles = torch.tensor([position * theta ** (-i / half) for i in range(half)], dtype=torch.float64)
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half, dtype=torch.float64), angles)
    return torch.cat([turned.real, turned.imag])


def attend(
    parameters: Parameters, prefix: str, query: Tensor, slots: dict[int, Tensor], at: int, kv_heads: int
) -> Tensor:
    """Attention of one position over the slots it sees, head by head. Shapes: query and every slot [H]."""
    heads, width = BASE["num_attention_heads"], BASE["head_dim"]
    weight = {name: parameters[f"{prefix}.{name}_proj.weight"] for name in "qkvo"}
    mixed = []
    for head in range(heads):
        group = head * kv_heads // heads
        rows, columns = slice(head * width, (head + 1) * width), slice(group * width, (group + 1) * width)
        turned = turn(weight["q"][rows] @ query, at, BASE["rope_theta"])
        scores = {
            slot: turned @ turn(weight["k"][columns] @ value, slot, BASE["rope_theta"]) / math.sqrt(width)
            for slot, value in slots.items()
        }
        total = sum(score.exp() for score in scores.values())
        mixed.append(sum(scores[slot].exp() / total * (weight["v"][columns] @ slots[slot]) for slot in slots))
    return weight["o"] @ torch.cat(mixed)  # type: ignore[arg-type]


@pytest.mark.parametrize("cross_heads", [2, 1])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("stagger", [0, 1, 2])
def test_a_section_equals_the_formula_written_out_for_one_position(
    stagger: int, window: int | None, cross_heads: int
) -> None:
    config = BASE | {
        "section_layers": [1, 1],
        "stagger": stagger,
        "cross_attention_window": window,
        "cross_attention_key_value_heads": cross_heads,
    }
    parameters, shape, eps = perturbed(config), shape_of(config), BASE["rms_norm_eps"]
    x, previous = torch.randn(2, 1, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = run_section(parameters, shape, 1, x, previous)

    layer = "sections.1.layers.0"
    slots = [parameters["sections.1.null_memory"]] * stagger if stagger else []
    slots += [rms_norm(h, parameters["sections.1.memory_norm.weight"], eps) for h in previous[0]]
    own = [rms_norm(row, parameters[f"{layer}.self_attention_norm.weight"], eps) for row in x[0]]
    for i in range(7):
        h = x[0, i] + attend(parameters, f"{layer}.self_attention", own[i], dict(enumerate(own[: i + 1])), i, 2)
        seen = {j: slots[j] for j in range(i + 1) if window is None or j >= i - window + 1}
        query = rms_norm(h, parameters[f"{layer}.cross_attention_norm.weight"], eps)
        h = h + attend(parameters, f"{layer}.cross_attention", query, seen, i, cross_heads)
        inner = rms_norm(h, parameters[f"{layer}.mlp_norm.weight"], eps)
        gate, up, down = (parameters[f"{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        h = h + down @ (torch.nn.functional.silu(gate @ inner) * (up @ inner))
        torch.testing.assert_close(found[0, i], h, rtol=1e-5, atol=1e-5)  # turn() is fp64, the model's angles fp32


# --- causality --------------------------------------------------------------------------------------------------


def dependence(config: dict[str, Any], length: int) -> Tensor:
    """Whether the last section's logits at i change with the section before at j, by autograd. Shape: [i, j]."""
    parameters, last = perturbed(config), len(config["section_layers"]) - 1
    outputs = section_outputs(parameters, config, tokens(1, length))
    previous = outputs[last - 1].detach().requires_grad_()
    embeddings = parameters["embedding.weight"][tokens(1, length)]
    outputs[last] = run_section(parameters, shape_of(config), last, embeddings, previous)
    logits = logits_of(parameters, config, outputs)
    rows = []
    for i in range(length):
        (gradient,) = torch.autograd.grad(logits[0, i].square().sum(), previous, retain_graph=True)
        rows.append(gradient[0].abs().sum(-1) > 0)
    return torch.stack(rows)


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("stagger", [0, 1, 2])
@pytest.mark.parametrize("sections", [2, 3])
def test_a_position_sees_memory_exactly_up_to_the_stagger_and_inside_the_window(
    sections: int, stagger: int, window: int | None
) -> None:
    config = BASE | {"section_layers": [1] * sections, "stagger": stagger, "cross_attention_window": window}
    behind = torch.arange(8)[:, None] - torch.arange(8)[None, :]
    expected = (behind >= stagger) & (behind < stagger + (window or 8))
    assert torch.equal(dependence(config, 8), expected)


@pytest.mark.parametrize("stagger", [0, 1, 2])
def test_depth_widens_the_window_backwards_but_never_forwards(stagger: int) -> None:
    config = BASE | {"section_layers": [1, 2], "stagger": stagger, "cross_attention_window": 2}
    behind = torch.arange(8)[:, None] - torch.arange(8)[None, :]
    assert torch.equal(dependence(config, 8), behind >= stagger)


@every_variant
def test_logits_of_a_prefix_do_not_change_with_what_follows(variant: dict[str, Any]) -> None:
    config = BASE | variant
    parameters, input_ids = perturbed(config), tokens(2, 9)
    full = forward(parameters, config, input_ids)
    for length in (1, 2, 5):
        prefix = forward(parameters, config, input_ids[:, :length])
        torch.testing.assert_close(prefix, full[:, :length], rtol=1e-12, atol=1e-12)


# --- the variants against one another ---------------------------------------------------------------------------


def test_the_gap_of_the_memory_is_the_null_vector_unnormalized() -> None:
    config = BASE | {"stagger": 2}
    parameters = perturbed(config)
    previous = torch.randn(1, 5, 16, dtype=torch.float64)
    slots = memory(parameters, shape_of(config), 1, previous)
    null = parameters["sections.1.null_memory"]
    assert torch.equal(slots[0, :2], torch.stack([null, null]))
    normalized = rms_norm(previous, parameters["sections.1.memory_norm.weight"], BASE["rms_norm_eps"])
    assert torch.equal(slots[:, 2:], normalized[:, :3])


def test_without_cross_attention_the_last_section_alone_is_a_llama_over_the_embeddings() -> None:
    config = BASE | {"section_layers": [1, 2]}
    parameters = perturbed(config)
    for layer in range(2):
        parameters[f"sections.1.layers.{layer}.cross_attention.o_proj.weight"].zero_()
    single = BASE | {"section_layers": [2], "connection": "sequential"}
    renamed = {name.replace("sections.1.", "sections.0."): value for name, value in parameters.items()}
    renamed |= {name: parameters[name] for name in ("embedding.weight", "output_norm.weight", "head.weight")}
    ids = tokens(2, 9)
    torch.testing.assert_close(forward(parameters, config, ids), forward(renamed, single, ids), rtol=1e-12, atol=1e-12)


def test_shared_weights_equal_separate_copies_of_the_shared_tensors() -> None:
    shared = BASE | VARIANTS["shared"]
    separate = shared | {"share_section_weights": False}
    parameters = perturbed(shared)
    copies = {}
    for name in parameter_shapes(separate):
        source = name if name in parameters else f"sections.0.{name.split('.', 2)[2]}"
        copies[name] = parameters[source]
    ids = tokens(2, 9)
    assert torch.equal(forward(parameters, shared, ids), forward(copies, separate, ids))


def test_combined_sections_with_all_weight_on_the_last_equal_the_uncombined() -> None:
    config = BASE | {"section_layers": [1, 1, 1]}
    combined = config | {"combine_sections": True}
    parameters, ids = perturbed(combined), tokens(2, 9)
    parameters["section_mix"] = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(forward(parameters, combined, ids), forward(parameters, config, ids))
    parameters["section_mix"] = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
    outputs = section_outputs(parameters, combined, ids)
    halves = logits_of(parameters, config, [outputs[0] * 0.5 + outputs[2] * 0.5])
    torch.testing.assert_close(forward(parameters, combined, ids), halves)


@every_variant
def test_every_parameter_matters(variant: dict[str, Any]) -> None:
    config = BASE | variant
    _, gradients = loss_and_gradients(perturbed(config), config, tokens(2, 9), tokens(2, 9, seed=2))
    assert {name for name, gradient in gradients.items() if not gradient.abs().max() > 0} == set()


# --- names, initialization, loss --------------------------------------------------------------------------------


def test_names_are_the_canonical_ones_of_each_variant() -> None:
    plain = set(parameter_shapes(BASE))
    assert {"sections.1.memory_norm.weight", "sections.1.null_memory", "head.weight"} <= plain
    assert not any(name.startswith("sections.0.") and "cross" in name for name in plain)
    assert not any(name.startswith(("sections.0.memory", "sections.0.null")) for name in plain)
    assert plain - set(parameter_shapes(BASE | {"tie_word_embeddings": True})) == {"head.weight"}
    assert plain - set(parameter_shapes(BASE | {"stagger": 0})) == {"sections.1.null_memory"}
    assert set(parameter_shapes(BASE | {"combine_sections": True})) - plain == {"section_mix"}
    sequential = set(parameter_shapes(BASE | {"connection": "sequential"}))
    assert not any("cross" in name or "memory" in name for name in sequential)
    shared = set(parameter_shapes(BASE | VARIANTS["shared"]))
    later = {name.split(".")[4] for name in shared if name.startswith("sections.1.layers.0")}
    assert later == {"cross_attention_norm", "cross_attention"}


def test_initialization_follows_the_rule_and_is_the_same_in_every_precision() -> None:
    config = BASE | {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "combine_sections": True}
    parameters = random_parameters(config, seed=1, dtype=torch.float64)
    layers = sum(config["section_layers"])
    for name, value in parameters.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert initial_deviation(config, name) == pytest.approx(64**-0.5 / math.sqrt(2 * layers))
        elif value.ndim == 2:
            assert initial_deviation(config, name) == pytest.approx(64**-0.5)
        if value.ndim == 2:
            assert float(value.std()) == pytest.approx(initial_deviation(config, name), rel=0.1)
    assert set(parameters["section_mix"].tolist()) == {0.5}
    assert set(parameters["sections.1.null_memory"].tolist()) == {0.0}
    assert set(parameters["sections.1.memory_norm.weight"].tolist()) == {1.0}
    single = random_parameters(config, seed=1, dtype=torch.float32)
    assert all(torch.equal(single[name], value.float()) for name, value in parameters.items())


def test_loss_equals_cross_entropy() -> None:
    logits = torch.randn(2, 5, 11, dtype=torch.float64) * 4
    labels = torch.randint(11, (2, 5))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss(logits, labels), expected, rtol=1e-13, atol=1e-13)
