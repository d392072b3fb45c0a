"""The exported code computes what the formulas say, with its cache as without, padded as alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from stagdist.hf.configuration_stagformer import StagFormerConfig
from stagdist.hf.layers_stagformer import StagFormerCache
from stagdist.hf.modeling_stagformer import StagFormerForCausalLM
from tests.hf.models import DEEP, END, STAGGERED, build, generated, tokens
from tests.reference import stagformer as reference
from tests.reference.variants import BASE, LLAMA3, VARIANTS

HARD = ["stagger 0", "stagger 2", "window", "three sections with everything", "four combined sections"]
"""Variants that treat memory, cache or head in different ways."""
PACKED = ["one section", "tied", *HARD, *DEEP]
COMPILED = ["three sections with everything"]
"""Those of `PACKED` that `make test` compiles, in seconds each; it packs all without."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_reference(variant: str) -> None:
    model, parameters = build(variant)
    ids = tokens(2, 12)
    with torch.no_grad():
        logits = model(ids).logits
    torch.testing.assert_close(logits, reference.forward(parameters, BASE | VARIANTS[variant], ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", STAGGERED)
def test_pieces_of_any_length_through_the_cache_give_the_same_logits(variant: str) -> None:
    model, _ = build(variant, torch.float64)
    ids = tokens(2, 12)
    cache, pieces = None, []
    with torch.no_grad():
        for piece in ids.split([1, 4, 1, 1, 3, 2], dim=1):
            output = model(piece, past_key_values=cache)
            cache = output.past_key_values
            pieces.append(output.logits)
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids, use_cache=False).logits, atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("variant", HARD)
def test_generation_with_the_cache_equals_generation_without(variant: str, options: dict[str, Any]) -> None:
    model, _ = build(variant, torch.float64)
    ids = tokens(2, 5)
    assert generated(model, ids, **options).equal(generated(model, ids, use_cache=False, **options))


def test_greedy_generation_equals_the_loop_over_the_reference() -> None:
    model, parameters = build("three sections with everything", torch.float64)
    text = ids = tokens(2, 5)
    for _ in range(6):
        logits = reference.forward(parameters, BASE | VARIANTS["three sections with everything"], text)[:, -1]
        logits[:, END] = float("-inf")
        text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)
    assert generated(model, ids).equal(text[:, 5:])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("variant", ["one section", *HARD])
def test_a_left_padded_row_equals_the_row_alone(variant: str, options: dict[str, Any]) -> None:
    model, _ = build(variant, torch.float64)
    rows = [tokens(1, length, seed=length) for length in (1, 3, 7)]
    batch = torch.cat([torch.nn.functional.pad(row, (7 - row.shape[1], 0), value=17) for row in rows])
    mask = torch.stack([torch.arange(7) >= 7 - row.shape[1] for row in rows]).long()
    together = generated(model, batch, mask, **options)
    alone = torch.cat([generated(model, row, **options) for row in rows])
    assert together.equal(alone)
    with torch.no_grad():
        padded = model(batch, attention_mask=mask).logits
        for row, logits in zip(rows, padded, strict=True):
            torch.testing.assert_close(logits[None, 7 - row.shape[1] :], model(row).logits, atol=1e-12, rtol=0)


def test_a_right_padded_row_equals_the_row_alone() -> None:
    model, _ = build("stagger 2", torch.float64)
    row = tokens(1, 4)
    batch = torch.cat([torch.nn.functional.pad(row, (0, 3)), tokens(1, 7)])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7])
    with torch.no_grad():
        torch.testing.assert_close(model(batch, attention_mask=mask).logits[:1, :4], model(row).logits)


def check_packed(model: Any, run: Any, error: type[Exception]) -> Tensor:
    """Rows of several texts give the logits of each text alone, and need a run without cache; returns the rows."""
    texts = [tokens(2, length, seed=length) for length in (1, 5, 3, 2)]
    packed = torch.cat(texts, dim=1)
    position_ids = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
    expected = torch.cat([model(text).logits for text in texts], dim=1)
    with pytest.raises(error, match=r"packs several texts into a row; that needs use_cache=False"):
        run(packed, position_ids=position_ids)
    logits = run(packed, position_ids=position_ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, atol=1e-12, rtol=0)
    return packed


