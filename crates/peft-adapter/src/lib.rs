//! Bottleneck adapters between the layers of a model, and methods that scale and shift what its layers compute.
