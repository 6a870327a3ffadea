//! The engine: takes ingestion messages, gathers batches, downloads blobs, ingests them as the real one would.
//!
//! Before it: a message in a queue. After it: rows in [`super::catalog`], or a failure.
//! Thread: one task of the runtime; inflating and parsing are on its blocking pool. Allocates: freely, one blob at a time.
//! Invariant: a message taken ends as rows, as a duplicate, as skipped by its tag, or as a failure.
//! Not here: what bytes mean ([`harvest`]), what a message must say ([`super::message`]).
//!
//! Simplified: all failures are in one list. In Azure, `.show ingestion failures` lists those of the ingest command, and
//! diagnostics those that come before it (identity token, download, duplicates).
//! `Download_SourceNotFound` and `BadRequest_FormatNotSupported` are from memory of the service's error list.

pub(super) mod harvest;

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Bytes;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use percent_encoding::percent_decode_str;
use serde_json::json;
use tokio::sync::Notify;
use uuid::Uuid;

use super::Service;
use super::catalog::{Commit, Refused, TableCounts};
use super::clock::{later, ticks_text};
use super::message::{self, Message, Report};
use super::sas::StorageService;
use super::storage::{FAILED_QUEUE, Query, SUCCEEDED_QUEUE, blob};
use harvest::{Blob, Format, Harvest};

/// Failures kept; the total goes on counting.
const FAILURE_COUNT_MAX: usize = 10_000;
/// How often an external queue is asked, in real time.
const POLL_PAUSE: Duration = Duration::from_millis(100);

/// When a batch of blobs is ingested.
#[derive(Debug, Clone, Copy)]
pub enum Batching {
    /// Each blob at once, alone.
    Immediate,
    /// As a batching policy says; age is by the stand-in's clock.
    Policy {
        blob_count_max: usize,
        raw_size_max: u64,
        age_max: Duration,
    },
    /// When [`super::Standin::seal_batches`] says so.
    Manual,
}

/// A blob that did not become rows, as `.show ingestion failures` tells it.
#[derive(Debug, Clone)]
pub struct Failure {
    pub operation_id: String,
    /// Empty where the message could not be read.
    pub database: String,
    pub table: String,
    pub failed_on: String,
    /// Without the SAS.
    pub source_path: String,
    /// The message's `Id`.
    pub source_id: String,
    pub details: String,
    /// `Permanent` or `Transient`.
    pub failure_kind: &'static str,
    pub error_code: String,
    pub should_retry: bool,
}

#[derive(Default)]
pub(super) struct Engine {
    wake: Notify,
    paused: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    batches: BTreeMap<Key, Batch>,
    alone_count: u64,
    /// Messages and blobs that are being worked on.
    in_work: usize,
    failures: VecDeque<Failure>,
    failure_count: u64,
}

/// Blobs with the same key can share a batch.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    database: String,
    table: String,
    format: String,
    mapping: [Option<String>; 2],
    tags: Vec<String>,
    /// A number of its own, for a blob that shares its batch with none.
    alone: Option<u64>,
}

struct Batch {
    /// The beginning of time where it is due whatever the policy says.
    opened: Timestamp,
    raw_size: u64,
    messages: Vec<Message>,
}

/// A failure that the service would try again by itself.
const TRANSIENT: &str = "Download_UnknownError";