@pytest.mark.parametrize("variant", PACKED)
@torch.no_grad()
def test_packed_texts_equal_each_text_alone(variant: str) -> None:
    model, _ = build(variant, torch.float64)
    packed = check_packed(model, model, ValueError)
    shifted = model(packed, position_ids=torch.arange(11)[None] + 3).logits
    torch.testing.assert_close(shifted, model(packed).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=() if name in COMPILED else pytest.mark.slow) for name in PACKED]
)
@torch.no_grad()
def test_packed_texts_equal_each_text_alone_in_one_compiled_graph(variant: str) -> None:
    model, _ = build(variant, torch.float64)
    torch.compiler.reset()  # the limit of compilations is that of the process
    check_packed(model, torch.compile(model, backend="eager", fullgraph=True), RuntimeError)


def test_a_padded_batch_may_be_compiled_as_one_graph() -> None:
    model, _ = build("stagger 2")
    ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.int64)
    mask[0, :3] = 0
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        assert compiled(ids, attention_mask=mask, use_cache=False).logits.equal(expected)
        mask[0, 1] = 1
        with pytest.raises(RuntimeError, match="padding between real tokens"):
            compiled(ids, attention_mask=mask, use_cache=False)


def test_padding_between_tokens_is_refused() -> None:
    model, _ = build("tied")
    with pytest.raises(ValueError, match="padding between real tokens"):
        model(tokens(1, 4), attention_mask=torch.tensor([[1, 0, 1, 1]]))
    with pytest.raises(ValueError, match=r"attention_mask has shape \[1, 3\].*\[batch, 4\]"):
        model(tokens(1, 4), attention_mask=torch.ones(1, 3))


def test_a_cache_given_back_continues_the_text() -> None:
    model, _ = build("three sections with everything", torch.float64)
    ids = tokens(2, 4)
    first = model.generate(ids, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
    more = torch.cat([first.sequences, tokens(2, 2, seed=1)], dim=1)
    assert isinstance(first.past_key_values, StagFormerCache)
    assert generated(model, more, past_key_values=first.past_key_values).equal(generated(model, more))


def test_a_long_prompt_may_be_read_in_chunks() -> None:
    model, _ = build("stagger 2", torch.float64)
    ids = tokens(2, 7)
    chunked = generated(model, ids, past_key_values=StagFormerCache(), prefill_chunk_size=3)
    assert chunked.equal(generated(model, ids))


def test_a_cache_follows_its_rows() -> None:
    model, _ = build("stagger 2", torch.float64)
    ids, then = tokens(2, 4), tokens(4, 2, seed=2)
    with torch.no_grad():
        cache = model(ids).past_key_values
        cache.batch_repeat_interleave(3)
        cache.batch_select_indices(torch.tensor([5, 0, 1, 3]))
        cache.reorder_cache(torch.tensor([1, 2, 3, 0]))
        rows = torch.tensor([0, 0, 1, 1])
        expected = model(torch.cat([ids[rows], then], dim=1)).logits[:, 4:]
        torch.testing.assert_close(model(then, past_key_values=cache).logits, expected)
        cache.reset()
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits)
        with pytest.raises(NotImplementedError, match="cannot be shortened"):
            cache.crop(-1)


