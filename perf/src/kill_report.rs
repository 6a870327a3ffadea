//! The `kill` subcommand: runs the rounds of [`weir_perf::kill`] and prints what came of them.
//!
//! Unlike the measurements it judges: a record that was acknowledged and is lost makes the exit code say so.
//! Not here: the rounds themselves, which weir's own tests run too.

use crate::machine::Machine;
use crate::{SEED, server};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;
use weir_perf::kill::{self, Plan, Report, Round};

/// Rounds between two lines of progress.
const PROGRESS_EVERY: u32 = 20;

#[derive(clap::Args)]
pub struct Arguments {
    /// The weir binary; by default the one beside this program
    #[arg(long, value_name = "PATH")]
    weir: Option<PathBuf>,
    /// Times that weir is killed
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rounds: u32,
    /// Of the moments and of what is sent
    #[arg(long, default_value_t = SEED)]
    seed: u64,
    /// Connections that post at the same time
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=48))]
    senders: u16,
    /// The latest moment of a kill, after the start or after the server listens
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(2..=60_000))]
    delay_max_ms: u64,
    /// Where the spool and the destination are; a temporary directory unless said, kept where something is wrong
    #[arg(long, value_name = "PATH")]
    directory: Option<PathBuf>,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let weir = server::binary_path(arguments.weir.as_deref())?;
    let machine = Machine::describe();
    let temporary = tempfile::Builder::new()
        .prefix("weir-kill-")
        .tempdir()
        .context("a temporary directory")?;
    let directory = match &arguments.directory {
        Some(directory) => {
            let is_empty = std::fs::read_dir(directory)
                .with_context(|| directory.display().to_string())?
                .next()
                .is_none();
            ensure!(is_empty, "{} is not empty", directory.display());
            directory.clone()
        }
        None => temporary.path().to_owned(),
    };
    let plan = Plan {
        senders: usize::from(arguments.senders),
        delay_max: Duration::from_millis(arguments.delay_max_ms),
        ..Plan::new(&weir, &directory, arguments.rounds, arguments.seed)
    };
    println!(
        "seed {}, {} rounds, {} senders",
        plan.seed, plan.rounds, plan.senders
    );
    let outcome = kill::run(&plan, print_progress);
    let is_clean = outcome.as_ref().is_ok_and(Report::is_clean);
    if !is_clean {
        // Whoever looks for the reason needs the spool, the blobs and the log.
        let _ = temporary.keep();
        println!("kept: {}", directory.display());
    }
    let report = outcome?;
    print_report(&report);
    println!("{}", to_json(&plan, &machine, &report));
    ensure!(
        is_clean,
        "{} faults; run it again with --seed {}",
        report.verdict.faults.len(),
        plan.seed
    );
    Ok(())
}

fn print_progress(round: &Round) {
    if (round.number + 1).is_multiple_of(PROGRESS_EVERY) {
        println!("{} rounds", round.number + 1);
    }
}

fn print_report(report: &Report) {
    let Report { told, verdict, .. } = report;
    println!(
        "rounds: {}, of which {} killed before weir listened, {} with the destination in the way",
        report.rounds.len(),
        report.rounds_before_listening(),
        report.rounds_obstructed()
    );
    println!(
        "slowest start until it listened: {:.0} ms",
        listened_after_max(report).as_secs_f64() * 1e3
    );
    println!(
        "requests: {} sent; {} acknowledged, {} cut off by a kill, refused: {:?}",
        report.sends, told.acknowledged, told.cut_off, told.refused
    );
    println!(
        "the last weir found {} batches, {} rows, and had delivered all after {:.2} s",
        report.batches_recovered,
        report.rows_recovered,
        report.drained_after.as_secs_f64()
    );
    println!(
        "records: {} acknowledged, of which {} LOST; {} more found whose answer did not come through; {} found more than \
         once, all in requests that were sent more than once unless a fault says otherwise; {} rows in {} blobs",
        verdict.acknowledged,
        verdict.lost,
        verdict.unacknowledged,
        verdict.duplicates,
        verdict.rows,
        verdict.blobs
    );
    for fault in &verdict.faults {
        println!("FAULT: {fault}");
    }
    println!("{}", if report.is_clean() { "PASS" } else { "FAIL" });
}

fn listened_after_max(report: &Report) -> Duration {
    let listened_after = report
        .rounds
        .iter()
        .filter_map(|round| round.listened_after);
    listened_after.max().unwrap_or_default()
}

fn to_json(plan: &Plan, machine: &Machine, report: &Report) -> serde_json::Value {
    let Report { told, verdict, .. } = report;
    json!({
        "measurement": "kill",
        "machine": machine.to_json(),
        "seed": plan.seed,
        "senders": plan.senders,
        "delay_max_ms": plan.delay_max.as_millis() as u64,
        "rounds": report.rounds.len(),
        "rounds_before_listening": report.rounds_before_listening(),
        "rounds_obstructed": report.rounds_obstructed(),
        "listened_after_max_ms": listened_after_max(report).as_millis() as u64,
        "requests_sent": report.sends,
        "requests_acknowledged": told.acknowledged,
        "requests_cut_off": told.cut_off,
        "requests_refused": told.refused,
        "batches_recovered_last": report.batches_recovered,
        "rows_recovered_last": report.rows_recovered,
        "drained_after_ms": report.drained_after.as_millis() as u64,
        "blobs": verdict.blobs,
        "rows": verdict.rows,
        "records_acknowledged": verdict.acknowledged,
        "records_lost": verdict.lost,
        "records_unacknowledged": verdict.unacknowledged,
        "records_duplicate": verdict.duplicates,
        "probes_left": verdict.probes_left,
        "faults": verdict.faults,
        "pass": report.is_clean(),
    })
}
