//! What the front door costs: the same requests over plain HTTP/1.1, over TLS, over HTTP/2, and over both.
//!
//! A server for each speaks on the same CPU, and they take turns. HTTP/1.1 comes over kept-alive connections, HTTP/2
//! over one with many streams. TLS sessions are made before the clock starts and kept.
//!
//! Sketch, per large event of 187 KB: TLS adds 187 KB of AES-GCM, some 40 us at 5 GB/s, and two copies of it, to 400 to
//! 500 us. HTTP/2 adds 12 DATA frames, their copies into the slab, and window updates; and on small events a task, a
//! header block and two frames each way, to 8 us. Both clients cost as much on their own CPU, so their share is printed.
//! Not here: handshakes per second, and several connections of HTTP/2.

use crate::ServerArguments;
use crate::cpu::CpuPlan;
use crate::machine::Machine;
use crate::request::Request;
use crate::server::{self, Ack, ServerOptions};
use crate::side::{Side, Speech, median, median_of};
use crate::throughput::Case;
use crate::transport::Identity;
use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A client that uses more of its CPU than this may have been the limit.
const CLIENT_SHARE_MAX: f64 = 0.90;
/// More than any round sends, so that no connection is renewed within one.
const REQUESTS_PER_CONNECTION: u64 = 1_000_000_000;

/// What is wanted of the large event, as rate / rate.
const WANTED: [(Front, Front, f64); 2] = [
    (Front::Tls, Front::Plain, 0.70),
    (Front::Http2, Front::Plain, 0.60),
];

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Front {
    /// HTTP/1.1 in clear text
    Plain,
    /// HTTP/1.1 over TLS
    Tls,
    /// HTTP/2 in clear text, by prior knowledge
    Http2,
    /// HTTP/2 over TLS
    Http2Tls,
}

impl Front {
    fn name(self) -> &'static str {
        match self {
            Front::Plain => "plain",
            Front::Tls => "tls",
            Front::Http2 => "http2",
            Front::Http2Tls => "http2-tls",
        }
    }

    fn is_tls(self) -> bool {
        matches!(self, Front::Tls | Front::Http2Tls)
    }

    fn is_http2(self) -> bool {
        matches!(self, Front::Http2 | Front::Http2Tls)
    }
}

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    server: ServerArguments,
    /// What a success answer promises
    #[arg(long, value_enum, default_value = "memory")]
    ack: Ack,
    /// Rounds per case; an even number becomes the odd one above
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..=999))]
    rounds: u16,
    /// Milliseconds of a round, per front
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(50..=60_000))]
    round_ms: u64,
    /// Streams on the connection of HTTP/2
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    streams: u16,
    /// Only this case; may be repeated [default: small and large-varied]
    #[arg(long = "case", value_enum)]
    cases: Vec<Case>,
    /// Only this front beside the plain one; may be repeated
    #[arg(long = "front", value_enum)]
    fronts: Vec<Front>,
    /// A file with one JSON event, for the large-real case
    #[arg(long, value_name = "FILE")]
    event: Option<PathBuf>,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let weir = server::binary_path(arguments.server.weir.as_deref())?;
    let cases: &[Case] = match arguments.cases.as_slice() {
        [] => &[Case::Small, Case::LargeVaried],
        cases => cases,
    };
    let mut fronts = vec![Front::Plain];
    for front in Front::value_variants() {
        let is_wanted = arguments.fronts.is_empty() || arguments.fronts.contains(front);
        if is_wanted && *front != Front::Plain {
            fronts.push(*front);
        }
    }
    let cpus = CpuPlan::choose()?;
    let machine = Machine::describe();
    crate::note_shared_cpu(cpus);
    let rounds = arguments.rounds | 1;
    println!(
        "{rounds} rounds of {} ms per front; HTTP/2 is one connection with {} streams",
        arguments.round_ms, arguments.streams
    );
    let mut lines = Vec::new();
    for case in cases {
        let line = measure(*case, &fronts, &weir, cpus, rounds, arguments)
            .with_context(|| format!("case {}", case.name()))?;
        lines.push(line);
    }
    let line = json!({
        "measurement": "front-door",
        "machine": machine.to_json(),
        "level": arguments.server.level,
        "ack": arguments.ack.name(),
        "rounds": rounds,
        "round_ms": arguments.round_ms,
        "streams": arguments.streams,
        "cases": lines,
    });
    println!("{line}");
    Ok(())
}

