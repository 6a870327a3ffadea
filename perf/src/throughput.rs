//! How fast, and how close to what the kernel and the compressor alone cost.
//!
//! Per case: three servers on the same CPU take turns with the compressor alone (floor B) in short rounds: one that
//! only receives (floor A), one that does the work and answers from memory, and one that answers when the rows are
//! durable. A machine that slows down for a second slows all of them, so each round is compared with itself and the
//! median of the rounds is reported.
//!
//! `ideal = time(A) + time(B)` per request; `efficiency = ideal / actual`, where actual is the server that answers from
//! memory; what durability costs is the quotient of the two that do the work.
//! Not here: memory over time; see `soak`.

use crate::cpu::{self, CpuPlan};
use crate::durable::{self, Comparison, Durable};
use crate::floor_b::FloorB;
use crate::machine::Machine;
use crate::request::Request;
use crate::server::{self, Ack, Commits, ServerOptions};
use crate::side::{Side, median, median_of};
use crate::{MIB, SEED, ServerArguments};
use anyhow::{Context, Result};
use clap::ValueEnum;
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use weir_perf::event;

/// Rounds per case. Odd, so that the median is a round that happened.
const ROUNDS: usize = 5;
/// Time of floor B per case, over all rounds.
const FLOOR_B_TIME: Duration = Duration::from_secs(2);
/// Below this share of its CPU the server was waiting for the client.
const BUSY_MIN: f64 = 0.90;

const LARGE_VARIED_POOL: u64 = 128;
const SMALL_POOL: u64 = 8_192;
const NDJSON_POOL: u64 = 64;

/// The sample event, where a checkout has it beside it.
const SAMPLE_PATH: &str = "../shared/data/sample_trigger.json";

#[derive(clap::Args, Clone)]
pub struct Arguments {
    #[command(flatten)]
    server: ServerArguments,
    /// Measured time per case and server
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3_600))]
    seconds: u64,
    /// Kept-alive connections [default: 16; 64 for the small case]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=20_000))]
    connections: Option<u16>,
    /// Only this case; may be repeated
    #[arg(long = "case", value_enum)]
    cases: Vec<Case>,
    /// A file with one JSON event, for the large-real case
    #[arg(long, value_name = "FILE")]
    event: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Case {
    /// One generated large event again and again
    LargeRepeated,
    /// 128 generated large events in turn
    LargeVaried,
    /// A real large event from a file, again and again
    LargeReal,
    /// Small events, one per request
    Small,
    /// 1,000 varied small events per request
    Ndjson,
}

impl Case {
    pub fn name(self) -> &'static str {
        match self {
            Case::LargeRepeated => "large-repeated",
            Case::LargeVaried => "large-varied",
            Case::LargeReal => "large-real",
            Case::Small => "small",
            Case::Ndjson => "ndjson",
        }
    }

    pub fn connection_count(self) -> u16 {
        match self {
            Case::Small => 64,
            _ => 16,
        }
    }

    pub fn requests(self, event_path: Option<&Path>) -> Result<Vec<Request>> {
        Ok(match self {
            Case::LargeRepeated => vec![Request::single(&event::large_event(SEED, 0))],
            Case::LargeVaried => (0..LARGE_VARIED_POOL)
                .map(|index| Request::single(&event::large_event(SEED, index)))
                .collect(),
            Case::LargeReal => {
                let path = event_path.context("large-real needs --event FILE")?;
                let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
                vec![Request::single(text.trim())]
            }
            Case::Small => (0..SMALL_POOL)
                .map(|index| Request::single(&event::small_event(SEED, index)))
                .collect(),
            Case::Ndjson => (0..NDJSON_POOL)
                .map(|index| Request::lines(&event::ndjson(SEED, index, event::NDJSON_LINES)))
                .collect(),
        })
    }
}

