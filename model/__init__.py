"""The transformer without its routed experts: config, checkpoint, tokenizer, attention, KV pages, sampling."""
