//! The examples are in `examples/`; run one with `cargo run -p peft-examples --example NAME`.
