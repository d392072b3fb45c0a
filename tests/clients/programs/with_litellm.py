"""`litellm` against the server at argv[1]."""

import asyncio
import json
import sys
from typing import Any

import litellm

base: dict[str, Any] = {"api_base": f"{sys.argv[1]}/v1", "api_key": "none", "num_retries": 0}
asked: dict[str, Any] = {**base, "model": "openai/tiny", "max_tokens": 12, "seed": 5}
messages = [{"role": "user", "content": "Hi"}]
plain: Any = litellm.completion(messages=messages, **asked)
stream: Any = litellm.completion(messages=messages, stream=True, stream_options={"include_usage": True}, **asked)
chunks = list(stream)
later: Any = asyncio.run(litellm.acompletion(messages=messages, **asked))
text_asked: dict[str, Any] = {**base, "model": "text-completion-openai/tiny", "max_tokens": 8, "temperature": 0}
text: Any = litellm.text_completion(prompt="def main(", **text_asked)
text_chunks: Any = litellm.text_completion(prompt="def main(", stream=True, **text_asked)


def error_of(**change: Any) -> str:
    """Name of the exception that a request raises."""
    try:
        litellm.completion(**{**asked, "messages": messages, **change})
    except Exception as error:
        return type(error).__name__
    return ""


print(
    json.dumps(
        {
            "chat": plain.choices[0].message.content,
            "usage": plain.usage.completion_tokens,
            "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
            "streamed_usage": [chunk.usage.completion_tokens for chunk in chunks if getattr(chunk, "usage", None)],
            "async": later.choices[0].message.content,
            "completion": text.choices[0].text,
            "completion_streamed": "".join(chunk.choices[0].text or "" for chunk in text_chunks if chunk.choices),
            "unknown_model": error_of(model="openai/other"),
            "negative_temperature": error_of(temperature=-1),
        }
    )
)
