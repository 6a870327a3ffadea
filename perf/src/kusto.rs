//! Does delivery keep up, and what does it cost the senders: rows at a steady rate, with and without Kusto behind.
//!
//! The stand-in for Kusto is a process of its own on the client's CPU, as is the client; the reactor has the other to itself.
//! The server's uplink is where it is on a machine with more CPUs than reactors, on the client's; with `--one-cpu` it is
//! behind the reactor on the reactor's.
//! First a server that delivers has the load for the whole time: memory has to stay flat, and every row has to land.
//! Then that one and one that discards its batches take turns of a few seconds, and the latencies of the answers are
//! compared: on a machine that others use, what lies a minute apart is not comparable.
//!
//! The stand-in takes blobs and messages at once but ingests them when the load is over: inflating is the cluster's work,
//! and on the client's CPU it would delay the client, which is no delay of the server's.
//! Sketch: at 200 MB/s of rows and a ratio of 0.15, 30 MB/s go to storage: reading them from memory, and TCP on loopback.
//! The server's own limit is the compressor's (docs/PERFORMANCE.md).
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
const STANDIN_NICE: i32 = 10;
const POOL: u64 = 128;
/// How long the two servers take turns.
const TURN: Duration = Duration::from_secs(5);
const TURN_COUNT: usize = 9;
/// The load is given out in slices of this length, so that the rate is even.
const SLICE: Duration = Duration::from_millis(50);
/// How often memory is read.
const SLICES_PER_READING: u32 = 20;
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the last rows may take to be delivered, and then all of them to land.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(120);
const LAND_TIMEOUT: Duration = Duration::from_secs(600);
const POLL_PAUSE: Duration = Duration::from_millis(100);

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    server: ServerArguments,
    /// Seconds of load on the server that delivers, before the two take turns
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3_600))]
    seconds: u64,
    /// Give the server's reactor and its uplink one CPU for both
    #[arg(long)]
    one_cpu: bool,
    /// Megabytes of rows per second
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    rate: u64,
}

/// What one server came to in one time.
struct Run {
    outcome: Outcome,
    seconds: f64,
    row_bytes: f64,
    rss_early: u64,
    rss_end: u64,
    rss_max: u64,
    rows_in_spool_max: u64,
}

impl Run {
    fn rate(&self) -> f64 {
        self.row_bytes / self.seconds / 1e6
    }

    fn latency_us(&self, quantile: f64) -> f64 {
        self.outcome.latency.value_at_quantile(quantile) as f64 / 1e3
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
        })
    }
}

