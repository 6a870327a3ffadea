//! Rounds of `kill -9`: weir is killed at random moments under load and started again on the same spool, and at the end
//! every record that was acknowledged must be at the destination.
//!
//! Before it: a plan, from the tool's command line or from weir's `tests/kill.rs`.
//! After it: a report; where it names no fault, nothing acknowledged was lost in any round.
//! Thread: the caller's, and one per sender while a round lasts. Allocates freely.
//!
//! Invariant: each weir is killed, or stopped, and waited for before the next one starts; everything has a time limit.
//! Not here: a disk that forgets. A killed process loses its memory and not the kernel's; power cuts are for the
//! simulated disk of weir's model test.
//!
//! ```text
//! round: start ── recover ── listen ── senders post ── … ✗ kill    the moment is counted from the start or from the
//!        the destination may be put out of the way ──┘             listening, so that every stage meets it
//! last:  start ── recover ── deliver all ── senders post ── deliver all ── account ── stop ── judge the blobs
//! ```

mod judge;
mod records;
mod sender;

pub use judge::Verdict;
pub use sender::Told;

use crate::child::{self, Weir, free_address};
use crate::event::Random;
use anyhow::{Context, Result, bail};
use judge::Inspected;
use records::{DATABASE, RECORD_SIZE_MAX, TABLES};
use sender::{Orders, Sender};
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the last weir may take to deliver everything.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(180);
const POLL_PAUSE: Duration = Duration::from_millis(20);
/// What the senders post to the last weir, to see that it works as ever: bytes each.
const FRESH_SIZE: usize = 64 << 10;

/// Of every twelve rounds the last four find the destination in the way, so that batches pile up over several lives.
const OBSTRUCTED_PERIOD: u32 = 12;
const OBSTRUCTED_FROM: u32 = 8;

/// What to do.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The binary.
    pub weir: PathBuf,
    /// For the spool, the destination and the log; empty at first.
    pub directory: PathBuf,
    pub rounds: u32,
    /// Of moments and records. What the threads make of it is theirs.
    pub seed: u64,
    pub senders: usize,
    /// A kill comes 1 ms to this long after the start, or after the server listens.
    pub delay_max: Duration,
    /// Bytes that all senders together post in a round at most.
    pub round_size: usize,
    /// Bytes of the spool.
    pub spool_size: u64,
}

impl Plan {
    pub fn new(weir: &Path, directory: &Path, rounds: u32, seed: u64) -> Self {
        Plan {
            weir: weir.to_owned(),
            directory: directory.to_owned(),
            rounds,
            seed,
            senders: 8,
            delay_max: Duration::from_millis(300),
            round_size: 4 << 20,
            spool_size: 6 << 20,
        }
    }
}

/// One life of a weir.
#[derive(Debug, Clone)]
pub struct Round {
    pub number: u32,
    /// From the start of the process.
    pub killed_after: Duration,
    /// From the start of the process; `None` where the kill came first.
    pub listened_after: Option<Duration>,
    /// Whether the destination was in the way.
    pub obstructed: bool,
    pub told: Told,
}

/// What came of all rounds.
#[derive(Debug)]
pub struct Report {
    pub rounds: Vec<Round>,
    pub told: Told,
    /// Requests sent, a repetition counted again.
    pub sends: u64,
    /// Batches and rows that the last weir found in the spool.
    pub batches_recovered: u64,
    pub rows_recovered: u64,
    /// From the start of the last weir until everything was delivered.
    pub drained_after: Duration,
    pub verdict: Verdict,
}

impl Report {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.verdict.faults.is_empty()
    }

    pub fn rounds_before_listening(&self) -> usize {
        let before = |round: &&Round| round.listened_after.is_none();
        self.rounds.iter().filter(before).count()
    }

    pub fn rounds_obstructed(&self) -> usize {
        self.rounds.iter().filter(|round| round.obstructed).count()
    }
}

/// When to kill.
#[derive(Debug, Clone, Copy)]
enum Moment {
    AfterStart(Duration),
    AfterListening(Duration),
}

/// The rounds in progress.
struct Rounds<'a> {
    plan: &'a Plan,
    random: Random,
    senders: Vec<Sender>,
    inspected: Inspected,
    faults: Vec<String>,
}

/// Runs the plan. `progress` is told after each round. What weir did wrong is in the report's verdict; an error means
/// that the rounds could not go on: a weir that did not start, or that ended by itself.
pub fn run(plan: &Plan, mut progress: impl FnMut(&Round)) -> Result<Report> {
    let mut rounds = Rounds {
        plan,
        random: Random::of(plan.seed, 0),
        senders: (0..plan.senders)
            .map(|index| Sender::new(plan.seed, index))
            .collect(),
        inspected: Inspected::default(),
        faults: Vec::new(),
    };
    let mut done = Vec::new();
    for number in 0..plan.rounds {
        let round = rounds
            .round(number)
            .with_context(|| format!("round {number} of seed {}", plan.seed))?;
        progress(&round);
        done.push(round);
    }
    rounds
        .conclude(done)
        .with_context(|| format!("after the rounds of seed {}", plan.seed))
}

