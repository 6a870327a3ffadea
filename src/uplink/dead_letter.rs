//! Dead letters: batches that the destination will never take, kept with the reason until somebody decides.
//!
//! Before it: [`super::courier`] has the service's own word that a batch is not taken.
//! After it: a person looks (`weir dead-letter`), and replays or drops.
//! Thread: threads that may block. Allocates: names, and one entry per letter where they are listed.
//! Invariant: a letter is on disk, synced, blob first and reason last, before its segment is retired; a blob without its
//! reason is no letter, and is written again. `dead_letter.size` is never exceeded.
//! Not here: why a batch is refused.
//!
//! ```text
//! lock                        held by the weir that runs
//! <blob name>                 the blob, as the destination would have got it
//! <blob name>.reason.json     what, where to and why
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::config::{self, Dedup, Size, Table};
use crate::error::{Fatal, UploadError};
use crate::limits::{DEAD_LETTER_REASON_SIZE_MAX, DEAD_LETTER_WARN_PERCENT};
use crate::spool::segment::BatchId;
use crate::upload_buffer::Batch;

const REASON_SUFFIX: &str = ".reason.json";

/// What is known of a dead letter: the content of its `.reason.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// The blob's name, the same however often it is delivered.
    pub blob: String,
    pub database: String,
    pub table: String,
    pub mapping: Option<String>,
    /// `"off"` or `"ingest-by"`.
    pub dedup: String,
    pub rows: u64,
    /// Of the blob, in bytes.
    pub size: u64,
    /// Of the rows, in bytes.
    pub raw_size: u64,
    /// The CRC-32 of the rows.
    pub raw_crc: u32,
    pub begun_at_ms: u64,
    pub buried_at: Timestamp,
    pub step: String,
    pub code: String,
    pub reason: String,
}

impl Reason {
    pub fn new(batch: &Batch, table: &Table, error: &UploadError) -> Reason {
        Reason {
            blob: batch.id.blob_name(),
            database: table.database.clone(),
            table: table.table.clone(),
            mapping: table.mapping.clone(),
            dedup: match table.dedup {
                Dedup::Off => "off".into(),
                Dedup::IngestBy => "ingest-by".into(),
            },
            rows: batch.totals.row_count,
            size: batch.blob_size(),
            raw_size: batch.totals.raw_size,
            raw_crc: batch.totals.raw_crc,
            begun_at_ms: batch.begun_at_ms,
            buried_at: Timestamp::now(),
            step: error.step.name().into(),
            code: error.code.clone(),
            reason: error.detail.clone(),
        }
    }

    /// The table it is for.
    pub fn table(&self) -> Table {
        Table {
            database: self.database.clone(),
            table: self.table.clone(),
            mapping: self.mapping.clone(),
            dedup: match self.dedup.as_str() {
                "ingest-by" => Dedup::IngestBy,
                _ => Dedup::Off,
            },
            spooled: true,
            delivered: false,
        }
    }

    /// Whether the blob's name is one of weir's, so that it can be part of a path.
    fn is_named_well(&self) -> bool {
        BatchId::of_blob_name(&self.blob).is_some()
    }
}

/// The dead letters of a node.
pub struct DeadLetters {
    directory: PathBuf,
    size_max: u64,
    age_max: Option<Duration>,
    /// Held while this exists, where something is changed.
    _lock: Option<File>,
    /// One write at a time, so that the size is never exceeded.
    writing: Mutex<()>,
    held_size: AtomicU64,
    held_count: AtomicU64,
    rows_expired: AtomicU64,
}

