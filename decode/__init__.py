"""Decode: continuous batching over paged KV, one token per running sequence and step."""
