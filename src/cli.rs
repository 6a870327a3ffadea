//! The command line: its subcommands and their arguments.
//!
//! Comes right after `main.rs`. Main thread; allocates freely.
//! Each subcommand is a file below `cli/` and returns a `Fatal` or nothing.
//! Results go to stdout, everything else to stderr.

mod check;
mod dead_letter;
mod demo;
mod plan;
mod run;
mod spool;
mod standin;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::Config;
use crate::error::Fatal;

/// Takes events over HTTP and delivers them as gzip blobs, on memory that does not move.
#[derive(Debug, Parser)]
#[command(name = "weir", version, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve until SIGTERM or SIGINT, then drain and exit.
    ///
    /// Prints `listening on ADDRESS` for each listener once it accepts; logs to stderr.
    Run {
        #[command(flatten)]
        config: ConfigArgs,

        /// Answer requests without looking at them, and lose them: what receiving alone costs.
        #[arg(long, hide = true)]
        floor_receive: bool,
    },

    /// Start a node that needs no configuration, and beside it a stand-in for Azure Data Explorer on loopback.
    ///
    /// Prints a curl line to try, each second what came in and what was delivered, and rows as they land.
    /// Ctrl-C drains and says what there was.
    Demo(DemoArgs),

    /// Check a configuration, with file, line and column of every error.
    ///
    /// Exits with 0 if it is valid, warnings or not, and with 2 if it is not.
    Check {
        #[command(flatten)]
        config: ConfigArgs,

        /// Also try what Kusto needs: endpoint, token, resources, tables and mappings, a tiny blob.
        ///
        /// Nothing is ingested. Exits with 1 if a step failed.
        #[arg(long)]
        online: bool,
    },

    /// Print the memory sum of a configuration, term by term, and the limit it must keep.
    Plan(ConfigArgs),

    /// Look at the spool: what is in it, whether it is whole, and the rows themselves.
    ///
    /// Only reads, so it can be used beside a running weir.
    #[command(subcommand)]
    Spool(SpoolCommand),

    /// Look at what Kusto will never take, deliver it again, or drop it.
    #[command(subcommand)]
    DeadLetter(DeadLetterCommand),

    /// Play the remote end of Kusto's queued ingestion, on loopback: for measurements.
    #[command(hide = true)]
    Standin(StandinArgs),
}

#[derive(Debug, Args)]
pub struct StandinArgs {
    /// Where it listens; port 0 lets the kernel choose.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,

    /// Where it says how it is reached.
    #[arg(long, value_name = "DIRECTORY", default_value = ".")]
    pub directory: PathBuf,
}

#[derive(Debug, Subcommand)]
pub enum DeadLetterCommand {
    /// List the dead letters.
    Ls(ConfigArgs),

    /// Print the reason of one, or its rows.
    Show {
        #[command(flatten)]
        config: ConfigArgs,

        /// Its name, as `weir dead-letter ls` shows it.
        name: String,

        /// The rows instead of the reason.
        #[arg(long)]
        rows: bool,
    },

    /// Deliver letters to the configured destination, and remove those that it takes; while weir is stopped.
    ///
    /// They keep their names, so that what had arrived after all is recognised.
    Replay {
        #[command(flatten)]
        config: ConfigArgs,

        #[command(flatten)]
        letters: Letters,
    },

    /// Remove letters for good; while weir is stopped.
    Drop {
        #[command(flatten)]
        config: ConfigArgs,

        #[command(flatten)]
        letters: Letters,
    },
}

/// Which dead letters are meant.
#[derive(Debug, Args)]
#[group(required = true)]
pub struct Letters {
    /// Their names, as `weir dead-letter ls` shows them.
    #[arg(value_name = "NAME")]
    pub names: Vec<String>,

    /// All there are.
    #[arg(long)]
    pub all: bool,
}

#[derive(Debug, Subcommand)]
pub enum SpoolCommand {
    /// List the segments that hold a batch.
    Ls(ConfigArgs),

    /// Check every frame of every segment.
    ///
    /// Exits with 1 where a row is lost that had been durable.
    Verify(ConfigArgs),

    /// Print the rows of one segment.
    Cat {
        #[command(flatten)]
        config: ConfigArgs,

        /// Its name, as `weir spool ls` shows it.
        segment: String,
    },
}

/// The argument of every subcommand that reads a configuration.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// The configuration, TOML; without it every key has its default.
    ///
    /// Relative paths in it are relative to its directory.
    #[arg(long, short, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

impl ConfigArgs {
    /// Loads the file, or the defaults with paths relative to the working directory.
    pub fn load(&self) -> Result<Config, Fatal> {
        match &self.config {
            Some(path) => Config::load(path),
            None => Ok(Config::default()),
        }
    }

    /// What messages call the configuration.
    fn name(&self) -> String {
        match &self.config {
            Some(path) => path.display().to_string(),
            None => "the default configuration".into(),
        }
    }
}

#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Where to take events; port 0 lets the kernel choose.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9880")]
    pub listen: SocketAddr,

    /// Where to serve metrics and health; port 0 lets the kernel choose.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9881")]
    pub admin: SocketAddr,

    /// Where the stand-in for Azure Data Explorer listens, and shows what landed; port 0 lets the kernel choose.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9882")]
    pub standin: SocketAddr,

    /// Write blobs below this directory instead, without the stand-in.
    #[arg(long, value_name = "DIRECTORY", conflicts_with = "standin")]
    pub out: Option<PathBuf>,

    /// Listen with TLS, under a certificate made for this demo and thrown away after it.
    #[arg(long)]
    pub tls: bool,
}

impl Cli {
    /// Does what the arguments say.
    pub fn run(self) -> Result<(), Fatal> {
        match self.command {
            Command::Run {
                config,
                floor_receive,
            } => run::run(config.load()?, floor_receive),
            Command::Demo(args) => demo::run(&args),
            Command::Check { config, online } => check::run(&config, online),
            Command::Plan(args) => plan::run(&args),
            Command::Spool(command) => spool::run(&command),
            Command::DeadLetter(command) => dead_letter::run(&command),
            Command::Standin(args) => standin::run(&args),
        }
    }
}

/// Writes a subcommand's result. A reader that has gone away is no error of ours.
fn print(text: &str) -> Result<(), Fatal> {
    use std::io::Write;
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(source) if source.kind() != std::io::ErrorKind::BrokenPipe => Err(Fatal::Io {
            action: "writing to stdout".into(),
            source,
        }),
        _ => Ok(()),
    }
}

/// One warning per line.
fn warnings_text(warnings: &[String]) -> String {
    warnings
        .iter()
        .map(|warning| format!("warning: {warning}\n"))
        .collect()
}