impl Engine {
    /// There is something to look at.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    pub fn pause(&self) {
        self.paused.store(true, Ordering::Relaxed);
    }

    pub fn resume(&self) {
        self.paused.store(false, Ordering::Relaxed);
        self.wake();
    }

    pub fn failures(&self) -> Vec<Failure> {
        let state = self.state.lock().unwrap();
        state.failures.iter().cloned().collect()
    }

    pub fn failure_count(&self) -> u64 {
        self.state.lock().unwrap().failure_count
    }

    /// Whether nothing is open and nothing is being worked on.
    pub fn is_idle(&self) -> bool {
        let state = self.state.lock().unwrap();
        state.in_work == 0 && state.batches.is_empty()
    }

    /// Makes every open batch due.
    pub fn seal_all(&self) {
        for batch in self.state.lock().unwrap().batches.values_mut() {
            batch.opened = Timestamp::MIN;
        }
        self.wake();
    }

    /// Runs for ever.
    pub async fn run(service: Arc<Service>) {
        let engine = &service.engine;
        loop {
            let worked = !engine.paused.load(Ordering::Relaxed) && engine.step(&service).await;
            // Also where nothing was done: whoever looked meanwhile saw an engine at work.
            service.progress.changed();
            if worked {
                continue;
            }
            let pause = match service.options.batching {
                _ if service.external.is_some() => POLL_PAUSE,
                Batching::Policy { .. } => POLL_PAUSE,
                Batching::Immediate | Batching::Manual => Duration::from_secs(3600),
            };
            // A timeout is one of the two reasons to look again.
            let _ = tokio::time::timeout(pause, engine.wake.notified()).await;
        }
    }

    /// Takes what waits and ingests what is due; tells whether there was anything.
    async fn step(&self, service: &Service) -> bool {
        let mut worked = false;
        // Counted before the queue gets shorter, so that idle is never seen in between.
        self.state.lock().unwrap().in_work += 1;
        let texts = match &service.external {
            Some(external) => external.take().await,
            None => service
                .storage
                .queues
                .take(service.clock.now())
                .into_iter()
                .collect(),
        };
        for text in texts {
            worked = true;
            self.admit(service, &text);
        }
        while let Some(batch) = self.take_due(service) {
            worked = true;
            self.ingest_batch(service, batch).await;
            self.state.lock().unwrap().in_work -= 1;
        }
        self.state.lock().unwrap().in_work -= 1;
        worked
    }

    /// The first stage of the service: reads a message and puts its blob into a batch.
    fn admit(&self, service: &Service, text: &str) {
        let checked = message::check(text);
        if let Some(json) = &checked.json {
            service.journal.message(json);
        }
        let id = checked.message.as_ref().map_or("", |message| &message.id);
        for violation in &checked.violations {
            service
                .journal
                .violation(format!("message {id}: {violation}"));
        }
        let message = match checked.message {
            Ok(message) => message,
            Err(refused) => return self.fail(service, None, refused),
        };
        let now = service.clock.now();
        if !service
            .identity_tokens
            .holds(&message.authorization_context, now)
        {
            let details = "The authorization context was not issued here, or has expired.";
            let refused = ("BadRequest_InvalidKustoIdentityToken", details.into());
            return self.fail(service, Some(&message), refused);
        }
        let immediate = matches!(service.options.batching, Batching::Immediate);
        // All but the first seal a batch of one in Azure as well.
        let alone = immediate
            || message.flush_immediately
            || message.raw_size.is_none()
            || !message.ingest_if_not_exists.is_empty()
            || message.tags.iter().any(|tag| tag.starts_with("ingest-by:"));
        let mut state = self.state.lock().unwrap();
        state.alone_count += 1;
        let key = Key {
            database: message.database.clone(),
            table: message.table.clone(),
            format: message.format.clone(),
            mapping: [message.mapping_reference.clone(), message.mapping.clone()],
            tags: message.tags.clone(),
            alone: alone.then_some(state.alone_count),
        };
        let batch = state.batches.entry(key).or_insert_with(|| Batch {
            opened: if alone { Timestamp::MIN } else { now },
            raw_size: 0,
            messages: Vec::new(),
        });
        batch.raw_size += message.raw_size.unwrap_or(0);
        batch.messages.push(message);
    }

    fn take_due(&self, service: &Service) -> Option<Batch> {
        let now = service.clock.now();
        let is_due = |batch: &Batch| match service.options.batching {
            _ if batch.opened == Timestamp::MIN => true,
            Batching::Immediate | Batching::Manual => false,
            Batching::Policy {
                blob_count_max,
                raw_size_max,
                age_max,
            } => {
                batch.messages.len() >= blob_count_max
                    || batch.raw_size >= raw_size_max
                    || later(batch.opened, age_max) <= now
            }
        };
        let mut state = self.state.lock().unwrap();
        let due = state.batches.iter().find(|(_, batch)| is_due(batch));
        let key = due.map(|(key, _)| key.clone())?;
        state.in_work += 1;
        state.batches.remove(&key)
    }

    async fn ingest_batch(&self, service: &Service, batch: Batch) {
        let mut seen = HashSet::new();
        for message in batch.messages {
            if !seen.insert(source_path(&message).to_owned()) {
                let counts = TableCounts {
                    duplicates: 1,
                    ..TableCounts::default()
                };
                service
                    .catalog
                    .count(&message.database, &message.table, &counts);
                let details = "The blob is already in its batch.";
                let refused = (
                    "BlobAlreadyReceived_BlobAlreadyFoundInBatch",
                    details.into(),
                );
                self.fail(service, Some(&message), refused);
                continue;
            }
            match self.ingest(service, &message).await {
                Ok(()) => succeed(service, &message),
                Err(refused) => self.fail(service, Some(&message), refused),
            }
        }
    }

    async fn ingest(&self, service: &Service, message: &Message) -> Result<(), Refused> {
        let (database, table) = (&message.database, &message.table);
        let can_ingest = |role: &String| role == "Ingestor" || role == "Admin";
        if !service.roles.lock().unwrap().iter().any(can_ingest) {
            let details = format!("The principal may not ingest into table '{table}'.");
            return Err(("BadRequest_TableAccessDenied", details));
        }
        let reference = message.mapping_reference.as_deref();
        let shape =
            service
                .catalog
                .shape(database, table, reference, message.mapping.as_deref())?;
        let format = match message.format.as_str() {
            "json" => Format::Json,
            "multijson" => Format::MultiJson,
            other => {
                let details = format!("The stand-in plays json and multijson, not {other}.");
                return Err(("BadRequest_FormatNotSupported", details));
            }
        };
        let wanted = &message.ingest_if_not_exists;
        if service.catalog.was_ingested_by(database, table, wanted) {
            let counts = TableCounts {
                skipped_by_tag: 1,
                ..TableCounts::default()
            };
            service.catalog.count(database, table, &counts);
            return Ok(());
        }
        let bytes = download(service, message).await?;
        let options = &service.options;
        let (members, check) = (options.members, options.row_check);
        let records_max = service.catalog.rows_max();
        let (gzip, ignore_size_limit) = (
            source_path(message).ends_with(".gz"),
            message.ignore_size_limit,
        );
        let read_shape = shape.clone();
        let read = move || {
            let blob = Blob {
                bytes: &bytes,
                gzip,
                format,
                ignore_size_limit,
                members,
                check,
                records_max,
                shape: &read_shape,
            };
            blob.harvest()
        };
        let harvest = tokio::task::spawn_blocking(read).await;
        let harvest = harvest
            .unwrap_or_else(|panic| Err(("General_InternalServerError", panic.to_string())))?;
        check_harvest(service, message, &harvest);
        let tags = message.tags.iter();
        let commit = Commit {
            counts: harvest.counts,
            records: harvest.records,
            shape,
            ingested_by: tags
                .filter_map(|tag| tag.strip_prefix("ingest-by:").map(Into::into))
                .collect(),
        };
        if !service.catalog.commit(database, table, commit) {
            return Err((
                "BadRequest_TableNotExist",
                format!("Table '{table}' does not exist."),
            ));
        }
        Ok(())
    }

    fn fail(&self, service: &Service, message: Option<&Message>, (code, details): Refused) {
        let transient = code == TRANSIENT || code.starts_with("General_");
        let now = service.clock.now();
        let text =
            |of: fn(&Message) -> &str| message.map_or(String::new(), |message| of(message).into());
        let failure = Failure {
            operation_id: Uuid::new_v4().to_string(),
            database: text(|message| &message.database),
            table: text(|message| &message.table),
            failed_on: ticks_text(now),
            source_path: text(source_path),
            source_id: text(|message| &message.id),
            details,
            failure_kind: if transient { "Transient" } else { "Permanent" },
            error_code: code.into(),
            should_retry: transient,
        };
        tracing::debug!(?failure, "the stand-in could not ingest a blob");
        if message.is_some_and(|message| message.report != Report::Nothing) {
            let report = json!({
                "OperationId": failure.operation_id,
                "Database": failure.database,
                "Table": failure.table,
                "FailedOn": failure.failed_on,
                "IngestionSourceId": failure.source_id,
                "IngestionSourcePath": failure.source_path,
                "Details": failure.details,
                "ErrorCode": failure.error_code,
                "FailureStatus": failure.failure_kind,
                "RootActivityId": failure.operation_id,
                "OriginatesFromUpdatePolicy": false,
                "ShouldRetry": failure.should_retry,
            });
            let text = STANDARD.encode(report.to_string());
            service.storage.queues.report(FAILED_QUEUE, text, now);
        }
        let mut state = self.state.lock().unwrap();
        state.failure_count += 1;
        if state.failures.len() == FAILURE_COUNT_MAX {
            state.failures.pop_front();
        }
        state.failures.push_back(failure);
    }
}

