"""Prefill: the prompt's KV and the first token of each choice."""
