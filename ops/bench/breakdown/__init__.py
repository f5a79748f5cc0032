"""`octet bench breakdown`: a decode step by part, the floor beside it, and what steps cost by their size."""
