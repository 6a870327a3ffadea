//! The `weir` program: arguments in, exit code out.

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use weir::cli::Cli;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    log_to_stderr();
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(fatal) => {
            eprintln!("{}", fatal.report());
            ExitCode::from(fatal.exit_code())
        }
    }
}

/// `WEIR_LOG` sets the level: `info` without it.
fn log_to_stderr() {
    let filter = EnvFilter::builder()
        .with_env_var("WEIR_LOG")
        .with_default_directive(LevelFilter::INFO.into())
        .from_env_lossy();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}