/// Lets the blob go, and reports if the message wants it.
fn succeed(service: &Service, message: &Message) {
    if let Ok((key, _)) = locate(service, message) {
        match message.retain_blob {
            true => service.storage.blobs.release(key),
            false => service.storage.blobs.delete(&key),
        }
    }
    if message.report == Report::All {
        let now = service.clock.now();
        let report = json!({
            "OperationId": Uuid::new_v4().to_string(),
            "Database": message.database,
            "Table": message.table,
            "SucceededOn": ticks_text(now),
            "IngestionSourceId": message.id,
            "IngestionSourcePath": source_path(message),
            "RootActivityId": Uuid::new_v4().to_string(),
        });
        let text = STANDARD.encode(report.to_string());
        service.storage.queues.report(SUCCEEDED_QUEUE, text, now);
    }
}

fn check_harvest(service: &Service, message: &Message, harvest: &Harvest) {
    let id = &message.id;
    let raw_size = harvest.counts.raw_size;
    if let Some(told) = message.raw_size.filter(|told| *told != raw_size) {
        let text = format!(
            "message {id}: RawDataSize is {told}, but the blob inflates to {raw_size} bytes"
        );
        service.journal.violation(text);
    }
    for violation in &harvest.violations {
        service
            .journal
            .violation(format!("message {id}: {violation}"));
    }
}