/// The numbers of one case. Times are seconds per request, medians over the rounds.
struct Report {
    case: &'static str,
    connection_count: u16,
    requests: u64,
    requests_per_second: f64,
    events_per_second: f64,
    body_bytes_per_second: f64,
    actual: f64,
    actual_cpu: f64,
    cpu_share: f64,
    latency_p50: Duration,
    latency_p99: Duration,
    floor_a: f64,
    floor_a_cpu: f64,
    floor_a_cpu_share: f64,
    floor_b: f64,
    efficiency: f64,
    /// The same quotient in CPU time, which neither a slow client nor a busy machine distorts.
    efficiency_cpu: f64,
    rss_max: u64,
    durable: Durable,
    notes: Vec<String>,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let weir = server::binary_path(arguments.server.weir.as_deref())?;
    let sample = Path::new(SAMPLE_PATH);
    let event_path = match &arguments.event {
        Some(path) => Some(path.as_path()),
        None => Some(sample).filter(|path| path.is_file()),
    };
    let cases: Vec<Case> = if arguments.cases.is_empty() {
        Case::value_variants()
            .iter()
            .copied()
            .filter(|case| *case != Case::LargeReal || event_path.is_some())
            .collect()
    } else {
        arguments.cases.clone()
    };
    let cpus = CpuPlan::choose()?;
    let machine = Machine::describe();
    println!(
        "{} ({} CPUs), {}, {}",
        machine.cpu_model, machine.cpu_count, machine.kernel, machine.date
    );
    println!(
        "server on CPU {}, client on CPU {}, level {}, {} s per case and server in {ROUNDS} rounds",
        cpus.server, cpus.client, arguments.server.level, arguments.seconds
    );
    crate::note_shared_cpu(cpus);

    let mut reports = Vec::new();
    for case in cases {
        let report = measure(case, &weir, cpus, event_path, arguments)
            .with_context(|| format!("case {}", case.name()))?;
        reports.push(report);
    }
    print_tables(&reports);
    let line = json!({
        "measurement": "throughput",
        "machine": machine.to_json(),
        "level": arguments.server.level,
        "seconds": arguments.seconds,
        "rounds": ROUNDS,
        "destination": format!("{:?}", arguments.server.destination).to_lowercase(),
        "spool_size": arguments.server.spool_size,
        "server_cpu": cpus.server,
        "client_cpu": cpus.client,
        "cases": reports.iter().map(Report::to_json).collect::<Vec<_>>(),
    });
    println!("{line}");
    Ok(())
}

