//! The `weir` program: arguments in, exit code out.

use std::process::ExitCode;

use clap::Parser;
use weir::cli::Cli;
use weir::error::Fatal;

fn main() -> ExitCode {
    match Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(fatal) => {
            match &fatal {
                // Each line starts with its file, line and column, for editors and CI.
                Fatal::Config(errors) => eprintln!("{errors}"),
                fatal => eprintln!("weir: {fatal}"),
            }
            ExitCode::from(fatal.exit_code())
        }
    }
}
