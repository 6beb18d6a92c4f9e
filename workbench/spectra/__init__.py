"""What probes of spectra share: one Lanczos run as a stream of variables, brackets from halves, pictures."""
