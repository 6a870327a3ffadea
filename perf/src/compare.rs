//! What a change costs: two binaries on the same CPU, in turn, round by round.
//!
//! Both run at the same time, and who is first in a round alternates. Each round gives the quotient of the two times
//! per request; the median says what the change costs, and the quartiles how far that can be believed: the machine's own
//! changes from one round to the next are in them.
//! Not here: floors; see `throughput`.

use crate::ServerArguments;
use crate::cpu::CpuPlan;
use crate::machine::Machine;
use crate::server::{self, Ack, ServerOptions};
use crate::side::Side;
use crate::throughput::Case;
use anyhow::{Context, Result};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Duration;

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    server: ServerArguments,
    /// The weir binary without the change; the one with it is that of --weir
    #[arg(long, value_name = "PATH")]
    before: PathBuf,
    /// What a success answer promises
    #[arg(long, value_enum, default_value = "memory")]
    ack: Ack,
    /// Rounds per case; an even number becomes the odd one above
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u16).range(1..=999))]
    rounds: u16,
    /// Milliseconds of a round, per binary
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(50..=60_000))]
    round_ms: u64,
    /// Only this case; may be repeated [default: small and large-varied]
    #[arg(long = "case", value_enum)]
    cases: Vec<Case>,
    /// A file with one JSON event, for the large-real case
    #[arg(long, value_name = "FILE")]
    event: Option<PathBuf>,
}

/// Quotients after / before of all rounds, in order.
struct Quotients(Vec<f64>);

impl Quotients {
    fn new(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Quotients(values)
    }

    /// The value below which this many quarters of the rounds are.
    fn quartile(&self, quarters: usize) -> f64 {
        self.0[(self.0.len() - 1) * quarters / 4]
    }

    fn text(&self) -> String {
        let [low, middle, high] = [1, 2, 3].map(|quarters| self.quartile(quarters));
        format!("{middle:.4} ({low:.4} to {high:.4})")
    }

    fn to_json(&self) -> serde_json::Value {
        json!({
            "median": self.quartile(2),
            "quartiles": [self.quartile(1), self.quartile(3)],
            "range": [self.quartile(0), self.quartile(4)],
        })
    }
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let before = server::binary_path(Some(&arguments.before))?;
    let after = server::binary_path(arguments.server.weir.as_deref())?;
    let cases: &[Case] = match arguments.cases.as_slice() {
        [] => &[Case::Small, Case::LargeVaried],
        cases => cases,
    };
    let cpus = CpuPlan::choose()?;
    let machine = Machine::describe();
    crate::note_shared_cpu(cpus);
    let rounds = arguments.rounds | 1;
    println!(
        "after / before in time per request, {rounds} rounds of {} ms each: median (quartiles)",
        arguments.round_ms
    );
    println!(
        "{:<15}{:>12}{:>12}{:>8}{:>10}{:>28}{:>28}",
        "case", "before/s", "after/s", "CPU %", "client %", "elapsed", "CPU"
    );
    let mut lines = Vec::new();
    for case in cases {
        let line = measure(*case, [&before, &after], cpus, rounds, arguments)
            .with_context(|| format!("case {}", case.name()))?;
        lines.push(line);
    }
    let line = json!({
        "measurement": "compare",
        "machine": machine.to_json(),
        "level": arguments.server.level,
        "ack": arguments.ack.name(),
        "rounds": rounds,
        "round_ms": arguments.round_ms,
        "cases": lines,
    });
    println!("{line}");
    Ok(())
}

fn measure(
    case: Case,
    binaries: [&Path; 2],
    cpus: CpuPlan,
    rounds: u16,
    arguments: &Arguments,
) -> Result<serde_json::Value> {
    let requests = case.requests(arguments.event.as_deref())?;
    let options = ServerOptions::new(&arguments.server, arguments.ack);
    let connections = usize::from(case.connection_count());
    let start = |weir| Side::start(weir, cpus, &options, connections, &requests);
    let mut before = start(binaries[0]).context("the binary before")?;
    let mut after = start(binaries[1]).context("the binary after")?;
    let round_time = Duration::from_millis(arguments.round_ms);
    let mut elapsed = Vec::new();
    let mut cpu = Vec::new();
    for index in 0..rounds {
        let (old, new) = if index % 2 == 0 {
            let old = before.round(round_time)?;
            (old, after.round(round_time)?)
        } else {
            let new = after.round(round_time)?;
            (before.round(round_time)?, new)
        };
        elapsed.push(new.seconds_per_request / old.seconds_per_request);
        cpu.push(new.cpu_seconds_per_request / old.cpu_seconds_per_request);
    }
    let (elapsed, cpu) = (Quotients::new(elapsed), Quotients::new(cpu));
    let mut notes = Vec::new();
    for side in [&before, &after] {
        side.check_accepted(&mut notes)?;
    }
    println!(
        "{:<15}{:>12.0}{:>12.0}{:>8.0}{:>10.0}{:>28}{:>28}",
        case.name(),
        before.rate(),
        after.rate(),
        after.cpu_share() * 100.0,
        after.client_cpu_share() * 100.0,
        elapsed.text(),
        cpu.text(),
    );
    for note in &notes {
        println!("note: {}: {note}", case.name());
    }
    let line = json!({
        "case": case.name(),
        "requests_per_second_before": before.rate(),
        "requests_per_second_after": after.rate(),
        "cpu_share_after": after.cpu_share(),
        "client_cpu_share_after": after.client_cpu_share(),
        "elapsed_quotient": elapsed.to_json(),
        "cpu_quotient": cpu.to_json(),
        "notes": notes,
    });
    before.stop()?;
    after.stop()?;
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_are_rounds_that_happened() {
        let quotients = Quotients::new(vec![1.4, 1.0, 1.1, 0.9, 1.2]);
        let quartiles = [0, 1, 2, 3, 4].map(|quarters| quotients.quartile(quarters));
        assert_eq!(quartiles, [0.9, 1.0, 1.1, 1.2, 1.4]);
        assert_eq!(quotients.text(), "1.1000 (1.0000 to 1.2000)");
        assert_eq!(
            Quotients::new(vec![2.0]).text(),
            "2.0000 (2.0000 to 2.0000)"
        );
    }
}
