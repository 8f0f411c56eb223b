"""The generator: renders the templates of one decay kind into plain Triton modules (`python -m gen --help`)."""