impl Rounds<'_> {
    fn round(&mut self, number: u32) -> Result<Round> {
        let cores = 1 + self.random.below(2);
        // Batches that age seals soon, and batches that only a full buffer or segment does.
        let max_age = ["50ms", "1h"][self.random.below(2) as usize];
        let is_last = number + 1 == self.plan.rounds;
        // The last one leaves something for the weir that concludes.
        let wants_obstruction = is_last || number % OBSTRUCTED_PERIOD >= OBSTRUCTED_FROM;
        let moment = self.moment(is_last);
        // Nobody reads the admin pages of these rounds.
        let admin = SocketAddr::from(([127, 0, 0, 1], 0));
        self.configure(cores, max_age, admin)?;

        let started_at = Instant::now();
        let mut weir = Weir::spawn(&self.plan.weir, &self.plan.directory, &[])?;
        let address = match moment {
            Moment::AfterStart(delay) => weir.listening_before(started_at + delay),
            Moment::AfterListening(_) => Some(weir.listening(START_TIMEOUT)?),
        };
        let listened_after = address.map(|_| started_at.elapsed());
        let kill_at = match moment {
            Moment::AfterStart(delay) => started_at + delay,
            Moment::AfterListening(delay) => Instant::now() + delay,
        };
        let obstruction = match address {
            Some(_) if wants_obstruction => Some(Obstruction::put(self.destination())?),
            _ => None,
        };
        let mut told = Told::default();
        let killed = match address {
            Some(address) => self.under_load(number, address, kill_at, weir, &mut told),
            None => {
                std::thread::sleep(kill_at.saturating_duration_since(Instant::now()));
                weir.kill()
            }
        };
        let killed_after = started_at.elapsed();
        let obstructed = obstruction.is_some();
        if let Some(obstruction) = obstruction {
            obstruction.remove()?;
        }
        killed?;
        for fault in self.inspected.torn(&self.destination())? {
            self.faults.push(format!("after round {number}: {fault}"));
        }
        Ok(Round {
            number,
            killed_after,
            listened_after,
            obstructed,
            told,
        })
    }

    fn moment(&mut self, is_last: bool) -> Moment {
        if is_last {
            return Moment::AfterListening(self.plan.delay_max);
        }
        let (after_start, halvings) = (self.random.below(2) == 0, self.random.below(8));
        // A start takes some milliseconds: as many kills must meet those as the long time after them.
        let halvings = if after_start { halvings } else { 0 };
        let range = (self.plan.delay_max.as_micros() as u64 >> halvings).max(1);
        let delay = Duration::from_millis(1) + Duration::from_micros(self.random.below(range));
        if after_start {
            Moment::AfterStart(delay)
        } else {
            Moment::AfterListening(delay)
        }
    }

    /// Lets all senders post until `kill_at`, and kills weir in the middle of it.
    fn under_load(
        &mut self,
        round: u32,
        address: SocketAddr,
        kill_at: Instant,
        weir: Weir,
        told: &mut Told,
    ) -> Result<()> {
        let killing = &AtomicBool::new(false);
        let orders = Orders {
            round,
            address,
            size_max: self.plan.round_size / self.senders.len(),
            killing,
        };
        std::thread::scope(|scope| {
            let senders: Vec<_> = self
                .senders
                .iter_mut()
                .map(|sender| scope.spawn(move || sender.send(orders)))
                .collect();
            std::thread::sleep(kill_at.saturating_duration_since(Instant::now()));
            killing.store(true, Ordering::Release);
            let killed = weir.kill();
            for sender in senders {
                told.add(&sender.join().expect("a sender does not panic"));
            }
            killed
        })
    }

    /// The last weir: delivers what is left, works as ever, accounts for itself and stops. Then the blobs are judged.
    fn conclude(mut self, rounds: Vec<Round>) -> Result<Report> {
        let admin = free_address()?;
        self.configure(1, "50ms", admin)?;
        let started_at = Instant::now();
        let mut weir = Weir::spawn(&self.plan.weir, &self.plan.directory, &[])?;
        let address = weir.listening(START_TIMEOUT)?;
        wait_until_delivered(admin, &weir)?;
        let drained_after = started_at.elapsed();

        let killing = &AtomicBool::new(false);
        let mut fresh = Told::default();
        for sender in &mut self.senders {
            fresh.add(&sender.send(Orders {
                round: self.plan.rounds,
                address,
                size_max: FRESH_SIZE,
                killing,
            }));
        }
        wait_until_delivered(admin, &weir)?;
        let page = child::metrics(admin)?;
        weir.stop()?;

        let mut verdict = judge::judge(self.plan.seed, &self.senders, &self.destination())?;
        let mut told = fresh.clone();
        for round in &rounds {
            told.add(&round.told);
        }
        if told.records_acknowledged != verdict.acknowledged {
            verdict.faults.push(format!(
                "{} records were acknowledged and {} remembered so: these rounds cannot count",
                told.records_acknowledged, verdict.acknowledged
            ));
        }
        verdict.faults.append(&mut self.faults);
        verdict.faults.extend(accounting_faults(&page, &fresh));
        verdict.faults.extend(self.traces());
        for sender in &self.senders {
            verdict.faults.extend_from_slice(sender.faults());
        }
        let sends = self.senders.iter().flat_map(Sender::requests);
        Ok(Report {
            rounds,
            told,
            sends: sends.map(|sent| sent.send_count).sum(),
            batches_recovered: value(&page, "weir_recovered_batches", "") as u64,
            rows_recovered: value(&page, "weir_recovered_rows", "") as u64,
            drained_after,
            verdict,
        })
    }

    /// Faults that show in what is left of all lives: errors in the log, and damage where nothing damaged the disk.
    fn traces(&self) -> Vec<String> {
        let directory = &self.plan.directory;
        let log = fs::read(directory.join("log")).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let is_error = |line: &&str| line.contains("ERROR") || line.contains("panicked");
        let mut traces: Vec<String> = log
            .lines()
            .filter(is_error)
            .take(5)
            .map(|line| format!("the log has an error: {line}"))
            .collect();
        for entry in fs::read_dir(directory.join("spool"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if !name.starts_with("segment-") && name != "lock" && name != "probe" {
                traces.push(format!("{name} is left in the spool"));
            }
        }
        traces
    }

    fn destination(&self) -> PathBuf {
        self.plan.directory.join("out")
    }

    fn configure(&self, cores: u64, max_age: &str, admin: SocketAddr) -> Result<()> {
        let mut text = format!(
            "cores = {cores}\n\n[[listener]]\naddress = \"127.0.0.1:0\"\n\n[admin]\naddress = \"{admin}\"\n\n\
             [destination]\ntype = \"directory\"\npath = \"out\"\n\n\
             [spool]\ndirectory = \"spool\"\nsize = {}\n\n[batch]\nmax_age = \"{max_age}\"\n\n\
             [upload]\nbuffer_count = 4\nbuffer_size = \"128KiB\"\n\n\
             [limits]\nrecord = {RECORD_SIZE_MAX}\nconnections = 64\n\n\
             [slabs]\nclasses = [\n  {{ size = \"16KiB\", count = 16 }},\n  {{ size = \"128KiB\", count = 8 }},\n  \
             {{ size = \"512KiB\", count = 4 }},\n]\n",
            self.plan.spool_size
        );
        for table in &TABLES {
            let envelope = if table.enveloped {
                "fluent-bit"
            } else {
                "none"
            };
            text.push_str(&format!(
                "\n[[route]]\npath = \"{}\"\ndatabase = \"{DATABASE}\"\ntable = \"{}\"\nenvelope = \"{envelope}\"\n\
                 ack = \"durable\"\n",
                table.path, table.name
            ));
        }
        fs::write(self.plan.directory.join("weir.toml"), text).context("writing the configuration")
    }
}

