//! The uplink: takes sealed upload buffers from the cores, delivers them, and gives the memory back.
//!
//! Before it: [`crate::upload_buffer`] seals a batch.
//! After it: the destination holds the blob.
//! Thread: the tokio runtime beside the reactors; the two ends of a [`Handover`] are on different threads.
//! Allocates: for each blob (names, file handles); bounded, because a core has a fixed number of buffers.
//! Invariant: every batch received is delivered, or abandoned at the drain deadline and counted; its buffer always
//! goes back.
//! Not here: any memory of its own for blobs; they are written from the upload buffer.

pub mod directory;
pub mod kusto;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use backon::{ExponentialBuilder, Retryable};
use crossbeam_queue::ArrayQueue;
use tokio::sync::Notify;

use crate::config::{Config, Destination};
use crate::upload_buffer::{Batch, UploadBuffer};
use directory::Directory;

/// The two bounded queues between one core and the uplink. Neither end allocates or blocks.
pub struct Handover {
    sealed: ArrayQueue<Batch>,
    sealed_notify: Notify,
    returned: ArrayQueue<UploadBuffer>,
    returned_notify: Notify,
}

impl Handover {
    /// Queues for a core with `buffer_count` upload buffers: neither can overflow.
    pub fn new(buffer_count: usize) -> Self {
        Handover {
            sealed: ArrayQueue::new(buffer_count),
            sealed_notify: Notify::new(),
            returned: ArrayQueue::new(buffer_count),
            returned_notify: Notify::new(),
        }
    }

    /// Reactor: hands a batch over.
    pub fn send(&self, batch: Batch) {
        let sent = self.sealed.push(batch);
        assert!(sent.is_ok(), "more batches than upload buffers");
        self.sealed_notify.notify_one();
    }

    /// Uplink: the next batch, if there is one.
    pub fn receive(&self) -> Option<Batch> {
        self.sealed.pop()
    }

    /// Batches that wait for the uplink.
    pub fn sealed_count(&self) -> usize {
        self.sealed.len()
    }

    /// Uplink: gives a buffer back.
    pub fn give_back(&self, buffer: UploadBuffer) {
        let given = self.returned.push(buffer);
        assert!(given.is_ok(), "more buffers than there are");
        self.returned_notify.notify_one();
    }

    /// Reactor: waits until a buffer has come back.
    pub async fn returned(&self) -> UploadBuffer {
        loop {
            if let Some(buffer) = self.returned.pop() {
                return buffer;
            }
            self.returned_notify.notified().await;
        }
    }
}

/// What the uplink counts.
#[derive(Debug, Default)]
pub struct UplinkMetrics {
    pub blobs: AtomicU64,
    pub blob_bytes: AtomicU64,
    pub rows: AtomicU64,
    pub failures: AtomicU64,
}

/// Where batches go.
pub enum Sink {
    Directory(Arc<Directory>),
    /// Discards the blob after it was compressed.
    Null,
}

/// Delivers the batches of one core, in order, for ever.
pub struct Uplink {
    pub handover: Arc<Handover>,
    pub sink: Arc<Sink>,
    pub metrics: Arc<UplinkMetrics>,
}

impl Sink {
    /// Makes the destination ready; fails where it can already be seen that nothing could be written.
    pub fn open(config: &Config, node: &str) -> Result<Sink, crate::error::Fatal> {
        match &config.destination {
            Destination::Directory { path } => {
                let directory = Directory::open(path, &config.tables, node)?;
                Ok(Sink::Directory(Arc::new(directory)))
            }
            Destination::Null => Ok(Sink::Null),
            Destination::Kusto(_) => Err(crate::error::Fatal::KustoNotYet),
        }
    }
}

impl Uplink {
    /// Runs until the runtime ends it.
    pub async fn run(self) {
        loop {
            let Some(batch) = self.handover.receive() else {
                self.handover.sealed_notify.notified().await;
                continue;
            };
            let batch = match &*self.sink {
                Sink::Directory(directory) => self.write(directory, batch).await,
                Sink::Null => batch,
            };
            self.count(&batch);
            self.handover.give_back(batch.into_buffer());
        }
    }

    /// Writes a batch, however often it takes.
    async fn write(&self, directory: &Arc<Directory>, batch: Batch) -> Batch {
        let batch = Arc::new(batch);
        let write = || async {
            let (batch, directory) = (batch.clone(), directory.clone());
            // File systems block; the thread pool of the runtime is where that belongs.
            tokio::task::spawn_blocking(move || directory.write(&batch))
                .await
                .unwrap_or_else(|panic| Err(std::io::Error::other(panic)))
        };
        let backoff = ExponentialBuilder::default()
            .with_jitter()
            .with_min_delay(Duration::from_millis(100))
            .with_max_delay(Duration::from_secs(10))
            .without_max_times();
        let outcome = write
            .retry(backoff)
            .notify(|error, pause| {
                self.metrics.failures.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%error, ?pause, "a blob could not be written; it is kept and tried again");
            })
            .await;
        assert!(
            outcome.is_ok(),
            "retries without a limit end only in success"
        );
        Arc::into_inner(batch).expect("the writer has returned its share")
    }

    fn count(&self, batch: &Batch) {
        self.metrics.blobs.fetch_add(1, Ordering::Relaxed);
        self.metrics
            .blob_bytes
            .fetch_add(batch.member.size as u64, Ordering::Relaxed);
        self.metrics
            .rows
            .fetch_add(batch.row_count, Ordering::Relaxed);
    }
}
