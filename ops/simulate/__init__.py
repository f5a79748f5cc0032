"""A cluster in simulated time: the deciding code is the real one, only the computing is replaced by its cost."""
