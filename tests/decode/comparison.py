"""What the engine must have done, by full recomputation with the reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stagdist.decode.request import FinishReason, Request, RequestOutput
from stagdist.decode.sampling.noise import gumbel
from tests.decode.decoding import CONTEXT, Case, Ran, config_of, parameters_of
from tests.decode.plain_sampler import plain_scores
from tests.reference import stagformer as reference

CLEAR_MARGIN = 1e-3


@dataclass
class Compared:
    """How far an engine is from the reference.

    Attributes:
        difference: largest of all logits.
        logits: how many were compared.
        wrong_tokens: where the reference prefers another token by more than the margin.
        tokens: how many were compared.
    """

    difference: float = 0.0
    logits: int = 0
    wrong_tokens: int = 0
    tokens: int = 0


def reference_logits(
    case: Case, request: Request, completion: RequestOutput, config: dict[str, Any] | None = None
) -> Tensor:
    """Logits from which each token of a completion should have been chosen. Shapes: [tokens, V]."""
    ids = [*request.prompt_ids, *completion.token_ids][:CONTEXT]
    parameters, config = parameters_of(case), config or config_of(case.keys)
    if case.options.weights is not None:
        parameters, config = rounded_model(parameters, config)
    logits = reference.forward(parameters, config, torch.tensor([ids]))[0]
    first = len(request.prompt_ids) - 1
    return logits[first : first + len(completion.token_ids)]


def rounded_model(
    parameters: reference.Parameters, config: dict[str, Any]
) -> tuple[reference.Parameters, dict[str, Any]]:
    """The model that an engine with weights in int8 holds: every matrix but the embedding is rounded row by row.

    A tied head is rounded, too; so it is a parameter of its own.
    """
    if config.get("tie_word_embeddings"):
        parameters = parameters | {"head.weight": parameters["embedding.weight"]}
    rounded = {
        name: rounded_rows(value) if value.dim() == 2 and name != "embedding.weight" else value
        for name, value in parameters.items()
    }
    return rounded, config | {"tie_word_embeddings": False}


def rounded_rows(weight: Tensor) -> Tensor:
    """The formula of weights in int8, in fp32: each row's values are multiples of its largest magnitude over 127."""
    rows = [(row.float(), row.float().abs().max() / 127) for row in weight]
    return torch.stack(
        [torch.round(row / step).double() * step.double() if step else row.double() for row, step in rows]
    )


def compare(case: Case, ranks: list[Ran], config: dict[str, Any] | None = None, margin: float = 0.0) -> Compared:
    """Compare a case with one slot, whose requests are greedy and end by length.

    Args:
        config: of the reference, where it shall differ from the case's.
        margin: tokens count as wrong where the reference's best two are further apart.
    """
    compared = Compared()
    expected = [
        reference_logits(case, request, done, config)
        for request, done in zip(case.requests, ranks[0].completions, strict=True)
    ]
    for request, done, logits in zip(case.requests, ranks[0].completions, expected, strict=True):
        room = CONTEXT - len(request.prompt_ids) + 1
        assert done.finish_reason is FinishReason.LENGTH, done
        assert len(done.token_ids) == min(room, request.params.max_new_tokens)
        best = logits.topk(2).values
        clear = best[:, 0] - best[:, 1] > margin
        compared.wrong_tokens += int(((logits.argmax(-1) != torch.tensor(done.token_ids)) & clear).sum())
        compared.tokens += int(clear.sum())
    rows = torch.cat(expected)
    for ran in ranks:
        if not ran.logits:
            continue
        found = torch.cat([logits for _, _, logits in ran.logits]).double()
        positions = [position for _, chosen, _ in ran.logits for position in chosen]
        assert positions == _positions(case, ranks[0].completions)
        part = rows[:, ran.first_token : ran.first_token + found.shape[1]]
        assert found.shape == part.shape
        if part.numel():
            compared.difference = max(compared.difference, float((found - part).abs().max()))
        compared.logits += part.numel()
    return compared


def _positions(case: Case, completions: list[RequestOutput]) -> list[int]:
    return [
        len(request.prompt_ids) + index
        for request, done in zip(case.requests, completions, strict=True)
        for index in range(len(done.token_ids))
    ]


def best_token(logits: Tensor, request: Request, position: int, before: Sequence[int]) -> int:
    """What should be chosen, for requests without truncation.

    Shapes: logits [V]; `before` holds the tokens of prompt and output.
    """
    params, size = request.params, len(request.prompt_ids)
    scores = torch.from_numpy(plain_scores(logits.double().numpy(), params, before[:size], list(before[size:])))
    if params.temperature > 0:
        seed, place = torch.tensor([params.seed]), torch.tensor([position])
        scores = scores / params.temperature + gumbel(seed, place, torch.arange(len(logits)))[0]
    return int(scores.argmax())
