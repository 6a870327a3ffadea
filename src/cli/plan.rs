//! `weir plan`: every term of the memory sum, the totals, and the limit.
//!
//! Nothing is allocated or started. Exits with an error if the sum is above the limit, after the
//! table, so that a deployment can stop before the node would.

use std::fmt::Write;

use super::{ConfigArgs, print, warnings_text};
use crate::budget::machine::{Machine, MemoryLimit};
use crate::budget::{Budget, Scope, Term};
use crate::config::{Config, Size};
use crate::error::Fatal;
use crate::limits::segment_size;

pub(super) fn run(args: &ConfigArgs) -> Result<(), Fatal> {
    let config = args.load()?;
    let machine = Machine::read();
    let budget = Budget::new(&config);
    let mut text = format!("Memory of {}\n\n", args.name());
    text.push_str(&table(&budget));
    text.push('\n');
    let limit = machine.memory_limit(&config);
    writeln!(text, "limit: {}", limit_text(limit.as_ref())).expect("writing to a string");
    writeln!(text, "slabs: {}", budget.registration(&machine)).expect("writing to a string");
    if config.has_spool() {
        text.push_str(&spool_text(&config));
    }
    text.push_str(&warnings_text(&budget.warnings(&config, &machine)));
    print(&text)?;
    budget.verify(&config, &machine)
}

/// The outage that the spool can bridge. What a batch makes of its rows depends on the rows: a range that covers what
/// was measured, small events to large ones.
fn spool_text(config: &Config) -> String {
    let segment_size = segment_size(config.upload.buffer_size) as u64;
    let count = config.segment_count() as u64;
    let held = count * config.upload.buffer_size as u64;
    let minutes = |ratio: f64| held as f64 / ratio / OUTAGE_RATE / 60.0;
    format!(
        "spool: {:.2} in {}, {count} segments of {:.2}; an outage of the destination fills it in {:.1} to {:.1} \
         minutes at {:.0} MB/s of rows that compress to {:.2} to {:.2} of their size\n",
        Size(config.spool.size),
        config.spool.directory.display(),
        Size(segment_size),
        minutes(RATIO_SMALL_EVENTS),
        minutes(RATIO_LARGE_EVENTS),
        OUTAGE_RATE / 1e6,
        RATIO_LARGE_EVENTS,
        RATIO_SMALL_EVENTS,
    )
}

/// The rate for which the plan names the outage, in bytes of rows per second.
const OUTAGE_RATE: f64 = 100e6;

/// Compressed size over raw size at level 2 (`docs/PERFORMANCE.md`).
const RATIO_LARGE_EVENTS: f64 = 0.15;
const RATIO_SMALL_EVENTS: f64 = 0.25;

fn limit_text(limit: Option<&MemoryLimit>) -> String {
    match limit {
        Some(limit) => format!("{:.2} ({})", Size(limit.size), limit.origin),
        None => "none (no memory.limit, and no limit of a control group)".into(),
    }
}

/// The terms with their totals, aligned.
fn table(budget: &Budget) -> String {
    let mut rows = vec![Row::new("each core", "count", "each", "total", "held by")];
    let terms_of = |scope| budget.terms.iter().filter(move |term| term.scope == scope);
    rows.extend(terms_of(Scope::Core).map(Row::from));
    rows.push(Row::new(
        "= one core",
        "",
        "",
        &read(budget.core_size()),
        "",
    ));
    rows.push(Row::default());
    rows.push(Row::new("process", "", "", "", ""));
    rows.push(Row::new(
        "  cores",
        &budget.cores.to_string(),
        &read(budget.core_size()),
        &read(budget.cores * budget.core_size()),
        "all of the above, per core",
    ));
    rows.extend(terms_of(Scope::Process).map(Row::from));
    rows.push(Row::new("= total", "", "", &read(budget.total_size()), ""));

    let width = |cell: fn(&Row) -> &str| {
        let widths = rows.iter().map(|row| cell(row).chars().count());
        widths.max().unwrap_or(0)
    };
    let widths = (
        width(|row| &row.name),
        width(|row| &row.count),
        width(|row| &row.unit),
        width(|row| &row.total),
    );
    let mut text = String::new();
    for row in &rows {
        let line = format!(
            "{:<name$}  {:>count$}  {:>unit$}  {:>total$}  {}",
            row.name,
            row.count,
            row.unit,
            row.total,
            row.holder,
            name = widths.0,
            count = widths.1,
            unit = widths.2,
            total = widths.3,
        );
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A size to be read, not pasted.
fn read(size: u64) -> String {
    format!("{:.2}", Size(size))
}

/// A line of the table.
#[derive(Default)]
struct Row {
    name: String,
    count: String,
    unit: String,
    total: String,
    holder: String,
}

impl Row {
    fn new(name: &str, count: &str, unit: &str, total: &str, holder: &str) -> Self {
        Self {
            name: name.into(),
            count: count.into(),
            unit: unit.into(),
            total: total.into(),
            holder: holder.into(),
        }
    }
}

impl From<&Term> for Row {
    fn from(term: &Term) -> Self {
        Self::new(
            &format!("  {}", term.name),
            &term.count.to_string(),
            &read(term.unit_size),
            &read(term.size()),
            term.holder,
        )
    }
}
