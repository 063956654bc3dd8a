//! wick
fn main() {}
