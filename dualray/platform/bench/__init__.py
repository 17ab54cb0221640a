"""Side-by-side benchmarks: a ratio against a peer, measured in one run, on one machine."""