/// The destination out of the way: each table's directory is moved aside, and a file stands in its place.
struct Obstruction {
    database: PathBuf,
}

impl Obstruction {
    fn put(destination: PathBuf) -> Result<Obstruction> {
        let database = destination.join(DATABASE);
        for table in &TABLES {
            let path = database.join(table.name);
            fs::rename(&path, aside(&path)).context("moving a table's directory aside")?;
            fs::write(&path, b"in the way").context("putting a file in the way")?;
        }
        Ok(Obstruction { database })
    }

    /// To be called when no weir runs.
    fn remove(self) -> Result<()> {
        for table in &TABLES {
            let path = self.database.join(table.name);
            fs::remove_file(&path).context("removing the file in the way")?;
            fs::rename(aside(&path), &path).context("moving a table's directory back")?;
        }
        Ok(())
    }
}

fn aside(path: &Path) -> PathBuf {
    path.with_extension("aside")
}

/// Waits until nothing is on its way: no row in memory, and every segment free again.
fn wait_until_delivered(admin: SocketAddr, weir: &Weir) -> Result<()> {
    let deadline = Instant::now() + DRAIN_TIMEOUT;
    loop {
        let page = child::metrics(admin)
            .with_context(|| format!("reading the metrics{}", weir.log_tail()))?;
        let segments = value(&page, "weir_spool_segments", "");
        let free = value(&page, "weir_spool_segments_free", "");
        let in_memory = value(&page, "weir_rows_in_memory", "");
        if free == segments && in_memory == 0.0 {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!(
                "not delivered within {DRAIN_TIMEOUT:?}: {in_memory} rows in memory, {free} of {segments} segments \
                 free, {} rows in the spool{}",
                value(&page, "weir_rows_in_spool", ""),
                weir.log_tail()
            );
        }
        std::thread::sleep(POLL_PAUSE);
    }
}

