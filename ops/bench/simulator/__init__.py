"""`octet bench simulator`: clusters of this machine beside simulated ones, with costs measured right around them."""
