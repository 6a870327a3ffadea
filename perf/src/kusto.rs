//! Does delivery keep up, and what does it cost the senders: rows at a steady rate, with and without Kusto behind.
//!
//! The stand-in for Kusto is a process of its own on the client's CPU, as is the client; the server has its CPU to itself,
//! delivery included. Two servers take the same load one after the other: one discards its batches, one delivers them.
//! What is compared is the latency of the answers; what must hold is that every row lands and memory stays flat.
//!
//! Sketch: at 200 MB/s of rows and a ratio of 0.15, 30 MB/s go to storage: reading them from memory, TCP on loopback, and
//! the stand-in's inflating on the other CPU. The server's own limit is the compressor's (docs/PERFORMANCE.md).
//! Not here: TLS, which the stand-in does not speak.

use crate::client::{Bounds, Client, ClientOptions, Outcome};
use crate::cpu::{self, CpuPlan};
use crate::machine::Machine;
use crate::request::Request;
use crate::server::{self, Ack, Destination, Server, ServerOptions};
use crate::{MIB, SEED, ServerArguments};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};
use weir_perf::child::{Weir, metric_sum, page};
use weir_perf::event;

const CONNECTIONS: usize = 8;
const POOL: u64 = 128;
/// The load is given out in slices of this length, so that the rate is even.
const SLICE: Duration = Duration::from_millis(50);
/// How often memory is read.
const SLICES_PER_READING: u32 = 20;
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the last rows may take to land.
const LAND_TIMEOUT: Duration = Duration::from_secs(120);
const POLL_PAUSE: Duration = Duration::from_millis(100);

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    server: ServerArguments,
    /// Seconds of load on each of the two servers
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3_600))]
    seconds: u64,
    /// Megabytes of rows per second
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    rate: u64,
}

/// What one server came to.
struct Run {
    outcome: Outcome,
    seconds: f64,
    row_bytes: f64,
    rss_early: u64,
    rss_end: u64,
    rss_max: u64,
    rows_in_spool_max: u64,
    /// From the last answer until every row had landed.
    landed_after: Option<Duration>,
}

impl Run {
    fn rate(&self) -> f64 {
        self.row_bytes / self.seconds / 1e6
    }

    fn latency_us(&self, quantile: f64) -> f64 {
        self.outcome.latency.value_at_quantile(quantile) as f64 / 1e3
    }

    fn line(&self, name: &str) {
        println!(
            "{name:<10} {:>7.1} MB/s of rows  p50 {:>7.0} µs  p99 {:>7.0} µs  RSS {:.2} → {:.2} MiB (highest {:.2})  \
             rows waiting at most {}",
            self.rate(),
            self.latency_us(0.50),
            self.latency_us(0.99),
            self.rss_early as f64 / MIB,
            self.rss_end as f64 / MIB,
            self.rss_max as f64 / MIB,
            self.rows_in_spool_max,
        );
    }

    fn to_json(&self) -> Value {
        json!({
            "requests": self.outcome.answered,
            "row_megabytes_per_second": self.rate(),
            "p50_us": self.latency_us(0.50),
            "p99_us": self.latency_us(0.99),
            "p999_us": self.latency_us(0.999),
            "rss_bytes_early": self.rss_early,
            "rss_bytes_end": self.rss_end,
            "rss_bytes_max": self.rss_max,
            "rows_in_spool_max": self.rows_in_spool_max,
            "landed_after_seconds": self.landed_after.map(|after| after.as_secs_f64()),
        })
    }
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let weir = server::binary_path(arguments.server.weir.as_deref())?;
    let cpus = CpuPlan::choose()?;
    let machine = Machine::describe();
    crate::note_shared_cpu(cpus);
    let requests: Vec<Request> = (0..POOL)
        .map(|index| Request::single(&event::large_event(SEED, index)))
        .collect();
    let options = ServerOptions::new(&arguments.server, Ack::Durable);

    let server = Server::start(&weir, cpus, &options)?;
    let without = load(arguments, &server, &requests)?;
    server.stop()?;
    without.line("discarded");

    let directory = tempfile::Builder::new().prefix("weir-perf-").tempdir()?;
    cpu::pin(cpus.client)?;
    let mut standin = Weir::spawn_standin(&weir, directory.path())?;
    let standin_address = standin.listening(START_TIMEOUT)?;
    let options = ServerOptions {
        destination: Destination::Kusto(destination(directory.path())?),
        ..options
    };
    let server = Server::start(&weir, cpus, &options)?;
    let mut with = load(arguments, &server, &requests)?;
    with.landed_after = Some(landed(standin_address, with.outcome.record_count)?);
    let page = server.metrics()?;
    server.stop()?;
    standin.stop()?;
    with.line("delivered");

