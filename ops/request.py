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
    """Print the answer: text, or token ids where the checkpoint has no tokenizer.

    Raises: CallError; RequestError for an option that is none, or for what a text cannot tell.
    """
    if as_json:
        messages = client.stream(prompt, **options) if stream else [client.generate(prompt, **options)]
        for message in messages:
            print(_json(message), flush=True)
        return
    if options.get("logprobs") is not None:
        raise RequestError("logprobs", options["logprobs"], "none without --json", "a text has no room for them")
    if stream and (options.get("n") or 1) > 1:
        raise RequestError("n", options["n"], "1 with --stream", "with --json, chunks name the choice that they are of")
    # Text that is empty says nothing: a part of a character, or of a stop string, waits for the rest.
    has_text = client.model_info().has_tokenizer
    if stream:
        for chunk in client.stream(prompt, **options):
            text = chunk.text if has_text else "".join(f"{token_id} " for token_id in chunk.token_ids)
            print(text, end="", flush=True)
        print()
        return
    response = client.generate(prompt, **options)
    several = len(response.choices) > 1
    for choice in response.choices:
        prefix = f"[{choice.index}] " if several else ""
        print(prefix + (choice.text if has_text else " ".join(map(str, choice.token_ids))))


_json = as_json