/// The blob's URL without its SAS.
fn source_path(message: &Message) -> &str {
    message.blob_path.split('?').next().unwrap_or_default()
}

/// Where in the stand-in's own storage the message points.
fn locate(service: &Service, message: &Message) -> Result<(blob::Key, Query), Refused> {
    let unknown = || {
        (
            "Download_AccountNotFound",
            format!("Not a blob of the stand-in: {}", source_path(message)),
        )
    };
    let url = url::Url::parse(&message.blob_path).map_err(|_| unknown())?;
    let account = url
        .port()
        .and_then(|port| service.storage.account_of_blob_port(port));
    let account = account.ok_or_else(unknown)?;
    let mut path = url.path().trim_start_matches('/').splitn(3, '/');
    let (Some(_), Some(container), Some(name)) = (path.next(), path.next(), path.next()) else {
        return Err(unknown());
    };
    let key = blob::Key {
        account,
        container: container.into(),
        name: percent_decode_str(name).decode_utf8_lossy().into(),
    };
    Ok((key, Query::parse(url.query().unwrap_or_default())))
}

async fn download(service: &Service, message: &Message) -> Result<Bytes, Refused> {
    let forbidden = |details: String| ("Download_Forbidden", details);
    let not_found = || {
        (
            "Download_SourceNotFound",
            "The blob does not exist.".to_owned(),
        )
    };
    let Some(external) = &service.external else {
        let (key, query) = locate(service, message)?;
        let (storage, now) = (&service.storage, service.clock.now());
        storage
            .authorize(
                now,
                key.account,
                StorageService::Blob,
                &key.container,
                "r",
                &query,
            )
            .map_err(|error| forbidden(format!("{error:?}")))?;
        return storage.blobs.read(&key).ok_or_else(not_found);
    };
    match external.download(&message.blob_path).await {
        Ok((200, bytes)) => Ok(bytes),
        Ok((404, _)) => Err(not_found()),
        Ok((403, _)) => Err(forbidden("The storage refuses the SAS.".into())),
        Ok((status, _)) => Err((TRANSIENT, format!("The storage answered {status}."))),
        Err(details) => Err((TRANSIENT, details)),
    }
}
