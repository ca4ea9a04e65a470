//! The `nbdcast` program. Everything it does is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    nbdcast::cli::main()
}