fn measure(
    case: Case,
    weir: &Path,
    cpus: CpuPlan,
    event_path: Option<&Path>,
    arguments: &Arguments,
) -> Result<Report> {
    let requests = case.requests(event_path)?;
    let connection_count = arguments.connections.unwrap_or(case.connection_count());
    let options = ServerOptions {
        connections_max: Some(usize::from(connection_count) + 64)
            .filter(|_| arguments.connections.is_some()),
        ..ServerOptions::new(&arguments.server, Ack::Memory)
    };
    let floor_options = ServerOptions {
        floor_receive: true,
        ..options.clone()
    };
    let durable_options = ServerOptions {
        ack: Ack::Durable,
        ..options.clone()
    };
    let connections = usize::from(connection_count);
    let mut actual = Side::start(weir, cpus, &options, connections, &requests)?;
    let mut floor_a = Side::start(weir, cpus, &floor_options, connections, &requests)
        .context("floor A (--floor-receive)")?;
    let mut durable = Side::start(weir, cpus, &durable_options, connections, &requests)
        .context("ack = \"durable\"")?;
    cpu::pin(cpus.server)?;
    let mut floor_b = FloorB::new(arguments.server.level, &requests)?;
    cpu::pin(cpus.client)?;

    let round_time = Duration::from_secs(arguments.seconds) / ROUNDS as u32;
    let mut floor_b_rounds = Vec::new();
    let mut efficiencies = Vec::new();
    let mut efficiencies_cpu = Vec::new();
    let mut ratios = Vec::new();
    let mut ratios_cpu = Vec::new();
    let commits_before = Commits::of(&durable.server.metrics()?)?;
    for _ in 0..ROUNDS {
        let a = floor_a
            .round(round_time)
            .context("floor A (--floor-receive)")?;
        let measured = actual.round(round_time)?;
        let synced = durable.round(round_time).context("ack = \"durable\"")?;
        // The servers wait for requests now, so their CPU is free.
        cpu::pin(cpus.server)?;
        let b = floor_b.measure(FLOOR_B_TIME / ROUNDS as u32)?;
        cpu::pin(cpus.client)?;
        floor_b_rounds.push(b.seconds);
        efficiencies.push((a.seconds_per_request + b.seconds) / measured.seconds_per_request);
        efficiencies_cpu
            .push((a.cpu_seconds_per_request + b.cpu_seconds) / measured.cpu_seconds_per_request);
        ratios.push(measured.seconds_per_request / synced.seconds_per_request);
        ratios_cpu.push(measured.cpu_seconds_per_request / synced.cpu_seconds_per_request);
    }
    let commits = Commits::of(&durable.server.metrics()?)?.since(commits_before);

    let mut notes = Vec::new();
    for (side, what) in [
        (&actual, "actual"),
        (&floor_a, "floor A"),
        (&durable, "durable"),
    ] {
        // A durable server may well wait: for its disk. The table has its share.
        if what != "durable" && side.cpu_share() < BUSY_MIN {
            notes.push(format!(
                "{what}: the server used {:.0} % of its CPU, so the client or the machine was the limit",
                side.cpu_share() * 100.0
            ));
        }
        let elsewhere = side.server.threads_elsewhere(cpus.server)?;
        if !elsewhere.is_empty() {
            notes.push(format!(
                "{what}: threads not confined to the server's CPU: {}",
                elsewhere.join(", ")
            ));
        }
    }
    actual.check_accepted(&mut notes)?;
    durable
        .check_accepted(&mut notes)
        .context("ack = \"durable\"")?;

    let total = &actual.total;
    let seconds = total.elapsed.as_secs_f64();
    let report = Report {
        case: case.name(),
        connection_count,
        requests: total.answered,
        requests_per_second: actual.rate(),
        events_per_second: total.record_count as f64 / seconds,
        body_bytes_per_second: total.body_bytes as f64 / seconds,
        actual: median_of(&actual.rounds, |round| round.seconds_per_request),
        actual_cpu: median_of(&actual.rounds, |round| round.cpu_seconds_per_request),
        cpu_share: actual.cpu_share(),
        latency_p50: actual.latency(0.50),
        latency_p99: actual.latency(0.99),
        floor_a: median_of(&floor_a.rounds, |round| round.seconds_per_request),
        floor_a_cpu: median_of(&floor_a.rounds, |round| round.cpu_seconds_per_request),
        floor_a_cpu_share: floor_a.cpu_share(),
        floor_b: median(&mut floor_b_rounds),
        efficiency: median(&mut efficiencies),
        efficiency_cpu: median(&mut efficiencies_cpu),
        rss_max: actual.rss_max,
        durable: Durable {
            requests: durable.total.answered,
            requests_per_second: durable.rate(),
            ratio: median(&mut ratios),
            ratio_cpu: median(&mut ratios_cpu),
            cpu: median_of(&durable.rounds, |round| round.cpu_seconds_per_request),
            cpu_share: durable.cpu_share(),
            latency_p50: durable.latency(0.50),
            latency_p99: durable.latency(0.99),
            commits,
            commits_per_second: commits.count / durable.total.elapsed.as_secs_f64(),
            rss_max: durable.rss_max,
        },
        notes,
    };
    durable.stop()?;
    floor_a.stop()?;
    actual.stop()?;
    Ok(report)
}

