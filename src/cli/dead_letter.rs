//! `weir dead-letter`: what the destination did not take, for people: list, look, deliver again, drop.
//!
//! Looking only reads, also beside a running weir. What changes something takes the directory, which a running weir has.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use backon::{ExponentialBuilder, Retryable};
use bytes::Bytes;
use tokio::runtime::Runtime;
use tokio::sync::Mutex;

use super::spool::Rows;
use super::{DeadLetterCommand, Letters, print};
use crate::config::{Config, Destination, Size, Table};
use crate::error::{Fatal, Remedy, UploadError};
use crate::limits::{DELIVERY_PAUSE_MAX, DELIVERY_PAUSE_MIN};
use crate::spool::frame::Totals;
use crate::spool::segment::BatchId;
use crate::uplink::courier::meta;
use crate::uplink::dead_letter::{DeadLetters, Reason};
use crate::uplink::directory::Directory;
use crate::uplink::kusto::Kusto;
use crate::upload_buffer::Batch;

/// How often the replay of one letter is tried.
const REPLAY_RETRY_COUNT_MAX: usize = 5;

pub(super) fn run(command: &DeadLetterCommand) -> Result<(), Fatal> {
    match command {
        DeadLetterCommand::Ls(args) => ls(&DeadLetters::observe(&args.load()?.dead_letter)),
        DeadLetterCommand::Show { config, name, rows } => {
            let letters = DeadLetters::observe(&config.load()?.dead_letter);
            show(&letters, name, *rows)
        }
        DeadLetterCommand::Replay { config, letters } => replay(&config.load()?, letters),
        DeadLetterCommand::Drop { config, letters } => {
            let store = DeadLetters::take(&config.load()?.dead_letter)?;
            for letter in chosen(&store, letters)? {
                store.remove(&letter).map_err(unusable(&store))?;
                print(&format!("dropped {}, {} rows\n", letter.blob, letter.rows))?;
            }
            Ok(())
        }
    }
}

fn unusable(store: &DeadLetters) -> impl Fn(io::Error) -> Fatal + use<> {
    let path = store.directory().to_owned();
    move |source| Fatal::DeadLetterUnusable {
        path: path.clone(),
        source,
    }
}

/// The letters that are named, or all.
fn chosen(store: &DeadLetters, letters: &Letters) -> Result<Vec<Reason>, Fatal> {
    let all = store.list().map_err(unusable(store))?;
    if letters.all {
        return Ok(all);
    }
    let named = letters.names.iter().map(|name| find(store, &all, name));
    named.collect()
}

fn find(store: &DeadLetters, all: &[Reason], name: &str) -> Result<Reason, Fatal> {
    let found = all.iter().find(|letter| letter.blob == name);
    found.cloned().ok_or_else(|| Fatal::NoDeadLetter {
        name: name.into(),
        path: store.directory().into(),
    })
}

/// One line per letter, and a line that counts all.
fn ls(store: &DeadLetters) -> Result<(), Fatal> {
    let all = store.list().map_err(unusable(store))?;
    let mut text = String::new();
    for letter in &all {
        let Reason {
            blob,
            database,
            table,
            rows,
            buried_at,
            code,
            ..
        } = letter;
        writeln!(
            text,
            "{blob}  {database}.{table}  {rows} rows  {buried_at:.0}  {code}"
        )
        .expect("writing to a string");
    }
    let size = all.iter().map(|letter| letter.size).sum();
    let rows: u64 = all.iter().map(|letter| letter.rows).sum();
    let count = all.len();
    writeln!(text, "{count} dead letters, {rows} rows, {:.2}", Size(size))
        .expect("writing to a string");
    print(&text)
}

/// The reason, and the rows where they are asked for.
fn show(store: &DeadLetters, name: &str, rows: bool) -> Result<(), Fatal> {
    let all = store.list().map_err(unusable(store))?;
    let letter = find(store, &all, name)?;
    if !rows {
        let json = serde_json::to_string_pretty(&letter).expect("text and numbers serialize");
        return print(&format!("{json}\n"));
    }
    let blob = std::fs::read(store.blob_path(&letter)).map_err(unusable(store))?;
    let mut inflated = Rows::new(totals(&letter));
    let mut stdout = io::stdout().lock();
    let shown = inflated.to(&mut stdout).write_all(&blob);
    match shown.and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(unusable(store)(error)),
        _ => Ok(()),
    }
}

