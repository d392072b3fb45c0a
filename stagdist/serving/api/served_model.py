"""The model that rank 0 serves, as requests see it: its names, tokens and chat template."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stagdist.data.tokenizer import Tokenizer
from stagdist.errors import DataError
from stagdist.serving.api.chat_template import ChatTemplate, plain_messages, plain_text
from stagdist.serving.api.problems import ProblemError
from stagdist.serving.api.token_texts import TokenTexts
from stagdist.serving.protocol import Hello
from stagdist.serving.settings import PLAIN_TEMPLATE, ServerSettings

NO_TEMPLATE = (
    "this model has no chat template: use /v1/completions, or start the server with --chat-template FILE "
    f"(or `{PLAIN_TEMPLATE}`, which writes `User:` and `Assistant:`)"
)


class ModelView:
    """What the HTTP process knows of the model.

    Attributes:
        model: as rank 0 describes it.
        names: names that requests may use; the first one is in answers.
        template_source: the chat template, None if there is none or it is `PLAIN_TEMPLATE`.
    """

    def __init__(self, hello: Hello, settings: ServerSettings) -> None:
        content = hello["tokenizer"]
        self.model = hello["model"]
        self.names = list(settings.names or self.model["names"])
        self.tokenizer = Tokenizer(content["json"], content["end_token"])
        self.texts = TokenTexts(self.tokenizer)
        self.special_tokens = content["special_tokens"]
        self.plain_chat = settings.chat_template == PLAIN_TEMPLATE
        self.template_source = None if self.plain_chat else settings.chat_template or content["chat_template"]
        self._any_model = settings.any_model
        self._template: ChatTemplate | None = None

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint`: equal seeds give equal answers only under an equal one."""
        model = self.model
        keys = ("path", "created", "stages", "tensor", "precision", "weights", "version", "connection", "recurrent")
        shape = [model[key] for key in keys]  # type: ignore[literal-required]
        return "fp_" + hashlib.sha256(repr(shape).encode()).hexdigest()[:12]

    def check_name(self, name: str | None) -> str:
        """The name for the answer.

        Raises:
            ProblemError: the model has another name.
        """
        if name is None or self._any_model or name in self.names:
            return name if name in self.names else self.names[0]  # type: ignore[return-value]
        known = ", ".join(map(repr, self.names))
        raise ProblemError(404, f"the model {name[:80]!r} does not exist; this server has {known}", param="model")

    def objects(self) -> list[dict[str, Any]]:
        """The entries of `/v1/models`, one for each name."""
        model = self.model
        keys = (
            "sections",
            "stages",
            "tensor",
            "slots",
            "vocab_size",
            "parameters",
            "precision",
            "weights",
            "connection",
            "stagger",
        )
        meta: dict[str, Any] = {key: model[key] for key in keys}  # type: ignore[literal-required]
        meta["chat"] = self.plain_chat or self.template_source is not None
        return [
            {
                "id": name,
                "object": "model",
                "created": model["created"],
                "owned_by": "stagdist",
                "root": Path(model["path"]).name,
                "parent": None,
                "max_model_len": model["max_context"],
                "meta": meta,
            }
            for name in self.names
        ]

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a prompt.

        Raises:
            ProblemError: the tokenizer has no tokens for it.
        """
        try:
            return self.tokenizer.encode_prompt(
                text, add_special_tokens=add_special_tokens, parse_special=parse_special
            )
        except DataError as error:
            raise ProblemError(400, str(error), param="prompt") from error

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation: as with `apply_chat_template` of `transformers`.

        Raises:
            ProblemError: there is no chat template, or it refuses the messages.
        """
        plain = plain_messages(messages)
        if self.plain_chat:
            return self.encode(plain_text(plain, add_generation_prompt=add_generation_prompt))
        if self.template_source is None:
            raise ProblemError(400, NO_TEMPLATE, param="messages", code="no_chat_template")
        if self._template is None:
            self._template = ChatTemplate(self.template_source, self.special_tokens)
        text = self._template.render(plain, add_generation_prompt=add_generation_prompt, variables=variables or {})
        return self.encode(text, add_special_tokens=False, parse_special=True)