impl DeadLetters {
    /// Makes the directory if need be, and takes it for this process.
    pub fn take(config: &config::DeadLetter) -> Result<DeadLetters, Fatal> {
        let path = &config.directory;
        let unusable = |source| Fatal::DeadLetterUnusable {
            path: path.clone(),
            source,
        };
        fs::create_dir_all(path).map_err(unusable)?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path.join("lock"))
            .map_err(unusable)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(Fatal::DeadLetterLocked { path: path.clone() });
            }
            Err(error) => return Err(unusable(error.into())),
        }
        let letters = DeadLetters {
            _lock: Some(lock),
            ..Self::observe(config)
        };
        letters.tidy().map_err(unusable)?;
        letters.recount().map_err(unusable)?;
        Ok(letters)
    }

    /// To read beside the process that has it.
    pub fn observe(config: &config::DeadLetter) -> DeadLetters {
        DeadLetters {
            directory: config.directory.clone(),
            size_max: config.size,
            age_max: config.age,
            _lock: None,
            writing: Mutex::new(()),
            held_size: AtomicU64::new(0),
            held_count: AtomicU64::new(0),
            rows_expired: AtomicU64::new(0),
        }
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Bytes held.
    pub fn held_size(&self) -> u64 {
        self.held_size.load(Ordering::Relaxed)
    }

    /// Letters held.
    pub fn held_count(&self) -> u64 {
        self.held_count.load(Ordering::Relaxed)
    }

    /// Rows of letters that were removed for their age.
    pub fn rows_expired(&self) -> u64 {
        self.rows_expired.load(Ordering::Relaxed)
    }

    /// The letters, oldest name first. A file that is none is passed over.
    pub fn list(&self) -> io::Result<Vec<Reason>> {
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut letters = Vec::new();
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let Some(blob) = name
                .to_str()
                .and_then(|name| name.strip_suffix(REASON_SUFFIX))
            else {
                continue;
            };
            if entry.metadata()?.len() > DEAD_LETTER_REASON_SIZE_MAX as u64 {
                continue;
            }
            match serde_json::from_slice::<Reason>(&fs::read(entry.path())?) {
                Ok(reason) if reason.blob == blob && reason.is_named_well() => letters.push(reason),
                _ => {
                    tracing::warn!(path = %entry.path().display(), "not the reason of a dead letter")
                }
            }
        }
        letters.sort_by(|a, b| a.blob.cmp(&b.blob));
        Ok(letters)
    }

    /// Where the blob of a letter is.
    pub fn blob_path(&self, reason: &Reason) -> PathBuf {
        self.directory.join(&reason.blob)
    }

    /// Keeps a batch, whose blob `write` writes. Everything is synced when this returns.
    pub fn put(
        &self,
        reason: &Reason,
        write: impl FnOnce(&mut File) -> io::Result<()>,
    ) -> io::Result<()> {
        let _one = self.writing.lock().expect("no holder panics");
        // After a crash between letter and retiring, the same one comes again.
        let before = fs::metadata(self.blob_path(reason)).map_or(0, |blob| blob.len());
        let size = (self.held_size() + reason.size).saturating_sub(before);
        if size > self.size_max {
            return Err(io::Error::other(format!(
                "the dead letters would hold {:.2}, and dead_letter.size is {:.2}; replay or drop some, or raise it",
                Size(size),
                Size(self.size_max)
            )));
        }
        let json = serde_json::to_vec_pretty(reason).map_err(io::Error::other)?;
        self.place(&reason.blob, write)?;
        let note = format!("{}{REASON_SUFFIX}", reason.blob);
        self.place(&note, |file| file.write_all(&json))?;
        self.sync_entries()?;
        self.recount()?;
        if size * 100 >= self.size_max.saturating_mul(DEAD_LETTER_WARN_PERCENT) {
            tracing::warn!(
                held = format!("{:.2}", Size(size)),
                most = format!("{:.2}", Size(self.size_max)),
                "the dead letters are nearly full; what does not fit stays in the spool, and fills that"
            );
        }
        Ok(())
    }

    /// A file under its name, with all its content, or not at all.
    fn place(&self, name: &str, write: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
        let partial = self.directory.join(format!("{name}.partial"));
        let mut file = File::create(&partial)?;
        write(&mut file)?;
        file.sync_all()?;
        fs::rename(&partial, self.directory.join(name))
    }

    /// Removes a letter, the reason first: a blob alone is no letter.
    pub fn remove(&self, reason: &Reason) -> io::Result<()> {
        fs::remove_file(
            self.directory
                .join(format!("{}{REASON_SUFFIX}", reason.blob)),
        )?;
        self.sync_entries()?;
        fs::remove_file(self.blob_path(reason))?;
        self.sync_entries()?;
        self.recount()
    }

    /// Removes letters that are older than `dead_letter.age`, and warns of those that soon will be.
    pub fn expire(&self, now: Timestamp) -> io::Result<()> {
        let Some(age_max) = self.age_max else {
            return Ok(());
        };
        let _one = self.writing.lock().expect("no holder panics");
        let mut soon = (0_u64, 0_u64);
        for letter in self.list()? {
            let age = Duration::try_from(now.duration_since(letter.buried_at)).unwrap_or_default();
            if age > age_max {
                tracing::error!(
                    blob = letter.blob,
                    database = letter.database,
                    table = letter.table,
                    rows = letter.rows,
                    reason = letter.reason,
                    "a dead letter is older than dead_letter.age and is removed for good"
                );
                self.remove(&letter)?;
                self.rows_expired.fetch_add(letter.rows, Ordering::Relaxed);
            } else if age.as_secs() * 100 >= age_max.as_secs() * DEAD_LETTER_WARN_PERCENT {
                soon = (soon.0 + 1, soon.1 + letter.rows);
            }
        }
        if soon.0 > 0 {
            tracing::warn!(
                letters = soon.0,
                rows = soon.1,
                "dead letters will soon be older than dead_letter.age, and are removed then; replay or drop them"
            );
        }
        Ok(())
    }

    /// Removes what a crash left half written; the batches of it are in the spool.
    fn tidy(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let name = name.unwrap_or_default();
            let mut note = path.clone().into_os_string();
            note.push(REASON_SUFFIX);
            let is_blob_alone = BatchId::of_blob_name(name).is_some() && !Path::new(&note).exists();
            if name.ends_with(".partial") || is_blob_alone {
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }

    fn recount(&self) -> io::Result<()> {
        let letters = self.list()?;
        let size = letters.iter().map(|letter| letter.size).sum();
        self.held_size.store(size, Ordering::Relaxed);
        self.held_count
            .store(letters.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn sync_entries(&self) -> io::Result<()> {
        File::open(&self.directory)?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::SignedDuration;
    use uuid::Uuid;

    fn letter(sequence: u64, size: u64, buried_at: Timestamp) -> Reason {
        let id = BatchId {
            run: Uuid::from_u128(7),
            sequence,
            core: 0,
        };
        Reason {
            blob: id.blob_name(),
            database: "D".into(),
            table: "T".into(),
            mapping: Some("m".into()),
            dedup: "ingest-by".into(),
            rows: 3,
            size,
            raw_size: 9,
            raw_crc: 1,
            begun_at_ms: 5,
            buried_at,
            step: "put_blob".into(),
            code: "InvalidHeaderValue".into(),
            reason: "because".into(),
        }
    }

    fn config(directory: &Path, size: u64, age: Option<Duration>) -> config::DeadLetter {
        config::DeadLetter {
            directory: directory.join("dead"),
            size,
            age,
        }
    }

    fn names(letters: &DeadLetters) -> Vec<String> {
        let list = letters.list().unwrap().into_iter();
        list.map(|letter| letter.blob).collect()
    }

    #[test]
    fn letters_are_kept_up_to_the_size_and_listed_as_they_were() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path(), 10, None);
        let letters = DeadLetters::take(&config).unwrap();
        let now = Timestamp::now();
        let put = |letter: &Reason| letters.put(letter, |file| file.write_all(b"blob"));
        let (first, second, third) = (letter(1, 4, now), letter(2, 6, now), letter(3, 1, now));
        put(&first).unwrap();
        put(&second).unwrap();
        put(&first).unwrap();
        let full = put(&third).unwrap_err().to_string();
        assert!(full.contains("dead_letter.size"), "{full}");
        assert_eq!(letters.list().unwrap(), [first.clone(), second.clone()]);
        assert_eq!(fs::read(letters.blob_path(&first)).unwrap(), b"blob");
        assert_eq!((letters.held_size(), letters.held_count()), (10, 2));
        assert_eq!(first.table().dedup, Dedup::IngestBy);
        // Room again.
        letters.remove(&second).unwrap();
        put(&third).unwrap();
        assert_eq!(names(&letters), [first.blob, third.blob]);
        // One process at a time, and whoever only looks.
        let taken = DeadLetters::take(&config).err().unwrap();
        assert!(matches!(taken, Fatal::DeadLetterLocked { .. }), "{taken}");
        assert_eq!(names(&DeadLetters::observe(&config)).len(), 2);
    }

    #[test]
    fn what_was_written_by_halves_is_no_letter() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path(), 100, None);
        let letters = DeadLetters::take(&config).unwrap();
        let now = Timestamp::now();
        let whole = letter(1, 4, now);
        letters.put(&whole, |file| file.write_all(b"blob")).unwrap();
        let failed = letters.put(&letter(2, 4, now), |_| Err(io::ErrorKind::Other.into()));
        assert!(failed.is_err());
        fs::write(letters.directory().join(letter(3, 4, now).blob), b"alone").unwrap();
        fs::write(letters.directory().join("x.reason.json"), b"{}").unwrap();
        assert_eq!(names(&letters), std::slice::from_ref(&whole.blob));
        drop(letters);
        let letters = DeadLetters::take(&config).unwrap();
        let files = fs::read_dir(letters.directory()).unwrap().count();
        // The letter's two, the lock, and what is not weir's.
        assert_eq!((names(&letters), files), (vec![whole.blob], 4));
    }

    #[test]
    fn only_what_is_older_than_the_age_is_removed_and_counted() {
        let directory = tempfile::tempdir().unwrap();
        let hour = Duration::from_secs(3600);
        let letters = DeadLetters::take(&config(directory.path(), 100, Some(hour))).unwrap();
        let now = Timestamp::now();
        for (sequence, minutes) in [(1, 61), (2, 59), (3, 0)] {
            let buried_at = now - SignedDuration::from_mins(minutes);
            let letter = letter(sequence, 4, buried_at);
            letters
                .put(&letter, |file| file.write_all(b"blob"))
                .unwrap();
        }
        letters.expire(now).unwrap();
        assert_eq!(names(&letters).len(), 2);
        assert_eq!((letters.rows_expired(), letters.held_size()), (3, 8));
    }
}
