"""From a token to the experts that it chose, on whatever shards hold them, and back."""
