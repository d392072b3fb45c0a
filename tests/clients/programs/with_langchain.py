"""`langchain-openai` against the server at argv[1]."""

import asyncio
import json
import sys
from typing import Any

from langchain_openai import ChatOpenAI, OpenAI

base: dict[str, Any] = {"base_url": f"{sys.argv[1]}/v1", "api_key": "none", "model": "tiny", "max_retries": 0}
chat = ChatOpenAI(**base, max_tokens=12, seed=5, temperature=0.5)
whole = chat.invoke([("system", "x"), ("human", "Hi")])
pieces = list(chat.stream([("system", "x"), ("human", "Hi")]))
later = asyncio.run(chat.ainvoke([("system", "x"), ("human", "Hi")]))
text = OpenAI(**base, max_tokens=8, temperature=0)
print(
    json.dumps(
        {
            "chat": whole.content,
            "usage": whole.usage_metadata,
            "finish": whole.response_metadata["finish_reason"],
            "streamed": "".join(str(piece.content) for piece in pieces),
            "async": later.content,
            "completion": text.invoke("def main("),
            "completion_streamed": "".join(text.stream("def main(")),
            "batch": len(text.generate(["a", "b"]).generations),
        }
    )
)