/// A sample of the page; NaN where there is none, which is equal to nothing.
fn value(page: &str, name: &str, label: &str) -> f64 {
    child::metric_sum(page, name, label).unwrap_or(f64::NAN)
}

/// Checks the accounting of one life of a weir that is at rest, and that `told` is what it counted.
fn accounting_faults(page: &str, told: &Told) -> Vec<String> {
    let value = |name: &str, label: &str| value(page, name, label);
    let outcome = |outcome: &str| value("weir_requests", &format!("outcome=\"{outcome}\""));
    let sums = [
        (
            "requests received = accepted + rejected + refused + aborted",
            value("weir_requests_received", ""),
            outcome("accepted") + outcome("rejected") + outcome("refused") + outcome("aborted"),
        ),
        (
            "records + unacknowledged + recovered = in memory + in the spool + delivered",
            value("weir_records", "")
                + value("weir_records_unacknowledged", "")
                + value("weir_recovered_rows", ""),
            value("weir_rows_in_memory", "")
                + value("weir_rows_in_spool", "")
                + value("weir_delivered_rows", ""),
        ),
        (
            "requests acknowledged as the senders and as weir count them",
            told.acknowledged as f64,
            outcome("accepted"),
        ),
        (
            "records acknowledged as the senders and as weir count them",
            told.records_acknowledged as f64,
            value("weir_records", ""),
        ),
        ("commits failed = 0", value("weir_commit_failures", ""), 0.0),
        (
            "segments quarantined = 0",
            value("weir_quarantined_segments", ""),
            0.0,
        ),
        (
            "deliveries not recorded = 0",
            value("weir_retire_failures", ""),
            0.0,
        ),
    ];
    let unequal = |(_, left, right): &(&str, f64, f64)| left != right;
    let mut faults: Vec<String> = sums
        .into_iter()
        .filter(unequal)
        .map(|(sum, left, right)| format!("{sum} does not hold: {left} and {right}"))
        .collect();
    if told.acknowledged == 0 {
        faults.push("the last weir acknowledged nothing".to_owned());
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "weir_requests_received_total 7\nweir_requests_total{outcome=\"accepted\"} 5\n\
         weir_requests_total{outcome=\"rejected\"} 0\nweir_requests_total{outcome=\"refused\"} 2\n\
         weir_requests_total{outcome=\"aborted\"} 0\nweir_records_total 50\nweir_records_unacknowledged_total 1\n\
         weir_recovered_rows_total 9\nweir_rows_in_memory 0\nweir_rows_in_spool 0\nweir_delivered_rows_total 60\n\
         weir_commit_failures_total 0\nweir_quarantined_segments_total 0\nweir_retire_failures_total 0\n";

    #[test]
    fn an_account_that_does_not_add_up_is_a_fault_and_so_is_one_that_is_missing() {
        let told = Told {
            acknowledged: 5,
            records_acknowledged: 50,
            ..Told::default()
        };
        assert_eq!(accounting_faults(PAGE, &told), Vec::<String>::new());
        for line in PAGE.lines() {
            let (name, value) = line.rsplit_once(' ').expect("a sample");
            let value: u64 = value.parse().expect("a number");
            let wrong = PAGE.replace(line, &format!("{name} {}", value + 1));
            assert_ne!(
                accounting_faults(&wrong, &told),
                Vec::<String>::new(),
                "{name}"
            );
            let missing = PAGE.replace(line, "");
            assert_ne!(
                accounting_faults(&missing, &told),
                Vec::<String>::new(),
                "{name}"
            );
        }
    }

    #[test]
    fn an_obstruction_leaves_everything_as_it_was() {
        let directory = tempfile::tempdir().expect("a directory");
        let destination = directory.path().to_owned();
        for table in &TABLES {
            let path = destination.join(DATABASE).join(table.name);
            fs::create_dir_all(&path).expect("made");
            fs::write(path.join("blob"), table.name).expect("written");
        }
        let obstruction = Obstruction::put(destination.clone()).expect("put");
        let blob = |table: &records::Table| {
            fs::read_to_string(destination.join(DATABASE).join(table.name).join("blob"))
        };
        assert!(blob(&TABLES[0]).is_err() && blob(&TABLES[1]).is_err());
        obstruction.remove().expect("removed");
        for table in &TABLES {
            assert_eq!(blob(table).expect("there again"), table.name);
        }
    }
}