/// Of the member without its end.
fn totals(letter: &Reason) -> Totals {
    Totals {
        member_size: letter.size - crate::deflate::MEMBER_END_SIZE as u64,
        raw_size: letter.raw_size,
        raw_crc: letter.raw_crc,
        row_count: letter.rows,
    }
}

/// Delivers letters to the configured destination, under the names that they had, and removes those that are taken.
fn replay(config: &Config, letters: &Letters) -> Result<(), Fatal> {
    let store = DeadLetters::take(&config.dead_letter)?;
    let chosen = chosen(&store, letters)?;
    let tables: Vec<Table> = chosen.iter().map(Reason::table).collect();
    let remote = Remote::open(config, &tables)?;
    let mut failure_count = 0;
    for (table_index, letter) in chosen.iter().enumerate() {
        let blob = std::fs::read(store.blob_path(letter)).map_err(unusable(&store))?;
        match remote.deliver(letter, table_index, blob.into()) {
            Ok(()) => {
                store.remove(letter).map_err(unusable(&store))?;
                print(&format!(
                    "delivered {}, {} rows\n",
                    letter.blob, letter.rows
                ))?;
            }
            Err(why) => {
                failure_count += 1;
                print(&format!("kept {}: {why}\n", letter.blob))?;
            }
        }
    }
    match failure_count {
        0 => Ok(()),
        failure_count => Err(Fatal::ReplayFailed { failure_count }),
    }
}

/// Where letters are delivered to.
enum Remote {
    Directory(Directory),
    Null,
    Kusto { kusto: Arc<Kusto>, runtime: Runtime },
}

impl Remote {
    fn open(config: &Config, tables: &[Table]) -> Result<Remote, Fatal> {
        Ok(match &config.destination {
            Destination::Directory { path } => {
                Remote::Directory(Directory::open(path, tables, false)?)
            }
            Destination::Null => Remote::Null,
            Destination::Kusto(kusto) => {
                let runtime = tokio::runtime::Builder::new_multi_thread()
                    .worker_threads(1)
                    .enable_all()
                    .build()
                    .map_err(|source| Fatal::Io {
                        action: "starting the runtime".into(),
                        source,
                    })?;
                let kusto = Arc::new(Kusto::open(kusto, tables, runtime.handle())?);
                Remote::Kusto { kusto, runtime }
            }
        })
    }

    fn deliver(&self, letter: &Reason, table_index: usize, blob: Bytes) -> Result<(), String> {
        let batch = Batch {
            id: BatchId::of_blob_name(&letter.blob).expect("a listed letter has such a name"),
            table_index,
            totals: totals(letter),
            memory: None,
            spooled: None,
            reported: false,
            awaited: false,
            position_end: 0,
            begun_at_ms: letter.begun_at_ms,
        };
        match self {
            Remote::Null => Ok(()),
            Remote::Directory(directory) => directory
                .write(&batch, |file| file.write_all(&blob))
                .map_err(|error| error.to_string()),
            Remote::Kusto { kusto, runtime } => {
                let delivery = Mutex::new(kusto.begin(meta(&batch)));
                let attempt = || async {
                    let mut delivery = delivery.lock().await;
                    let attempted = delivery.attempt(&blob).await;
                    if let Err(UploadError {
                        remedy: Remedy::Refresh,
                        ..
                    }) = &attempted
                    {
                        let _ =
                            tokio::time::timeout(DELIVERY_PAUSE_MAX, delivery.refreshed()).await;
                    }
                    attempted
                };
                let delivered = attempt
                    .retry(
                        ExponentialBuilder::default()
                            .with_jitter()
                            .with_min_delay(DELIVERY_PAUSE_MIN)
                            .with_max_delay(DELIVERY_PAUSE_MAX)
                            .with_max_times(REPLAY_RETRY_COUNT_MAX),
                    )
                    .when(|error| matches!(error.remedy, Remedy::Retry { .. } | Remedy::Refresh))
                    .adjust(|error, pause| {
                        let asked = match error.remedy {
                            Remedy::Retry { after } => after.unwrap_or_default(),
                            _ => Duration::ZERO,
                        };
                        pause.map(|pause| pause.max(asked))
                    });
                let delivered = runtime.block_on(delivered);
                delivered.map_err(|error: UploadError| error.to_string())
            }
        }
    }
}
