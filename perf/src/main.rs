//! `weir-perf`: starts the release binary pinned to one CPU and drives it from another.
//!
//! Modules in the order the data flows: requests, the client that sends them, the server that takes them, the floors
//! they are compared with, the measurements, and the kill rounds, which are in the library.
//! Everything here ends by itself, talks to this machine only, and ends no process but its own children.
//! A timing never makes it fail; a wrong answer, a refused request, a dead server or a lost record does.

mod request;

mod answer;
mod client;
mod client_http2;
mod transport;

mod cpu;
mod process;
mod server;
mod side;

mod answerer;
mod durable;
mod floor_b;
mod machine;

mod ceiling;
mod compare;
mod connections;
mod front_door;
mod idle;
mod kill_report;
mod kusto;
mod lone;
mod soak;
mod throughput;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

/// Seed of all generated events, so that two runs send the same bytes.
const SEED: u64 = 20_261_123;

#[derive(Parser)]
#[command(version, about, args_conflicts_with_subcommands = true)]
struct CommandLine {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    throughput: throughput::Arguments,
}

#[derive(Subcommand)]
enum Command {
    /// Requests per second and efficiency against the floors (the default)
    Throughput(throughput::Arguments),
    /// What TLS and HTTP/2 cost, beside plain HTTP/1.1
    FrontDoor(front_door::Arguments),
    /// What a change costs: two binaries in turn, and the quotients of their rounds
    Compare(compare::Arguments),
    /// Resident memory over many requests, on kept-alive and on fresh connections
    Soak(soak::Arguments),
    /// Resident memory of idle kept-alive connections
    Idle(idle::Arguments),
    /// Ten thousand connections of which few are active at a time: latency, and memory beside the plan
    Connections(connections::Arguments),
    /// How soon one small request at a time is answered durably, beside an fdatasync
    Lone(lone::Arguments),
    /// Kills weir again and again, and looks whether anything acknowledged was lost
    Kill(kill_report::Arguments),
    /// Whether delivery to a stand-in for Kusto keeps up, and what it costs the senders
    Kusto(kusto::Arguments),
    /// What the client alone can do here, against a stand-in that answers at once
    Ceiling(ceiling::Arguments),
}

#[derive(Args, Clone)]
struct ServerArguments {
    /// The weir binary; by default the one beside this program
    #[arg(long, value_name = "PATH")]
    weir: Option<PathBuf>,
    /// Compression level
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(0..=9))]
    level: u8,
    /// Where batches go
    #[arg(long, value_enum, default_value = "null")]
    destination: server::PlainDestination,
    /// Size of a durable server's spool
    #[arg(long, value_name = "SIZE", default_value = "256MiB")]
    spool_size: String,
    /// Put a durable server's spool below this directory: the disk that is measured
    #[arg(long, value_name = "PATH")]
    spool_directory: Option<PathBuf>,
}

fn main() -> ExitCode {
    match measure(CommandLine::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(arguments: CommandLine) -> Result<()> {
    match arguments.command {
        None => throughput::run(&arguments.throughput),
        Some(Command::Throughput(arguments)) => throughput::run(&arguments),
        Some(Command::FrontDoor(arguments)) => front_door::run(&arguments),
        Some(Command::Compare(arguments)) => compare::run(&arguments),
        Some(Command::Soak(arguments)) => soak::run(&arguments),
        Some(Command::Idle(arguments)) => idle::run(&arguments),
        Some(Command::Connections(arguments)) => connections::run(&arguments),
        Some(Command::Lone(arguments)) => lone::run(&arguments),
        Some(Command::Kill(arguments)) => kill_report::run(&arguments),
        Some(Command::Kusto(arguments)) => kusto::run(&arguments),
        Some(Command::Ceiling(arguments)) => ceiling::run(&arguments),
    }
}

/// Says once that a number must not be trusted where server and client share a CPU.
fn note_shared_cpu(cpus: cpu::CpuPlan) {
    if cpus.is_shared() {
        println!("note: only one CPU is allowed; server and client share it, so rates mean little");
    }
}

const MIB: f64 = (1 << 20) as f64;
