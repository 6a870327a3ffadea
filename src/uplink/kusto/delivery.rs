//! One delivery: a blob, then its message, each where it is most likely to be taken.
//!
//! Before it: the uplink has a batch, and calls again after a failure until it succeeds or gives up.
//! After it: the service ingests.
//! Thread: the uplink's runtime. Allocates: names, URLs and the message, per attempt.
//! Invariant: once a blob is put, every later attempt posts the same `Id` and the same path; the signature in it is
//! exchanged only when the old one is about to end.
//! Not here: when to try again (the caller), how resources are ordered (`ranking.rs`).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::Instant;

use bytes::Bytes;
use futures_util::stream::poll_fn;
use jiff::Timestamp;
use reqwest::Body;

use super::Shared;
use super::message::{self, MessageParts};
use super::resources::Resources;
use super::storage::{self, Put};
use crate::config::Table;
use crate::error::{Remedy, UploadError, UploadStep};
use crate::limits::{
    BLOB_NAME_ENTITY_SIZE_MAX, BLOB_PIECE_SIZE, BLOB_RAW_SIZE_MAX, FILE_NAME_SIZE_MAX,
    SAS_LIFETIME_LEFT_MIN, STORAGE_ATTEMPT_COUNT,
};
use crate::secret::SasUrl;

/// What is known of a blob before it is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobMeta {
    /// Never used for other rows, the same after a crash; URL-safe, and ends in `.json.gz`, as the service tells by it
    /// that the blob is compressed.
    pub name: String,
    pub table_index: usize,
    /// Compressed, in bytes.
    pub size: u64,
    /// Uncompressed, in bytes.
    pub raw_size: u64,
    pub row_count: u64,
    /// When the first row came.
    pub created_at: Timestamp,
}

/// Where a blob's bytes come from, again for each attempt.
///
/// A body may outlive the attempt that it was made for, by as long as its connection takes to notice: who wants the
/// memory back learns from the drop of what the bytes own (`Bytes::from_owner`), not from the attempt's end.
pub trait BlobSource: Send + Sync {
    /// The blob from its first byte; exactly `BlobMeta::size` bytes.
    fn body(&self) -> std::io::Result<Body>;
}

/// In memory; a clone shares it.
///
/// In pieces, and each is written before the next is given: one write of the whole would keep a CPU in the kernel for
/// milliseconds, where a reactor may be waiting for it.
impl BlobSource for Bytes {
    fn body(&self) -> std::io::Result<Body> {
        let mut left = self.clone();
        let mut is_written = true;
        Ok(Body::wrap_stream(poll_fn(move |context| {
            if left.is_empty() {
                return Poll::Ready(None);
            }
            if !std::mem::replace(&mut is_written, true) {
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            is_written = false;
            let piece = left.split_to(left.len().min(BLOB_PIECE_SIZE));
            Poll::Ready(Some(Ok::<_, std::io::Error>(piece)))
        })))
    }
}

/// What deliveries count.
#[derive(Debug, Default)]
pub struct DeliveryMetrics {
    pub blobs_put: AtomicU64,
    /// Blobs that an earlier attempt had put.
    pub blobs_found: AtomicU64,
    pub put_failures: AtomicU64,
    pub messages_posted: AtomicU64,
    pub post_failures: AtomicU64,
}

/// The delivery of one batch, kept by the caller until it succeeds.
pub struct Delivery {
    shared: Arc<Shared>,
    blob: BlobMeta,
    /// The blob's name in its container.
    stored_name: String,
    /// Where the blob is, once it is put.
    placed: Option<Placed>,
    /// Of the resources that the last attempt used.
    generation: u64,
}

struct Placed {
    container: SasUrl,
    blob: SasUrl,
}

impl Delivery {
    pub(super) fn new(shared: Arc<Shared>, blob: BlobMeta) -> Self {
        let name = &blob.name;
        assert!(
            name.ends_with(".json.gz") && name.len() <= FILE_NAME_SIZE_MAX,
            "the service tells compression and format by the name"
        );
        assert!(name.bytes().all(is_url_safe), "a blob's name is URL-safe");
        let table = &shared.tables[blob.table_index];
        let stored_name = stored_name(table, name);
        Delivery {
            shared,
            blob,
            stored_name,
            placed: None,
            generation: 0,
        }
    }

    pub fn blob(&self) -> &BlobMeta {
        &self.blob
    }

