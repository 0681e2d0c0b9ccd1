//! `ringway-bench`: the lab.
fn main() {}