fn print_tables(reports: &[Report]) {
    println!();
    println!(
        "{:<15}{:>12}{:>12}{:>10}{:>12}{:>8}{:>11}{:>11}{:>9}",
        "case",
        "requests/s",
        "events/s",
        "MB/s in",
        "CPU us/req",
        "CPU %",
        "p50 us",
        "p99 us",
        "RSS MiB"
    );
    for report in reports {
        println!(
            "{:<15}{:>12.0}{:>12.0}{:>10.1}{:>12.2}{:>8.0}{:>11.0}{:>11.0}{:>9.1}",
            report.case,
            report.requests_per_second,
            report.events_per_second,
            report.body_bytes_per_second / 1e6,
            report.actual_cpu * 1e6,
            report.cpu_share * 100.0,
            report.latency_p50.as_secs_f64() * 1e6,
            report.latency_p99.as_secs_f64() * 1e6,
            report.rss_max as f64 / MIB
        );
    }
    println!();
    println!(
        "{:<15}{:>11}{:>11}{:>11}{:>11}{:>12}{:>18}",
        "us per request", "floor A", "floor B", "ideal", "actual", "efficiency", "efficiency (CPU)"
    );
    for report in reports {
        println!(
            "{:<15}{:>11.2}{:>11.2}{:>11.2}{:>11.2}{:>12.2}{:>18.2}",
            report.case,
            report.floor_a * 1e6,
            report.floor_b * 1e6,
            report.ideal() * 1e6,
            report.actual * 1e6,
            report.efficiency,
            report.efficiency_cpu
        );
    }
    let comparisons: Vec<Comparison> = reports
        .iter()
        .map(|report| Comparison {
            case: report.case,
            memory_requests_per_second: report.requests_per_second,
            memory_latency_p50: report.latency_p50,
            memory_latency_p99: report.latency_p99,
            durable: &report.durable,
        })
        .collect();
    durable::print_tables(&comparisons);
    for report in reports {
        for note in &report.notes {
            println!("note: {}: {note}", report.case);
        }
    }
    println!();
}

impl Report {
    fn ideal(&self) -> f64 {
        self.floor_a + self.floor_b
    }

    fn to_json(&self) -> serde_json::Value {
        json!({
            "case": self.case,
            "connections": self.connection_count,
            "requests": self.requests,
            "requests_per_second": self.requests_per_second,
            "events_per_second": self.events_per_second,
            "body_bytes_per_second": self.body_bytes_per_second,
            "actual_us": self.actual * 1e6,
            "actual_cpu_us": self.actual_cpu * 1e6,
            "cpu_share": self.cpu_share,
            "latency_p50_us": self.latency_p50.as_secs_f64() * 1e6,
            "latency_p99_us": self.latency_p99.as_secs_f64() * 1e6,
            "floor_a_us": self.floor_a * 1e6,
            "floor_a_cpu_us": self.floor_a_cpu * 1e6,
            "floor_a_cpu_share": self.floor_a_cpu_share,
            "floor_b_us": self.floor_b * 1e6,
            "ideal_us": self.ideal() * 1e6,
            "efficiency": self.efficiency,
            "efficiency_cpu": self.efficiency_cpu,
            "rss_bytes_max": self.rss_max,
            "durable": self.durable.to_json(),
            "notes": self.notes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_case_sends_what_its_name_says() {
        let repeated = Case::LargeRepeated.requests(None).expect("generated");
        assert_eq!(repeated.len(), 1);
        assert!(repeated[0].body_size > 186_000);
        let varied = Case::LargeVaried.requests(None).expect("generated");
        assert_eq!(varied.len() as u64, LARGE_VARIED_POOL);
        assert_ne!(varied[0].rows, varied[1].rows);
        let ndjson = Case::Ndjson.requests(None).expect("generated");
        assert_eq!(ndjson[0].record_count as usize, event::NDJSON_LINES);
        assert!(Case::LargeReal.requests(None).is_err());
    }
}
