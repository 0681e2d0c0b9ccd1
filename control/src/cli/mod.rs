//! cli
/// main
pub fn main() -> std::process::ExitCode {
    todo!()
}
