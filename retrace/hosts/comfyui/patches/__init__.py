"""What lives on a MODEL: patches that a sampler runs with."""
