"""`octet bench interference`: what long prompts that arrive do to the streams that run."""
