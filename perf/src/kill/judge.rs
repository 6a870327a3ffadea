//! The judge: reads every blob at the destination and holds it against what the senders were told.
//!
//! Before it: the last weir has delivered everything and ended. After it: a verdict, fault by fault.
//! Thread: the caller's. Allocates: one blob at a time, and a byte per record that was ever sent.
//! Invariant: it trusts nothing that weir says; only the blobs, and what the senders remember.
//! Not here: the metrics ([`crate::kill`] looks at those while weir still runs).

use super::records::{DATABASE, RecordId, TABLES, Table, record, unwrap_row};
use super::sender::{Sender, Sent};
use anyhow::{Context, Result, ensure};
use flate2::bufread::GzDecoder;
use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Faults of one kind that are told one by one; the rest is a number.
const EXAMPLES_MAX: usize = 10;

/// What the blobs hold, and what is wrong with that.
#[derive(Debug, Default)]
pub struct Verdict {
    pub blobs: u64,
    pub rows: u64,
    /// Records that a sender was told are stored.
    pub acknowledged: u64,
    /// Of them, those in no blob.
    pub lost: u64,
    /// Records that are there more than once, which only happens to requests that were sent more than once.
    pub duplicates: u64,
    /// Records that are there although nobody was told so: the answer did not come through.
    pub unacknowledged: u64,
    /// Empty files that a start makes and removes, of weirs that were killed in between. Nobody reads them.
    pub probes_left: u64,
    pub faults: Vec<String>,
}

/// How often each record of each sender was found.
struct Findings<'a> {
    seed: u64,
    senders: &'a [Sender],
    found: Vec<Vec<u8>>,
    verdict: Verdict,
}

/// Judges the blobs of all tables below `destination`.
pub fn judge(seed: u64, senders: &[Sender], destination: &Path) -> Result<Verdict> {
    let mut findings = Findings {
        seed,
        senders,
        found: senders
            .iter()
            .map(|sender| vec![0; sender.record_count() as usize])
            .collect(),
        verdict: Verdict::default(),
    };
    for (table_index, table) in TABLES.iter().enumerate() {
        let directory = destination.join(DATABASE).join(table.name);
        let entries = fs::read_dir(&directory).with_context(|| directory.display().to_string())?;
        for entry in entries {
            let path = entry?.path();
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            if name.starts_with('.') && name.ends_with(".probe") {
                findings.verdict.probes_left += 1;
                continue;
            }
            if !is_blob(name) {
                findings.fault(format!("{}/{name} is left at the destination", table.name));
                continue;
            }
            let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
            findings.verdict.blobs += 1;
            match whole_rows(&bytes) {
                Ok(text) => {
                    for row in text.lines() {
                        if let Err(fault) = findings.take(table_index, table, row) {
                            findings.fault(format!("{}/{name}: {fault:#}", table.name));
                        }
                    }
                }
                Err(fault) => findings.fault(format!("{}/{name}: {fault:#}", table.name)),
            }
        }
    }
    Ok(findings.conclude())
}

/// Blobs that were looked at in the middle of the rounds, and when each was last written.
#[derive(Debug, Default)]
pub struct Inspected(HashMap<PathBuf, SystemTime>);

impl Inspected {
    /// Faults of the blobs that are new since the last time: a name may only ever stand for a whole blob, also right
    /// after a kill. To be called when no weir runs.
    pub fn torn(&mut self, destination: &Path) -> Result<Vec<String>> {
        let mut faults = Vec::new();
        for table in &TABLES {
            // A weir that was killed early has not made it yet.
            let entries = fs::read_dir(destination.join(DATABASE).join(table.name));
            for entry in entries.into_iter().flatten() {
                let path = entry?.path();
                let name = path
                    .file_name()
                    .and_then(|name| name.to_str())
                    .unwrap_or_default();
                if !is_blob(name) {
                    continue;
                }
                let written_at = fs::metadata(&path)?.modified()?;
                if self.0.insert(path.clone(), written_at) != Some(written_at)
                    && let Err(fault) = whole_rows(&fs::read(&path)?)
                {
                    faults.push(format!("{}/{name}: {fault:#}", table.name));
                }
            }
        }
        Ok(faults)
    }
}

/// Whether a reader of the destination takes the file for a blob.
fn is_blob(name: &str) -> bool {
    name.ends_with(".json.gz") && !name.starts_with('.')
}

