"""The baseline as a graph of OpenVINO whose caches are states of the graph."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from stagdist.config.parts import ModelConfig

INPUTS = ("input_ids", "attention_mask", "position_ids", "beam_idx")
END = 2**31 - 1


def openvino_graph(model: ModelConfig, weights: Mapping[str, Tensor], *, int8: bool) -> Any:
    """The sequential model as an `openvino.Model`, in the form that OpenVINO fuses on CPUs.

    Inputs: `input_ids` and `position_ids` [B, T], `attention_mask` [B, S + T], of which the length counts, `beam_idx`
    [B]. Output: `logits` [B, 1, V] of the last position.

    Args:
        weights: fp32, by their names in transformers.
        int8: matrices have one scale for each row; the embedding stays fp32.
    """
    return _Builder(model, weights, int8).model()


class _Builder:
    def __init__(self, model: ModelConfig, weights: Mapping[str, Tensor], int8: bool):
        from openvino import opset13

        self._ops, self._model, self._weights, self._int8 = opset13, model, weights, int8
        self._sinks: list[Any] = []

    def model(self) -> Any:
        """The graph."""
        from openvino import Model, Type

        ops, model = self._ops, self._model
        inputs = [ops.parameter([-1, -1], Type.i64) for _ in INPUTS[:-1]] + [ops.parameter([-1], Type.i32)]
        tokens, mask, positions, self._order = inputs
        self._set_positions(tokens, mask, positions)
        hidden = ops.gather(self._constant("model.embed_tokens"), tokens, self._int(0))
        for layer in range(model.num_layers):
            hidden = self._layer(f"model.layers.{layer}.", hidden)
        last = ops.slice(hidden, self._int(-1), self._int(END), self._int(1), self._int(1))
        head = "model.embed_tokens" if model.tie_word_embeddings else "lm_head"
        logits = ops.result(self._product(self._norm(last, "model.norm"), head))
        made = Model([logits], self._sinks, inputs, "llama")
        for port, name in zip([*made.inputs, *made.outputs], [*INPUTS, "logits"], strict=True):
            port.get_tensor().set_names({name})
        return made

    def _set_positions(self, tokens: Any, mask: Any, positions: Any) -> None:
        """What all layers share: cosines and sines of the positions, the mask, empty caches."""
        ops, width = self._ops, self._model.head_width
        wavelengths = self._model.rope_theta ** -(np.arange(0, width, 2, dtype=np.float32) / width)
        places = ops.convert(ops.unsqueeze(positions, self._int(-1)), "f32")
        angles = ops.multiply(places, self._float(wavelengths.reshape(1, 1, -1)))
        angles = ops.unsqueeze(ops.concat([angles, angles], -1), self._int(1))
        self._cos, self._sin = ops.cos(angles), ops.sin(angles)
        length = ops.gather(ops.shape_of(mask), ops.constant(1), ops.constant(0))
        zero, one = ops.constant(np.int64(0)), ops.constant(np.int64(1))
        keys = ops.unsqueeze(ops.range(zero, length, one, output_type="i64"), self._int(0, 1, 2))
        seen = ops.less_equal(keys, ops.unsqueeze(positions, self._int(1, 3)))
        self._mask = ops.select(seen, self._float(0.0), self._float(-np.inf))
        batch = ops.gather(ops.shape_of(tokens), self._int(0), self._int(0))
        shape = ops.concat([batch, self._int(self._model.key_value_heads), self._int(0), self._int(width)], 0)
        self._empty = ops.broadcast(self._float(0.0), shape)

    def _layer(self, prefix: str, hidden: Any) -> Any:
        ops, model = self._ops, self._model
        width, many, few = model.head_width, model.num_attention_heads, model.key_value_heads
        normed = self._norm(hidden, f"{prefix}input_layernorm")
        query, key, value = (
            self._heads(self._product(normed, f"{prefix}self_attn.{part}_proj"), many if part == "q" else few)
            for part in "qkv"
        )
        keys, values = self._kept(f"{prefix}key", self._rotated(key)), self._kept(f"{prefix}value", value)
        keys, values = (self._repeated(each, many // few) for each in (keys, values))
        seen = ops.scaled_dot_product_attention(self._rotated(query), keys, values, self._mask)
        seen = ops.reshape(ops.transpose(seen, self._int(0, 2, 1, 3)), self._int(0, 0, many * width), True)
        hidden = ops.add(hidden, self._product(seen, f"{prefix}self_attn.o_proj"))
        normed = self._norm(hidden, f"{prefix}post_attention_layernorm")
        gate = ops.swish(self._product(normed, f"{prefix}mlp.gate_proj"))
        inner = ops.multiply(gate, self._product(normed, f"{prefix}mlp.up_proj"))
        return ops.add(hidden, self._product(inner, f"{prefix}mlp.down_proj"))

    def _product(self, rows: Any, name: str) -> Any:
        ops = self._ops
        if not self._int8:
            return ops.matmul(rows, self._constant(name), False, True)
        weight = self._weights[f"{name}.weight"].numpy()
        scale = np.abs(weight).max(axis=1, keepdims=True) / 127
        rounded = ops.constant(np.round(weight / scale).astype(np.int8))
        return ops.matmul(rows, ops.multiply(ops.convert(rounded, "f32"), ops.constant(scale)), False, True)

    def _norm(self, rows: Any, name: str) -> Any:
        ops = self._ops
        square = ops.reduce_mean(ops.power(rows, self._float(2.0)), self._int(-1), True)
        root = ops.sqrt(ops.add(square, self._float(self._model.rms_norm_eps)))
        return ops.multiply(ops.multiply(rows, ops.divide(self._float(1.0), root)), self._constant(name))

    def _heads(self, rows: Any, heads: int) -> Any:
        split = self._ops.reshape(rows, self._int(0, 0, heads, self._model.head_width), True)
        return self._ops.transpose(split, self._int(0, 2, 1, 3))

    def _rotated(self, rows: Any) -> Any:
        ops, half = self._ops, self._model.head_width // 2
        first = ops.slice(rows, self._int(0), self._int(half), self._int(1), self._int(3))
        second = ops.slice(rows, self._int(half), self._int(END), self._int(1), self._int(3))
        turned = ops.concat([ops.multiply(second, self._float(-1.0)), first], -1)
        return ops.add(ops.multiply(rows, self._cos), ops.multiply(turned, self._sin))

    def _kept(self, name: str, new: Any) -> Any:
        """The state with the new entries behind it."""
        from openvino import PartialShape, Type

        shape = PartialShape([-1, self._model.key_value_heads, -1, self._model.head_width])
        old = self._ops.read_value(self._empty, name, Type.f32, shape)
        both = self._ops.concat([self._ops.gather(old, self._order, self._ops.constant(np.int64(0))), new], 2)
        self._sinks.append(self._ops.assign(both, name))
        return both

    def _repeated(self, rows: Any, times: int) -> Any:
        """Each head of [B, K, S, D] as often as query heads share it."""
        if times == 1:
            return rows
        ops, model = self._ops, self._model
        alone, shape = ops.unsqueeze(rows, self._int(2)), self._int(1, 1, times, 1, 1)
        shared = ops.broadcast(alone, shape, broadcast_spec="BIDIRECTIONAL")
        return ops.reshape(shared, self._int(0, model.num_attention_heads, -1, model.head_width), True)

    def _constant(self, name: str) -> Any:
        return self._ops.constant(self._weights[f"{name}.weight"].numpy())

    def _int(self, *values: int) -> Any:
        return self._ops.constant(np.array(values, np.int64))

    def _float(self, value: Any) -> Any:
        return self._ops.constant(np.asarray(value, np.float32))
