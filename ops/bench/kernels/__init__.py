"""`octet bench kernels`: how much of what a device can do its kernels reach, for one layer of a large model."""