/// The text of a blob: one complete gzip member, of whole lines, and nothing behind it.
fn whole_rows(blob: &[u8]) -> Result<String> {
    let mut decoder = GzDecoder::new(blob);
    let mut text = String::new();
    decoder
        .read_to_string(&mut text)
        .context("a torn gzip member")?;
    ensure!(
        decoder.into_inner().is_empty(),
        "bytes behind the gzip member"
    );
    ensure!(text.ends_with('\n'), "it ends within a row");
    Ok(text)
}

impl Findings<'_> {
    fn fault(&mut self, fault: String) {
        self.verdict.faults.push(fault);
    }

    /// Takes note of a row; an error if it is not one that was sent to this table.
    fn take(&mut self, table_index: usize, table: &Table, row: &str) -> Result<()> {
        self.verdict.rows += 1;
        let id = RecordId::find(row).context("a row without an id")?;
        let sent = self
            .senders
            .get(id.sender)
            .and_then(|sender| request_of(sender.requests(), id.number))
            .with_context(|| format!("{id} was never sent"))?;
        ensure!(
            sent.table_index == table_index,
            "{id} was sent to {}",
            TABLES[sent.table_index].name
        );
        ensure!(
            unwrap_row(table, row) == Some(record(self.seed, id, sent.is_large).as_str()),
            "{id} is not what was sent: {}",
            row.chars().take(200).collect::<String>()
        );
        let count = &mut self.found[id.sender][id.number as usize];
        *count = count.saturating_add(1);
        Ok(())
    }

    fn conclude(mut self) -> Verdict {
        let (mut lost, mut surplus) = (Vec::new(), Vec::new());
        for (index, sender) in self.senders.iter().enumerate() {
            for sent in sender.requests() {
                for number in sent.number_first..sent.number_first + sent.record_count {
                    let id = RecordId {
                        sender: index,
                        number,
                    };
                    let found = u64::from(self.found[index][number as usize]);
                    let table = TABLES[sent.table_index].name;
                    match sent.acknowledged_in {
                        Some(round) => {
                            self.verdict.acknowledged += 1;
                            if found == 0 {
                                lost.push(format!(
                                    "LOST: {id} of {table}, acknowledged in round {round}"
                                ));
                            }
                        }
                        None => self.verdict.unacknowledged += u64::from(found > 0),
                    }
                    self.verdict.duplicates += u64::from(found > 1);
                    if found > sent.send_count {
                        surplus.push(format!(
                            "{id} of {table} was sent {} times and is there {found} times",
                            sent.send_count
                        ));
                    }
                }
            }
        }
        self.verdict.lost = lost.len() as u64;
        for faults in [lost, surplus] {
            let more = faults.len().saturating_sub(EXAMPLES_MAX);
            self.verdict
                .faults
                .extend(faults.into_iter().take(EXAMPLES_MAX));
            if more > 0 {
                self.verdict
                    .faults
                    .push(format!("… and {more} more of this kind"));
            }
        }
        self.verdict
    }
}

/// The request that a record was in, of requests whose records follow each other.
fn request_of(requests: &[Sent], number: u64) -> Option<&Sent> {
    let after = requests.partition_point(|sent| sent.number_first <= number);
    let sent = &requests[after.checked_sub(1)?];
    (number - sent.number_first < sent.record_count).then_some(sent)
}

#[cfg(test)]
mod tests {
    use super::super::sender::Told;
    use super::*;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use std::io::Write;

    const SEED: u64 = 5;

