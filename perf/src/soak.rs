//! Does memory stay where it is: many large requests on few connections, then as many on fresh ones.
//!
//! Resident memory is read between slices of the load, while the server has answered everything it was sent.
//! The promise is about the difference between an early reading and the last, not about the level.

use crate::client::{Bounds, Client, ClientOptions, loopback_sources};
use crate::cpu::CpuPlan;
use crate::machine::Machine;
use crate::request::Request;
use crate::server::{self, Ack, Server, ServerOptions};
use crate::{MIB, SEED, ServerArguments};
use anyhow::{Context, Result};
use serde_json::json;
use std::time::Duration;
use weir_perf::event;

const CONNECTIONS: usize = 3;
const POOL: u64 = 128;
/// Readings per phase; the first phase's second one is at 10 % of all requests or later.
const SLICES: u64 = 50;
const DIFFERENCE_MAX: u64 = 1 << 20;
/// A slice that takes longer means a server that hardly answers.
const SLICE_TIME_MAX: Duration = Duration::from_secs(120);
/// Closed connections keep their port for a minute, so one address serves this many of them.
const FRESH_PER_SOURCE: u64 = 4_000;

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    server: ServerArguments,
    /// What a success answer promises
    #[arg(long, value_enum, default_value = "durable")]
    ack: Ack,
    /// Requests per phase: this many kept alive, then as many on fresh connections
    #[arg(long, default_value_t = 50_000, value_parser = clap::value_parser!(u64).range(100..=900_000))]
    requests: u64,
}

/// Resident memory after a number of requests.
#[derive(Clone, Copy)]
struct Reading {
    requests: u64,
    rss_bytes: u64,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let weir = server::binary_path(arguments.server.weir.as_deref())?;
    let cpus = CpuPlan::choose()?;
    let machine = Machine::describe();
    crate::note_shared_cpu(cpus);
    let requests: Vec<Request> = (0..POOL)
        .map(|index| Request::single(&event::large_event(SEED, index)))
        .collect();
    let options = ServerOptions::new(&arguments.server, arguments.ack);
    let server = Server::start(&weir, cpus, &options)?;
    let at_start = server.sample()?.rss_bytes;
    println!("RSS at start: {:.2} MiB", at_start as f64 / MIB);

    let mut readings = Vec::new();
    for fresh_connections in [false, true] {
        let phase = if fresh_connections {
            "fresh connections"
        } else {
            "kept-alive connections"
        };
        let options = ClientOptions {
            connection_count: CONNECTIONS,
            fresh_connections,
            check_answers: true,
            sources: if fresh_connections {
                loopback_sources(arguments.requests, FRESH_PER_SOURCE)
            } else {
                Vec::new()
            },
            tls: None,
        };
        let mut client = Client::new(server.address(), &requests, options)?;
        for slice in slices(arguments.requests) {
            let bounds = Bounds {
                request_count_max: slice,
                duration_max: SLICE_TIME_MAX,
                in_flight_max: usize::MAX,
                rate: None,
            };
            let outcome = client.run(&bounds)?;
            outcome.require_success().context(phase)?;
            anyhow::ensure!(
                outcome.answered == slice,
                "{phase}: {} of {slice} requests in {SLICE_TIME_MAX:?}",
                outcome.answered
            );
            let before = readings
                .last()
                .map_or(0, |reading: &Reading| reading.requests);
            readings.push(Reading {
                requests: before + slice,
                rss_bytes: server.sample()?.rss_bytes,
            });
        }
        if let Some(last) = readings.last() {
            println!(
                "RSS after {} requests ({phase}): {:.2} MiB",
                last.requests,
                last.rss_bytes as f64 / MIB
            );
        }
    }
    server.stop()?;

    let total = 2 * arguments.requests;
    let verdict = judge(&readings, total).context("no readings")?;
    println!(
        "RSS after the first 10 % ({} requests): {:.2} MiB; at the end: {:.2} MiB; highest: {:.2} MiB",
        verdict.early.requests,
        verdict.early.rss_bytes as f64 / MIB,
        verdict.last.rss_bytes as f64 / MIB,
        verdict.rss_max as f64 / MIB
    );
    println!(
        "difference: {:.3} MiB (at most {:.0} MiB): {}",
        verdict.difference as f64 / MIB,
        DIFFERENCE_MAX as f64 / MIB,
        if verdict.passes() { "PASS" } else { "FAIL" }
    );
    let line = json!({
        "measurement": "soak",
        "machine": machine.to_json(),
        "level": arguments.server.level,
        "ack": arguments.ack.name(),
        "requests": total,
        "rss_bytes_start": at_start,
        "rss_bytes_early": verdict.early.rss_bytes,
        "rss_bytes_end": verdict.last.rss_bytes,
        "rss_bytes_max": verdict.rss_max,
        "difference_bytes": verdict.difference,
        "pass": verdict.passes(),
    });
    println!("{line}");
    Ok(())
}

/// Slice sizes that add up to `requests`, as even as they go.
fn slices(requests: u64) -> impl Iterator<Item = u64> {
    (0..SLICES).map(move |slice| requests * (slice + 1) / SLICES - requests * slice / SLICES)
}

struct Verdict {
    early: Reading,
    last: Reading,
    rss_max: u64,
    difference: u64,
}

impl Verdict {
    fn passes(&self) -> bool {
        self.difference <= DIFFERENCE_MAX
    }
}

/// Compares the first reading at or after a tenth of all requests with the last. The highest counts from there on.
fn judge(readings: &[Reading], total: u64) -> Option<Verdict> {
    let first = readings
        .iter()
        .position(|reading| reading.requests * 10 >= total)?;
    let early = readings[first];
    let last = *readings.last()?;
    Some(Verdict {
        early,
        last,
        rss_max: readings[first..]
            .iter()
            .map(|reading| reading.rss_bytes)
            .max()?,
        difference: last.rss_bytes.abs_diff(early.rss_bytes),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_add_up_and_meet_the_tenth() {
        for requests in [100, 101, 50_000, 77_777] {
            assert_eq!(slices(requests).sum::<u64>(), requests);
        }
        // A tenth of both phases is a fifth of the first.
        assert_eq!(slices(50_000).take(10).sum::<u64>(), 10_000);
    }

    #[test]
    fn growth_is_judged_from_the_first_tenth_on() {
        let readings = |rss: [u64; 4]| -> Vec<Reading> {
            [50, 100, 500, 1_000]
                .into_iter()
                .zip(rss)
                .map(|(requests, rss_bytes)| Reading {
                    requests,
                    rss_bytes,
                })
                .collect()
        };
        let flat = judge(&readings([1, 70 << 20, 71 << 20, 71 << 20]), 1_000).expect("readings");
        assert_eq!(flat.early.requests, 100);
        assert_eq!((flat.difference, flat.rss_max), (1 << 20, 71 << 20));
        assert!(flat.passes());
        let growing =
            judge(&readings([1, 70 << 20, 71 << 20, (71 << 20) + 1]), 1_000).expect("readings");
        assert!(!growing.passes());
        assert!(judge(&[], 1_000).is_none());
    }
}
