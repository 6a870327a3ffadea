//! What an idle kept-alive connection costs: resident memory before and after ten thousand of them.
//!
//! Each connection does one small request first, so that whatever a connection keeps from its work is counted.
//! Not here: kernel memory of the sockets, which is not the server's RSS.

use crate::client::{Bounds, Client, ClientOptions, loopback_sources};
use crate::cpu::CpuPlan;
use crate::machine::Machine;
use crate::request::Request;
use crate::server::{self, Ack, Server, ServerOptions};
use crate::{SEED, ServerArguments};
use anyhow::{Context, Result, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
use std::time::Duration;
use weir_perf::event;

const BYTES_PER_CONNECTION_MAX: f64 = 4096.0;
const POOL: u64 = 1_024;
/// Connects under way at once; an accept queue longer than the server's backlog would drop some for a second.
pub const IN_FLIGHT: usize = 64;
/// One source address has some 28,000 ports by default; stay well below.
const CONNECTIONS_PER_SOURCE: u64 = 20_000;
/// Warm-up that the idle connections are not blamed for.
const WARM_UP_REQUESTS: u64 = 20_000;
const WARM_UP_CONNECTIONS: usize = 64;
/// Descriptors beside the connections: listeners, files, the ring.
pub const DESCRIPTORS_SPARE: u64 = 256;
const TIME_MAX: Duration = Duration::from_secs(120);

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    server: ServerArguments,
    /// What a success answer promises
    #[arg(long, value_enum, default_value = "durable")]
    ack: Ack,
    /// Idle connections to hold
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=200_000))]
    connections: u32,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let weir = server::binary_path(arguments.server.weir.as_deref())?;
    let connection_count = u64::from(arguments.connections);
    // The server inherits the limit, and needs as many.
    raise_descriptor_limit(connection_count + DESCRIPTORS_SPARE)?;
    let cpus = CpuPlan::choose()?;
    let machine = Machine::describe();
    crate::note_shared_cpu(cpus);
    let requests: Vec<Request> = (0..POOL)
        .map(|index| Request::single(&event::small_event(SEED, index)))
        .collect();
    let options = ServerOptions {
        connections_max: Some(arguments.connections as usize + WARM_UP_CONNECTIONS + 16),
        ..ServerOptions::new(&arguments.server, arguments.ack)
    };
    let server = Server::start(&weir, cpus, &options)?;
    let client = |connection_count: usize| {
        let options = ClientOptions {
            connection_count,
            fresh_connections: false,
            check_answers: true,
            sources: loopback_sources(connection_count as u64, CONNECTIONS_PER_SOURCE),
            tls: None,
        };
        Client::new(server.address(), &requests, options)
    };
    let one_each = |request_count_max| Bounds {
        request_count_max,
        duration_max: TIME_MAX,
        in_flight_max: IN_FLIGHT,
        rate: None,
    };

    let mut warm_up = client(WARM_UP_CONNECTIONS)?;
    warm_up
        .run(&one_each(WARM_UP_REQUESTS))?
        .require_success()
        .context("warming up")?;
    let before = server.sample()?.rss_bytes;

    let mut idle = client(arguments.connections as usize)?;
    // As many requests as connections, each to the one that waited longest: one each.
    let outcome = idle.run(&one_each(connection_count))?;
    outcome.require_success().context("opening connections")?;
    let closed = idle.count_closed()?;
    let after = server.sample()?.rss_bytes;
    ensure!(
        idle.open_count() as u64 == connection_count && closed == 0,
        "only {} of {connection_count} connections stayed open",
        idle.open_count()
    );
    drop(idle);
    drop(warm_up);
    server.stop()?;

    let per_connection = (after as f64 - before as f64) / connection_count as f64;
    let passes = per_connection <= BYTES_PER_CONNECTION_MAX;
    println!(
        "RSS before: {} bytes; with {connection_count} idle connections: {} bytes",
        before, after
    );
    println!(
        "per idle connection: {per_connection:.0} bytes (at most {BYTES_PER_CONNECTION_MAX:.0}): {}",
        if passes { "PASS" } else { "FAIL" }
    );
    let line = json!({
        "measurement": "idle",
        "machine": machine.to_json(),
        "ack": arguments.ack.name(),
        "connections": connection_count,
        "rss_bytes_before": before,
        "rss_bytes_after": after,
        "bytes_per_connection": per_connection,
        "pass": passes,
    });
    println!("{line}");
    Ok(())
}

/// Raises this process's soft limit, which the server inherits.
pub fn raise_descriptor_limit(needed: u64) -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    let is_enough = |value: Option<u64>| value.is_none_or(|value| value >= needed);
    if is_enough(limit.current) {
        return Ok(());
    }
    ensure!(
        is_enough(limit.maximum),
        "{needed} open files are needed but at most {} allowed: raise the hard limit (ulimit -Hn), or pass fewer --connections",
        limit.maximum.unwrap_or(u64::MAX)
    );
    let raised = Rlimit {
        current: Some(needed),
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, raised).context("raising the limit of open files")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_is_enough_is_left_alone() {
        let before = getrlimit(Resource::Nofile);
        raise_descriptor_limit(1).expect("any process may open one file");
        assert_eq!(getrlimit(Resource::Nofile), before);
    }
}