    fn gzip(text: &str) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(text.as_bytes()).expect("into memory");
        encoder.finish().expect("into memory")
    }

    /// One sender with one single record for the second table, which is acknowledged or not.
    fn senders(acknowledged: bool) -> Vec<Sender> {
        let sent = Sent {
            number_first: 0,
            record_count: 1,
            is_large: false,
            table_index: 1,
            send_count: 1,
            acknowledged_in: acknowledged.then_some(3),
        };
        vec![Sender::remembering(SEED, 0, vec![sent])]
    }

    fn row() -> String {
        let id = RecordId {
            sender: 0,
            number: 0,
        };
        record(SEED, id, false) + "\n"
    }

    /// The verdict on these files in the second table's directory.
    fn verdict(senders: &[Sender], files: &[(&str, Vec<u8>)]) -> Verdict {
        let directory = tempfile::tempdir().expect("a directory");
        for table in &TABLES {
            fs::create_dir_all(directory.path().join(DATABASE).join(table.name)).expect("made");
        }
        for (name, bytes) in files {
            let path = directory.path().join(DATABASE).join(TABLES[1].name);
            fs::write(path.join(name), bytes).expect("written");
        }
        judge(SEED, senders, directory.path()).expect("readable")
    }

    #[test]
    fn what_was_acknowledged_must_be_there_once() {
        let there = verdict(&senders(true), &[("a.json.gz", gzip(&row()))]);
        assert!(there.faults.is_empty(), "{:?}", there.faults);
        assert_eq!((there.acknowledged, there.lost, there.rows), (1, 0, 1));

        let lost = verdict(&senders(true), &[]);
        assert_eq!(lost.lost, 1);
        assert_eq!(
            lost.faults,
            ["LOST: s0-0 of Audit, acknowledged in round 3"]
        );

        let nobody_knows = verdict(&senders(false), &[]);
        assert!(nobody_knows.faults.is_empty());
        let came_through = verdict(&senders(false), &[("a.json.gz", gzip(&row()))]);
        assert_eq!(
            (came_through.unacknowledged, came_through.faults.len()),
            (1, 0)
        );
    }

    #[test]
    fn a_record_is_there_as_often_as_it_was_sent_at_most() {
        let twice = [("a.json.gz", gzip(&row())), ("b.json.gz", gzip(&row()))];
        let surplus = verdict(&senders(false), &twice);
        assert_eq!(surplus.duplicates, 1);
        assert_eq!(
            surplus.faults,
            ["s0-0 of Audit was sent 1 times and is there 2 times"]
        );
    }

    #[test]
    fn torn_blobs_foreign_rows_and_other_files_are_faults() {
        let whole = gzip(&row());
        let expect = |files: &[(&str, Vec<u8>)], fault: &str| {
            let faults = verdict(&senders(false), files).faults;
            assert!(faults.len() == 1 && faults[0].contains(fault), "{faults:?}");
        };
        for size in 0..whole.len() {
            expect(
                &[("a.json.gz", whole[..size].to_vec())],
                "a torn gzip member",
            );
        }
        expect(
            &[("a.json.gz", [whole.as_slice(), b"x"].concat())],
            "bytes behind",
        );
        expect(
            &[("a.json.gz", gzip(row().trim_end()))],
            "ends within a row",
        );
        expect(
            &[("a.json.gz", gzip(&row().replace("s0-0", "s0-1")))],
            "never sent",
        );
        expect(
            &[("a.json.gz", gzip(&row().replace("pad", "dap")))],
            "not what was sent",
        );
        expect(
            &[(".a.json.gz.partial", whole)],
            "is left at the destination",
        );
    }

    #[test]
    fn a_blob_is_inspected_when_it_is_new_or_written_again() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut inspected = Inspected::default();
        assert!(
            inspected
                .torn(directory.path())
                .expect("nothing there")
                .is_empty()
        );
        let table = directory.path().join(DATABASE).join(TABLES[0].name);
        fs::create_dir_all(&table).expect("made");
        let whole = gzip(&row());
        let mut torn_after = |name: &str, bytes: &[u8], seconds: u64| {
            let path = table.join(name);
            fs::write(&path, bytes).expect("written");
            let file = fs::File::options().write(true).open(&path).expect("there");
            let written_at = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
            file.set_modified(written_at).expect("a time");
            inspected.torn(directory.path()).expect("readable").len()
        };
        assert_eq!(torn_after("a.json.gz", &whole, 1), 0);
        assert_eq!(torn_after(".b.json.gz.partial", &whole[..9], 1), 0);
        assert_eq!(torn_after("a.json.gz", &whole[..9], 2), 1);
        assert_eq!(
            torn_after("c.json.gz", &whole, 3),
            0,
            "a fault is told once"
        );
    }

    #[test]
    fn what_senders_were_told_adds_up() {
        let mut sum = Told::default();
        let told = Told {
            acknowledged: 2,
            records_acknowledged: 30,
            refused: [("busy".to_owned(), 1)].into(),
            cut_off: 1,
        };
        sum.add(&told);
        sum.add(&told);
        assert_eq!(
            (sum.acknowledged, sum.records_acknowledged, sum.cut_off),
            (4, 60, 2)
        );
        assert_eq!(sum.refused["busy"], 2);
    }
}