def test_what_the_cache_cannot_do_is_refused() -> None:
    model, _ = build("tied")
    ids = tokens(1, 5)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(ids, assistant_model=build("tied")[0], max_new_tokens=2)
    with pytest.raises(ValueError, match="only a StagFormerCache fits"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="output_attentions is off"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


def test_a_cache_keeps_only_the_end_of_a_prompt_for_the_memory() -> None:
    model, _ = build("stagger 2")
    with torch.no_grad():
        pending = model(tokens(1, 12)).past_key_values.pending
    assert [tensor.untyped_storage().nbytes() for tensor in pending.values()] == [2 * BASE["hidden_size"] * 4]


def test_loss_hidden_states_and_a_choice_of_logits() -> None:
    model, parameters = build("four combined sections")
    ids, config = tokens(2, 8), BASE | VARIANTS["four combined sections"]
    with torch.no_grad():
        output = model(ids, labels=ids, output_hidden_states=True)
        outputs = reference.section_outputs(parameters, config, ids)
        torch.testing.assert_close(output.loss, reference.loss(output.logits[:, :-1], ids[:, 1:]))
        for got, expected in zip(output.hidden_states[1:], outputs, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(model(ids, logits_to_keep=3).logits, output.logits[:, -3:])
        torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 5])).logits, output.logits[:, [1, 5]])
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids), return_dict=False)
        torch.testing.assert_close(embedded[0], output.logits)


def test_every_parameter_learns() -> None:
    model, parameters = build("three sections with everything")
    model.train()(tokens(2, 8), labels=tokens(2, 8)).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == parameters.keys()
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())


def test_a_new_model_starts_by_the_rule() -> None:
    config = BASE | {"hidden_size": 64, "intermediate_size": 96, "section_layers": [2, 2], "combine_sections": True}
    model = StagFormerForCausalLM(StagFormerConfig(**config))
    for name, parameter in model.named_parameters():
        expected = reference.initial_deviation(config, name)
        if expected:
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name
        else:
            start = 0.0 if name.endswith("null_memory") else 0.5 if name == "section_mix" else 1.0
            assert (parameter == start).all(), name


def test_both_spellings_of_rotary_parameters_are_read() -> None:
    old = StagFormerConfig(**BASE | {"rope_scaling": LLAMA3, "rope_theta": 7.0})
    bare = {key: value for key, value in BASE.items() if key != "rope_theta"}
    new = StagFormerConfig(**bare | {"rope_parameters": LLAMA3 | {"rope_theta": 7.0}})
    oldest = {"type" if key == "rope_type" else key: value for key, value in LLAMA3.items()}
    untyped = StagFormerConfig(**bare | {"rope_parameters": oldest | {"rope_theta": 7.0}})
    assert old.rope_parameters == new.rope_parameters == untyped.rope_parameters == LLAMA3 | {"rope_theta": 7.0}
    assert StagFormerConfig(**BASE | {"rope_scaling": {"type": "default"}}).rope_parameters["rope_type"] == "default"
    assert StagFormerConfig(**BASE).rope_parameters == {"rope_theta": 100.0, "rope_type": "default"}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"connection": "sequential"}, "connection 'staggered' and nothing else"),
        ({"attention_bias": True}, "attention_bias False"),
        ({"hidden_act": "gelu"}, "hidden_act 'silu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
        ({"rope_parameters": {"type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3}, "disagree"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, r"rope_theta is 100\.0 and .* 7\.0"),
        ({"rope_parameters": {"rope_type": "default", "type": "llama3"}}, "type 'llama3'; give one"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "no low_freq_factor"),
        ({"rope_parameters": "llama3"}, "must be a dictionary"),
        ({"section_layers": [2, 1], "share_section_weights": True}, "needs equal sections"),
        ({"section_layers": []}, "at least one layer"),
        ({"stagger": -1}, "cannot look ahead"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
    ],
)
def test_configurations_that_cannot_work_are_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        StagFormerConfig(**BASE | change)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_hidden_layers": 1}, r"num_hidden_layers is 1, section_layers \[1, 1\] have 2"),
        ({"section_layers": [2, 2]}, r"num_hidden_layers is 2, section_layers \[2, 2\] have 4"),
        ({"stagger": -1}, "cannot look ahead"),
        ({"cross_attention_window": 0}, "must see a slot"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0}}, "rope_type 'linear'"),
        ({"rope_parameters": {"rope_type": "default"}}, "no rope_theta"),
        ({"rope_parameters": None}, "no rope_theta"),
    ],
)
def test_a_model_refuses_what_was_changed_in_its_configuration(
    change: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    build("tied")[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=complaint):
        StagFormerForCausalLM.from_pretrained(tmp_path, **change)
