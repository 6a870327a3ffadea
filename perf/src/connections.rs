//! Ten thousand connections of which one in a hundred is active: does every request get its answer, how soon, and is
//! memory within the plan.
//!
//! All connections are open for the whole time, from as many loopback addresses as they need. The active ones send at a
//! steady rate, small events and now and then a large one; every second the next ones are active, so that each has its
//! turn. Latency counts from the moment at which a request was due.
//!
//! Sketch: 100 active connections at 20 requests a second are 2,000 requests/s, a few per cent of what the server can
//! take; so latency is a round trip and a commit, and what 10,000 sockets cost on top would show in its tail.
//! Not here: the cost of an idle connection alone; see `idle`.

use crate::client::{Bounds, Client, ClientOptions, Outcome, loopback_sources};
use crate::cpu::CpuPlan;
use crate::idle::{DESCRIPTORS_SPARE, IN_FLIGHT, raise_descriptor_limit};
use crate::machine::Machine;
use crate::request::Request;
use crate::server::{self, Ack, Server, ServerOptions};
use crate::{MIB, SEED, ServerArguments};
use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use serde_json::{Value, json};
use std::ops::Range;
use std::time::Duration;
use weir_perf::child::metric_sum;
use weir_perf::event;

const POOL: u64 = 1_000;
/// One request in so many is a large event.
const LARGE_EVERY: u64 = 20;
/// How long a set of connections is active.
const TURN: Duration = Duration::from_secs(1);
/// Below what the server takes from one address.
const CONNECTIONS_PER_SOURCE: u64 = 250;
const OPENING_TIME_MAX: Duration = Duration::from_secs(120);

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    server: ServerArguments,
    /// What a success answer promises
    #[arg(long, value_enum, default_value = "durable")]
    ack: Ack,
    /// Connections to hold open
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(100..=60_000))]
    connections: u32,
    /// Per cent of them that are active at a time
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    active: u32,
    /// Requests per second of an active connection
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rate: u32,
    /// Seconds of load
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=3_600))]
    seconds: u32,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let weir = server::binary_path(arguments.server.weir.as_deref())?;
    let connection_count = arguments.connections as usize;
    // The server inherits the limit, and needs as many.
    raise_descriptor_limit(connection_count as u64 + DESCRIPTORS_SPARE)?;
    let cpus = CpuPlan::choose()?;
    let machine = Machine::describe();
    crate::note_shared_cpu(cpus);
    let requests: Vec<Request> = (0..POOL)
        .map(|index| {
            let event = if index % LARGE_EVERY == LARGE_EVERY - 1 {
                event::large_event(SEED, index)
            } else {
                event::small_event(SEED, index)
            };
            Request::single(&event)
        })
        .collect();
    let options = ServerOptions {
        connections_max: Some(connection_count + 16),
        is_spread: true,
        idle: Some("1h"),
        ..ServerOptions::new(&arguments.server, arguments.ack)
    };
    let server = Server::start(&weir, cpus, &options)?;
    let planned = server.planned_bytes()?;
    let client_options = ClientOptions {
        connection_count,
        fresh_connections: false,
        check_answers: true,
        sources: loopback_sources(connection_count as u64, CONNECTIONS_PER_SOURCE),
        tls: None,
    };
    let mut client = Client::new(server.address(), &requests, client_options)?;
    // As many requests as connections, each to the one that waited longest: one each.
    let opened = client.run(&Bounds {
        request_count_max: connection_count as u64,
        in_flight_max: IN_FLIGHT,
        ..Bounds::for_duration(OPENING_TIME_MAX)
    })?;
    opened.require_success().context("opening connections")?;
    ensure!(
        client.open_count() == connection_count,
        "only {} of {connection_count} connections are open",
        client.open_count()
    );

    let active_count = (connection_count * arguments.active as usize / 100).max(1);
    let rate = f64::from(arguments.rate) * active_count as f64;
    let mut total = Outcome::new();
    let mut rss_max = server.sample()?.rss_bytes;
    for turn in 0..arguments.seconds as usize {
        client.activate(active(turn, connection_count, active_count));
        let outcome = client.run(&Bounds {
            rate: Some(rate),
            ..Bounds::for_duration(TURN)
        })?;
        outcome.require_success()?;
        total.add(&outcome);
        rss_max = rss_max.max(server.sample()?.rss_bytes);
    }

    let closed = client.count_closed()?;
    let page = server.metrics()?;
    let value = |name: &str, label: &str| {
        metric_sum(&page, name, label).with_context(|| format!("no {name} in /metrics"))
    };
    ensure!(
        closed == 0 && value("weir_connections", "")? == connection_count as f64,
        "not all connections stayed open"
    );
    let (accepted, answered) = (
        value("weir_requests", "outcome=\"accepted\"")?,
        opened.answered + total.answered,
    );
    ensure!(
        accepted == answered as f64,
        "the server counts {accepted} accepted requests, but answered {answered}"
    );
    drop(client);
    server.stop()?;

    let seconds = total.elapsed.as_secs_f64();
    println!(
        "{connection_count} connections, {active_count} active at a time: {} requests in {seconds:.1} s ({:.0}/s of \
         {rate:.0}/s), none failed",
        total.answered,
        total.answered as f64 / seconds,
    );
    println!(
        "{:<14}{:>10}{:>10}{:>10}{:>10}{:>10}",
        "us", "requests", "p50", "p99", "p99.9", "max"
    );
    let small = total.latency_small();
    let events = [
        ("small events", &small),
        ("large events", &total.latency_large),
    ];
    for (name, latency) in events {
        println!(
            "{name:<14}{:>10}{:>10.0}{:>10.0}{:>10.0}{:>10.0}",
            latency.len(),
            us(latency.value_at_quantile(0.50)),
            us(latency.value_at_quantile(0.99)),
            us(latency.value_at_quantile(0.999)),
            us(latency.max()),
        );
    }
    let passes = rss_max <= planned;
    println!(
        "RSS at most {:.2} MiB, planned {:.2} MiB: {}",
        rss_max as f64 / MIB,
        planned as f64 / MIB,
        if passes { "PASS" } else { "FAIL" }
    );
    let line = json!({
        "measurement": "connections",
        "machine": machine.to_json(),
        "level": arguments.server.level,
        "ack": arguments.ack.name(),
        "connections": connection_count,
        "active": active_count,
        "seconds": arguments.seconds,
        "requests": total.answered,
        "requests_per_second": total.answered as f64 / seconds,
        "requests_per_second_wanted": rate,
        "small": to_json(&small),
        "large": to_json(&total.latency_large),
        "rss_bytes_max": rss_max,
        "planned_bytes": planned,
        "pass": passes,
    });
    println!("{line}");
    Ok(())
}

/// The connections that are active in a turn: those behind the ones before, and from the start again.
fn active(turn: usize, connection_count: usize, active_count: usize) -> Range<usize> {
    let begin = turn % (connection_count / active_count) * active_count;
    begin..begin + active_count
}

fn us(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e3
}

fn to_json(latency: &Histogram<u64>) -> Value {
    json!({
        "requests": latency.len(),
        "p50_us": us(latency.value_at_quantile(0.50)),
        "p99_us": us(latency.value_at_quantile(0.99)),
        "p999_us": us(latency.value_at_quantile(0.999)),
        "max_us": us(latency.max()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_connection_has_its_turn() {
        let turns: Vec<Range<usize>> = (0..4).map(|turn| active(turn, 10, 3)).collect();
        assert_eq!(turns, [0..3, 3..6, 6..9, 0..3]);
        assert_eq!(active(7, 10, 10), 0..10);
    }
}