    /// Puts the blob unless that is done, and posts its message. After an error, or where the future was dropped before
    /// its end, call again with the same rows.
    pub async fn attempt(&mut self, source: &dyn BlobSource) -> Result<(), UploadError> {
        self.verify()?;
        let resources = self.shared.resources.current().await?;
        self.generation = resources.generation;
        self.renew(&resources);
        let blob_url = match &self.placed {
            Some(placed) => placed.blob.clone(),
            None => {
                let placed = self.put(&resources, source).await?;
                self.placed.insert(placed).blob.clone()
            }
        };
        self.post(&resources, &blob_url).await
    }

    /// Waits until there are newer resources than those that the last attempt used. For [`Remedy::Refresh`].
    pub async fn refreshed(&self) {
        self.shared.resources.newer_than(self.generation).await;
    }

    /// What the service would refuse later, when nobody is there any more to hear it.
    fn verify(&self) -> Result<(), UploadError> {
        let refuse = |code: &str, detail: String| {
            Err(UploadError {
                remedy: Remedy::DeadLetter,
                step: UploadStep::PutBlob,
                code: code.into(),
                detail,
            })
        };
        let blob = &self.blob;
        if blob.raw_size == 0 || blob.size == 0 || blob.row_count == 0 {
            return refuse("blob_empty", "the blob has no rows".into());
        }
        if blob.raw_size > BLOB_RAW_SIZE_MAX {
            let detail = format!(
                "the blob has {} bytes of rows, the service takes {BLOB_RAW_SIZE_MAX}; reduce \
                 upload.buffer_size",
                blob.raw_size
            );
            return refuse("blob_too_large", detail);
        }
        Ok(())
    }

    /// Keeps where the blob is, with a signature that is good for as long as the service may need.
    fn renew(&mut self, resources: &Resources) {
        let Some(placed) = &mut self.placed else {
            return;
        };
        let needed_until = Timestamp::now() + SAS_LIFETIME_LEFT_MIN;
        let expires_at = placed.container.expires_at();
        if expires_at.is_none_or(|expires_at| expires_at > needed_until) {
            return;
        }
        let mut containers = resources.containers.iter();
        match containers.find(|container| container.place() == placed.container.place()) {
            Some(container) => {
                placed.blob = container.join(&self.stored_name);
                placed.container = container.clone();
            }
            // The service uses that container no more, and nobody can read the blob there for long.
            None => self.placed = None,
        }
    }

    async fn put(
        &self,
        resources: &Resources,
        source: &dyn BlobSource,
    ) -> Result<Placed, UploadError> {
        let shared = &self.shared;
        let order = shared
            .ranking
            .order(&resources.containers, &self.blob.name, Instant::now());
        let mut failure = None;
        for container in order.into_iter().take(STORAGE_ATTEMPT_COUNT) {
            let blob = container.join(&self.stored_name);
            let body = source.body().map_err(|error| UploadError {
                remedy: Remedy::Retry { after: None },
                step: UploadStep::PutBlob,
                code: "blob_unreadable".into(),
                detail: format!("the blob cannot be read: {error}"),
            })?;
            let put = storage::put_blob(&shared.http, &blob, body, self.blob.size).await;
            shared.note(container, &put);
            match put {
                Ok(put) => {
                    shared.metrics.count_put(put);
                    let container = container.clone();
                    return Ok(Placed { container, blob });
                }
                Err(error) => {
                    shared.metrics.put_failures.fetch_add(1, Ordering::Relaxed);
                    failure = Some(self.failed(failure, error)?);
                }
            }
        }
        Err(failure.expect("there is at least one container"))
    }

    async fn post(&self, resources: &Resources, blob_url: &SasUrl) -> Result<(), UploadError> {
        let shared = &self.shared;
        let parts = MessageParts {
            blob_name: &self.blob.name,
            blob_url,
            raw_size: self.blob.raw_size,
            created_at: self.blob.created_at,
            identity_token: &resources.identity_token,
        };
        let table = &shared.tables[self.blob.table_index];
        let json = message::json(table, &parts).map_err(|too_large| UploadError {
            remedy: Remedy::Park,
            step: UploadStep::PostMessage,
            code: "message_too_large".into(),
            detail: format!(
                "the queue message has {} bytes, a queue takes {}; use shorter names of database, \
                 table and mapping",
                too_large.size,
                crate::limits::MESSAGE_SIZE_MAX
            ),
        })?;
        let order = shared
            .ranking
            .order(&resources.queues, &self.blob.name, Instant::now());
        let mut failure = None;
        for queue in order.into_iter().take(STORAGE_ATTEMPT_COUNT) {
            let posted = storage::post_message(&shared.http, queue, &json).await;
            shared.note(queue, &posted);
            match posted {
                Ok(()) => {
                    shared
                        .metrics
                        .messages_posted
                        .fetch_add(1, Ordering::Relaxed);
                    return Ok(());
                }
                Err(error) => {
                    shared.metrics.post_failures.fetch_add(1, Ordering::Relaxed);
                    failure = Some(self.failed(failure, error)?);
                }
            }
        }
        Err(failure.expect("there is at least one queue"))
    }

