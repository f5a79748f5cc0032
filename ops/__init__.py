"""What people use: the command line, checks, benchmarks, and the maker of the embedded model."""