/// The same quantile of every turn, in order: the median is the figure, the rest says how far to trust it.
fn turns(runs: &[Run], quantile: f64) -> Vec<f64> {
    let mut values: Vec<f64> = runs.iter().map(|run| run.latency_us(quantile)).collect();
    values.sort_by(f64::total_cmp);
    values
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let weir = server::binary_path(arguments.server.weir.as_deref())?;
    let cpus = CpuPlan::choose()?;
    let machine = Machine::describe();
    crate::note_shared_cpu(cpus);
    let requests: Vec<Request> = (0..POOL)
        .map(|index| Request::single(&event::large_event(SEED, index)))
        .collect();
    let options = ServerOptions {
        uplink_apart: !arguments.one_cpu,
        ..ServerOptions::new(&arguments.server, Ack::Durable)
    };
    let time = Duration::from_secs(arguments.seconds);

    let directory = tempfile::Builder::new().prefix("weir-perf-").tempdir()?;
    cpu::pin(cpus.client)?;
    let mut standin = start_standin(&weir, directory.path())?;
    let standin_address = standin.listening(START_TIMEOUT)?;
    let delivering = ServerOptions {
        destination: Destination::Kusto(destination(directory.path())?),
        ..options.clone()
    };
    let delivering = Server::start(&weir, cpus, &delivering)?;
    let whole = load(arguments.rate, time, &delivering, &requests)?;
    println!(
        "delivering {:>7.1} MB/s of rows for {:.0} s: p50 {:.0} µs, p99 {:.0} µs, RSS {:.2} → {:.2} MiB (highest {:.2}), \
         at most {} rows in the spool",
        whole.rate(),
        whole.seconds,
        whole.latency_us(0.50),
        whole.latency_us(0.99),
        whole.rss_early as f64 / MIB,
        whole.rss_end as f64 / MIB,
        whole.rss_max as f64 / MIB,
        whole.rows_in_spool_max,
    );

    let discarding = Server::start(&weir, cpus, &options)?;
    let (mut without, mut with) = (Vec::new(), Vec::new());
    for _ in 0..TURN_COUNT {
        without.push(load(arguments.rate, TURN, &discarding, &requests)?);
        with.push(load(arguments.rate, TURN, &delivering, &requests)?);
    }
    discarding.stop()?;
    let runs = with.iter().chain([&whole]);
    let acknowledged: u64 = runs.map(|run| run.outcome.record_count).sum();
    let delivered_after = delivered(&delivering, acknowledged)?;
    standin.ingest()?;
    landed(standin_address, acknowledged)?;
    let page = delivering.metrics()?;
    delivering.stop()?;
    standin.stop()?;

    for (name, runs) in [("discarding", &without), ("delivering", &with)] {
        let (p50, p99) = (turns(runs, 0.50), turns(runs, 0.99));
        println!(
            "{name} in {TURN_COUNT} turns of {TURN:?}: p50 {:.0} µs, p99 {:.0} µs (of the turns: {:.0} to {:.0})",
            p50[TURN_COUNT / 2],
            p99[TURN_COUNT / 2],
            p99[0],
            p99[TURN_COUNT - 1],
        );
    }
    let quotient = turns(&with, 0.99)[TURN_COUNT / 2] / turns(&without, 0.99)[TURN_COUNT / 2];
    let failures = metric_sum(&page, "weir_delivery_failures", "").unwrap_or_default();
    println!(
        "all {acknowledged} rows landed, the last delivered {:.1} s after their answer; {failures} attempts failed; \
         p99 with delivery is {quotient:.2} of that without",
        delivered_after.as_secs_f64(),
    );
    let each = |runs: &[Run]| -> Vec<Value> { runs.iter().map(Run::to_json).collect() };
    let line = json!({
        "measurement": "kusto",
        "machine": machine.to_json(),
        "level": arguments.server.level,
        "seconds": arguments.seconds,
        "one_cpu": arguments.one_cpu,
        "rate_megabytes_per_second": arguments.rate,
        "whole": whole.to_json(),
        "turns_discarding": each(&without),
        "turns_delivering": each(&with),
        "p99_quotient": quotient,
        "rows": acknowledged,
        "delivered_after_seconds": delivered_after.as_secs_f64(),
        "delivery_failures": failures,
    });
    println!("{line}");
    Ok(())
}

/// Starts the stand-in behind the client in the queue for their CPU.
fn start_standin(weir: &Path, directory: &Path) -> Result<Weir> {
    std::thread::scope(|scope| {
        let starting = scope.spawn(|| {
            // A child inherits what holds for the thread that starts it.
            rustix::process::nice(STANDIN_NICE)?;
            Weir::spawn_standin(weir, directory)
        });
        starting.join().expect("starting does not panic")
    })
}

/// The `[destination]` that the stand-in has left.
fn destination(directory: &Path) -> Result<String> {
    std::fs::read_to_string(directory.join("destination.toml"))
        .context("reading what the stand-in says of itself")
}

/// The same rate for the whole time; where the server does not keep it, the rate it keeps.
fn load(rate: u64, time: Duration, server: &Server, requests: &[Request]) -> Result<Run> {
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
    let per_second = rate as f64 * 1e6 / row_size;
    let mut run = Run {
        outcome: Outcome::new(),
        seconds: 0.0,
        row_bytes: 0.0,
        rss_early: 0,
        rss_end: 0,
        rss_max: 0,
        rows_in_spool_max: 0,
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

/// Waits until weir says that it has delivered every row that it acknowledged.
fn delivered(server: &Server, acknowledged: u64) -> Result<Duration> {
    let start = Instant::now();
    loop {
        let page = server.metrics()?;
        let rows = metric_sum(&page, "weir_delivered_rows", "").unwrap_or_default();
        if rows as u64 == acknowledged {
            return Ok(start.elapsed());
        }
        if start.elapsed() > DELIVERY_TIMEOUT {
            bail!("{rows} rows of {acknowledged} delivered in {DELIVERY_TIMEOUT:?}");
        }
        std::thread::sleep(POLL_PAUSE);
    }
}

/// Waits until the stand-in has as many rows as were acknowledged; more would be duplicates.
fn landed(standin: SocketAddr, acknowledged: u64) -> Result<()> {
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
            return Ok(());
        }
        if start.elapsed() > LAND_TIMEOUT {
            bail!("{rows} rows of {acknowledged} landed in {LAND_TIMEOUT:?}");
        }
        std::thread::sleep(POLL_PAUSE);
    }
}