    let failures = metric_sum(&page, "weir_delivery_failures", "").unwrap_or_default();
    println!(
        "all {} rows landed, the last {:.1} s after their answer; {failures} attempts failed; p99 with delivery is {:.2} \
         of that without",
        with.outcome.record_count,
        with.landed_after.unwrap_or_default().as_secs_f64(),
        with.latency_us(0.99) / without.latency_us(0.99),
    );
    let line = json!({
        "measurement": "kusto",
        "machine": machine.to_json(),
        "level": arguments.server.level,
        "seconds": arguments.seconds,
        "rate_megabytes_per_second": arguments.rate,
        "discarded": without.to_json(),
        "delivered": with.to_json(),
        "delivery_failures": failures,
    });
    println!("{line}");
    Ok(())
}

/// The `[destination]` that the stand-in has left.
fn destination(directory: &Path) -> Result<String> {
    std::fs::read_to_string(directory.join("destination.toml"))
        .context("reading what the stand-in says of itself")
}

/// The same rate for the whole time; where the server does not keep it, the rate it keeps.
fn load(arguments: &Arguments, server: &Server, requests: &[Request]) -> Result<Run> {
    let options = ClientOptions {
        connection_count: CONNECTIONS,
        fresh_connections: false,
        check_answers: true,
        sources: Vec::new(),
        tls: None,
    };
    let mut client = Client::new(server.address(), requests, options)?;
    let row_size = requests
        .iter()
        .map(|request| request.rows.len())
        .sum::<usize>() as f64
        / requests.len() as f64;
    let per_second = arguments.rate as f64 * 1e6 / row_size;
    let time = Duration::from_secs(arguments.seconds);
    let mut run = Run {
        outcome: Outcome::new(),
        seconds: 0.0,
        row_bytes: 0.0,
        rss_early: 0,
        rss_end: 0,
        rss_max: 0,
        rows_in_spool_max: 0,
        landed_after: None,
    };
    let start = Instant::now();
    let mut started = 0_u64;
    for slice in 1_u32.. {
        let elapsed = SLICE * slice;
        let due = (per_second * elapsed.as_secs_f64()) as u64;
        let bounds = Bounds {
            request_count_max: due.saturating_sub(started),
            duration_max: time,
            in_flight_max: usize::MAX,
            rate: None,
        };
        if bounds.request_count_max > 0 {
            let outcome = client.run(&bounds)?;
            outcome.require_success()?;
            started += outcome.answered;
            run.outcome.add(&outcome);
        }
        if slice % SLICES_PER_READING == 0 || elapsed >= time {
            let rss = server.sample()?.rss_bytes;
            let page = server.metrics()?;
            let waiting = metric_sum(&page, "weir_rows_in_spool", "").unwrap_or_default() as u64;
            if start.elapsed() * 10 < time || run.rss_early == 0 {
                run.rss_early = rss;
            }
            run.rss_end = rss;
            run.rss_max = run.rss_max.max(rss);
            run.rows_in_spool_max = run.rows_in_spool_max.max(waiting);
        }
        if start.elapsed() >= time {
            break;
        }
        std::thread::sleep(elapsed.saturating_sub(start.elapsed()));
    }
    run.seconds = start.elapsed().as_secs_f64();
    run.row_bytes = run.outcome.answered as f64 * row_size;
    Ok(run)
}

/// Waits until the stand-in has as many rows as were acknowledged; more would be duplicates.
fn landed(standin: SocketAddr, acknowledged: u64) -> Result<Duration> {
    let start = Instant::now();
    loop {
        let state: Value = serde_json::from_str(&page(standin, "/state")?)?;
        let tables = state["tables"].as_array().context("no tables in /state")?;
        let rows: u64 = tables
            .iter()
            .filter_map(|table| table["rows"].as_u64())
            .sum();
        let violations = &state["violations"];
        ensure!(
            violations.as_array().is_some_and(Vec::is_empty),
            "the stand-in saw violations: {violations}"
        );
        ensure!(
            rows <= acknowledged,
            "{rows} rows landed, {acknowledged} were acknowledged"
        );
        if rows == acknowledged {
            return Ok(start.elapsed());
        }
        if start.elapsed() > LAND_TIMEOUT {
            bail!("{rows} rows of {acknowledged} landed in {LAND_TIMEOUT:?}");
        }
        std::thread::sleep(POLL_PAUSE);
    }
}
