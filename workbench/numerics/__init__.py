"""Mathematics that has never heard of a neural net: symmetric operators, spectra, traces, statistics."""