fn measure(
    case: Case,
    fronts: &[Front],
    weir: &Path,
    cpus: CpuPlan,
    rounds: u16,
    arguments: &Arguments,
) -> Result<serde_json::Value> {
    let requests = case.requests(arguments.event.as_deref())?;
    let mut sides = Vec::new();
    for front in fronts {
        let side = start(*front, case, weir, cpus, &requests, arguments)
            .with_context(|| format!("front {}", front.name()))?;
        sides.push(side);
    }
    for _ in 0..rounds {
        for (front, side) in fronts.iter().zip(&mut sides) {
            side.round(Duration::from_millis(arguments.round_ms))
                .with_context(|| format!("front {}", front.name()))?;
        }
    }

    println!();
    println!(
        "{:<15}{:<11}{:>11}{:>12}{:>8}{:>10}{:>10}{:>10}{:>9}{:>13}",
        "case",
        "front",
        "requests/s",
        "CPU us/req",
        "CPU %",
        "client %",
        "p50 us",
        "p99 us",
        "of plain",
        "of plain CPU"
    );
    let mut notes = Vec::new();
    let mut reports = Vec::new();
    for (front, side) in fronts.iter().zip(&sides) {
        side.check_accepted(&mut notes)
            .with_context(|| format!("front {}", front.name()))?;
        ensure!(
            side.rounds.len() == usize::from(rounds),
            "a round is missing"
        );
        let of_plain = quotient(side, &sides[0], |round| round.seconds_per_request);
        let of_plain_cpu = quotient(side, &sides[0], |round| round.cpu_seconds_per_request);
        let cpu = median_of(&side.rounds, |round| round.cpu_seconds_per_request);
        println!(
            "{:<15}{:<11}{:>11.0}{:>12.2}{:>8.0}{:>10.0}{:>10.0}{:>10.0}{of_plain:>9.3}{of_plain_cpu:>13.3}",
            case.name(),
            front.name(),
            side.rate(),
            cpu * 1e6,
            side.cpu_share() * 100.0,
            side.client_cpu_share() * 100.0,
            side.latency(0.50).as_secs_f64() * 1e6,
            side.latency(0.99).as_secs_f64() * 1e6,
        );
        if side.client_cpu_share() > CLIENT_SHARE_MAX {
            notes.push(format!(
                "{}: the client used {:.0} % of its CPU, so it may have been the limit; read the ratio of CPU times",
                front.name(),
                side.client_cpu_share() * 100.0
            ));
        }
        reports.push(json!({
            "front": front.name(),
            "requests": side.total.answered,
            "requests_per_second": side.rate(),
            "cpu_us": cpu * 1e6,
            "cpu_share": side.cpu_share(),
            "client_cpu_share": side.client_cpu_share(),
            "p50_us": side.latency(0.50).as_secs_f64() * 1e6,
            "p99_us": side.latency(0.99).as_secs_f64() * 1e6,
            "rss_bytes_max": side.rss_max,
            "of_plain": of_plain,
            "of_plain_cpu": of_plain_cpu,
        }));
    }
    let find = |front| fronts.iter().position(|found| *found == front);
    for (front, beside, wanted) in WANTED {
        let (Some(side), Some(beside_side)) = (find(front), find(beside)) else {
            continue;
        };
        if case == Case::Small {
            continue;
        }
        let ratio = quotient(&sides[side], &sides[beside_side], |round| {
            round.seconds_per_request
        });
        println!(
            "{} / {}: {ratio:.3} (at least {wanted:.2}): {}",
            front.name(),
            beside.name(),
            if ratio >= wanted { "PASS" } else { "FAIL" }
        );
    }
    for note in &notes {
        println!("note: {}: {note}", case.name());
    }
    for side in sides {
        side.stop()?;
    }
    Ok(json!({ "case": case.name(), "fronts": reports, "notes": notes }))
}

fn start<'a>(
    front: Front,
    case: Case,
    weir: &Path,
    cpus: CpuPlan,
    requests: &'a [Request],
    arguments: &Arguments,
) -> Result<Side<'a>> {
    let options = ServerOptions {
        tls: front.is_tls().then(Identity::new).transpose()?,
        http2: front.is_http2(),
        requests_per_connection: Some(REQUESTS_PER_CONNECTION),
        ..ServerOptions::new(&arguments.server, arguments.ack)
    };
    let speech = if front.is_http2() {
        Speech::Http2 {
            stream_count: usize::from(arguments.streams),
        }
    } else {
        Speech::Http1 {
            connection_count: usize::from(case.connection_count()),
        }
    };
    Side::start_speaking(weir, cpus, &options, speech, requests)
}

/// The rate of one front over that of another: the median of the rounds' own quotients.
fn quotient(side: &Side<'_>, beside: &Side<'_>, time: impl Fn(&crate::side::Round) -> f64) -> f64 {
    let rounds = side.rounds.iter().zip(&beside.rounds);
    median(
        &mut rounds
            .map(|(round, beside)| time(beside) / time(round))
            .collect::<Vec<_>>(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wanted_is_beside_the_plain_front() {
        for (front, beside, wanted) in WANTED {
            assert_eq!(beside, Front::Plain);
            assert!(front != beside && wanted < 1.0);
        }
        assert!(Front::Http2Tls.is_tls() && Front::Http2Tls.is_http2());
        assert!(!Front::Plain.is_tls() && !Front::Plain.is_http2());
    }
}
