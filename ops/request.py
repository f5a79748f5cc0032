"""`octet generate`: one request from the command line."""

from __future__ import annotations

from typing import Any

from octet.client import Client, Prompt
from octet.errors import RequestError
from ops.render import as_json


def parse_prompt(text: str, *, token_ids: bool, chat: bool) -> Prompt:
    """Raises: RequestError."""
    if token_ids and chat:
        raise RequestError("prompt", "--token-ids and --chat", "one of them")
    if chat:
        return [("user", text)]
    if not token_ids:
        return text
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise RequestError("prompt", repr(text), "token ids such as '1,2,3'") from None


def run(client: Client, prompt: Prompt, options: dict[str, Any], *, stream: bool, as_json: bool) -> None:
    """Print the answer: text, or token ids where the checkpoint has no tokenizer."""
    if stream:
        _stream(client, prompt, options, as_json)
        return
    response = client.generate(prompt, **options)
    if as_json:
        print(_json(response))
        return
    several = len(response.choices) > 1
    for choice in response.choices:
        prefix = f"[{choice.index}] " if several else ""
        print(prefix + (choice.text or " ".join(map(str, choice.token_ids))))


def _stream(client: Client, prompt: Prompt, options: dict[str, Any], as_json: bool) -> None:
    for chunk in client.stream(prompt, **options):
        if as_json:
            print(_json(chunk), flush=True)
        else:
            print(chunk.text or "".join(f"{token_id} " for token_id in chunk.token_ids), end="", flush=True)
    if not as_json:
        print()


_json = as_json