    /// The error to report if no further resource helps; an error at once where none can.
    fn failed(
        &self,
        before: Option<UploadError>,
        error: UploadError,
    ) -> Result<UploadError, UploadError> {
        tracing::debug!(%error, blob = self.blob.name, "a resource did not take it; the next is tried");
        match error.remedy {
            Remedy::Refresh => self.shared.resources.request(),
            Remedy::DeadLetter => return Err(error),
            Remedy::Retry { .. } | Remedy::Park => {}
        }
        Ok(match before {
            Some(before) => both(before, error),
            None => error,
        })
    }
}

/// What two places said, as one error: the shortest pause that was asked for, since one place is enough; else that a
/// refresh is under way, which may cure the other as well.
fn both(before: UploadError, error: UploadError) -> UploadError {
    let pause = |error: &UploadError| match error.remedy {
        Remedy::Retry { after } => after,
        _ => None,
    };
    match [pause(&before), pause(&error)].into_iter().flatten().min() {
        Some(after) => UploadError {
            remedy: Remedy::Retry { after: Some(after) },
            ..error
        },
        None if before.remedy == Remedy::Refresh => before,
        None => error,
    }
}

impl Shared {
    /// Notes for the ranking how a resource did; a request that no account would take is nobody's failure.
    fn note<T>(&self, resource: &SasUrl, result: &Result<T, UploadError>) {
        let is_fault_of_request = matches!(
            result,
            Err(UploadError {
                remedy: Remedy::DeadLetter,
                ..
            })
        );
        if !is_fault_of_request {
            self.ranking.note(resource, result.is_ok(), Instant::now());
        }
    }
}

impl DeliveryMetrics {
    fn count_put(&self, put: Put) {
        let counter = match put {
            Put::Created => &self.blobs_put,
            Put::Found => &self.blobs_found,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// `{database}__{table}__{blob}`. The first two are for people who look into the container; the last is unique.
fn stored_name(table: &Table, blob_name: &str) -> String {
    let readable = |name: &str| -> String {
        let safe = |c: char| match c.is_ascii() && is_url_safe(c as u8) {
            true => c,
            false => '_',
        };
        name.chars()
            .map(safe)
            .take(BLOB_NAME_ENTITY_SIZE_MAX)
            .collect()
    };
    let (database, table) = (readable(&table.database), readable(&table.table));
    format!("{database}__{table}__{blob_name}")
}

/// RFC 3986 §2.3: unreserved characters, which no URL encodes.
fn is_url_safe(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Dedup;
    use proptest::prelude::*;
    use std::time::Duration;

    #[test]
    fn the_shortest_pause_wins_and_then_a_refresh() {
        let error = |remedy, code: &str| UploadError {
            remedy,
            step: UploadStep::PutBlob,
            code: code.into(),
            detail: String::new(),
        };
        let retry = |seconds: Option<u64>| Remedy::Retry {
            after: seconds.map(Duration::from_secs),
        };
        for (before, after, expected) in [
            (retry(None), retry(None), retry(None)),
            (retry(Some(9)), retry(Some(4)), retry(Some(4))),
            (retry(Some(4)), retry(None), retry(Some(4))),
            (Remedy::Refresh, retry(Some(4)), retry(Some(4))),
            (Remedy::Refresh, retry(None), Remedy::Refresh),
            (retry(None), Remedy::Refresh, Remedy::Refresh),
        ] {
            let both = both(error(before, "a"), error(after, "b"));
            assert_eq!(both.remedy, expected, "{before:?} {after:?}");
        }
        // The words are of the error that has the remedy.
        let both = both(error(Remedy::Refresh, "a"), error(retry(None), "b"));
        assert_eq!(both.code, "a");
    }

    proptest! {
        #[test]
        fn a_stored_name_is_one_safe_segment(database in ".{0,400}", table in ".{0,400}") {
            let table = Table { database, table, mapping: None, dedup: Dedup::Off, spooled: true, delivered: false };
            let name = stored_name(&table, "0199-c0-00000012.json.gz");
            prop_assert!(name.bytes().all(is_url_safe), "{}", name);
            prop_assert!(name.ends_with("__0199-c0-00000012.json.gz"));
            prop_assert!(name.len() <= 1024);
        }
    }
}
