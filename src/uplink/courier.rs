//! The courier: brings batches to Kusto, several at a time, each as often as it takes.
//!
//! Before it: [`super::Uplink`] of a core has a batch and a place for it.
//! After it: blob and message are with Azure, or the batch is a dead letter, or it waits in the spool.
//! Thread: tasks of the uplink's runtime, one per batch; files are read and written on threads that may block.
//! Allocates: per delivery, bounded: at most `uplink.concurrency` are on their way, and `DELIVERY_RESTING_MAX` rest.
//! Invariant: no batch is given up by count or age: it is delivered, put to the dead letters where the service's own
//! code says that it will never be taken, or kept. One [`Delivery`] is kept with its batch from attempt to attempt, so a
//! message is repeated with the same `Id` and path. A batch that fails leaves its place to others while it rests.
//! Not here: what one attempt is ([`super::kusto`]).

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::body::{SegmentBlob, lend};
use super::dead_letter::{DeadLetters, Reason};
use super::kusto::{BlobMeta, Delivery, Kusto};
use super::settlement::{Delivering, Settlement};
use super::{Fate, backoff};
use crate::config::{Config, Table};
use crate::error::{Remedy, UploadError};
use crate::limits::{
    DELIVERY_PARKED_PAUSE, DELIVERY_PAUSE_MAX, DELIVERY_RESTING_MAX, FRAME_BUFFER_SIZE,
};
use crate::reactor::Phase;
use crate::spool::disk::Disk;
use crate::upload_buffer::Batch;

/// Delivers batches of all cores to Kusto.
pub struct Courier<D> {
    pub kusto: Arc<Kusto>,
    pub dead_letters: Arc<DeadLetters>,
    settlement: Arc<Settlement<D>>,
    /// The configured tables, and those that only the spool knows.
    tables: Vec<Table>,
    /// Places for blobs on their way.
    places: Arc<Semaphore>,
    /// Places for batches that rest after a failure.
    rests: Arc<Semaphore>,
    phase: watch::Receiver<Phase>,
}

impl<D: Disk> Courier<D> {
    pub fn new(
        config: &Config,
        kusto: Arc<Kusto>,
        dead_letters: Arc<DeadLetters>,
        settlement: Arc<Settlement<D>>,
        tables: Vec<Table>,
        phase: watch::Receiver<Phase>,
    ) -> Self {
        Courier {
            kusto,
            dead_letters,
            settlement,
            tables,
            places: Arc::new(Semaphore::new(config.uplink.concurrency)),
            rests: Arc::new(Semaphore::new(DELIVERY_RESTING_MAX)),
            phase,
        }
    }

    /// A place for one more blob on its way; in the order of asking.
    pub async fn place(&self) -> OwnedSemaphorePermit {
        let place = self.places.clone().acquire_owned().await;
        place.expect("places are never closed")
    }

    /// Delivers one batch, from the attempt in `place` to its end.
    pub async fn deliver(
        self: Arc<Self>,
        mut batch: Batch,
        place: OwnedSemaphorePermit,
        _delivering: Delivering,
    ) {
        let memory = batch.memory.take();
        let mut memory =
            memory.map(|memory| lend(memory, self.settlement.handover(&batch).clone()));
        let mut delivery = self.kusto.begin(meta(&batch));
        let mut backoff = backoff();
        let mut place = Some(place);
        loop {
            let attempted = match &memory {
                Some(bytes) => delivery.attempt(bytes).await,
                None => delivery.attempt(&self.segment_blob(&batch)).await,
            };
            let Err(error) = attempted else {
                self.settle(batch, Fate::Delivered, memory).await;
                return;
            };
            self.settlement
                .metrics
                .failures
                .fetch_add(1, Ordering::Relaxed);
            let blob = batch.id.blob_name();
            tracing::warn!(%error, blob, "a blob could not be delivered; it is kept and tried again");
            if error.remedy == Remedy::DeadLetter && self.bury(&batch, &memory, &error).await {
                self.settle(batch, Fate::DeadLetter, memory).await;
                return;
            }
            if self.draining() {
                self.settlement.underway.give_up();
            }
            if batch.spooled.is_some() {
                // Its core needs the memory more; the segment has it all.
                memory = None;
                if self.draining() {
                    return self.defer(batch);
                }
            }
            let rest = self.rests.clone().try_acquire_owned().ok();
            if rest.is_some() {
                place = None;
            }
            let pause = backoff.next().unwrap_or(DELIVERY_PAUSE_MAX);
            self.rest(&error, &delivery, pause).await;
            if rest.is_none() && batch.spooled.is_some() {
                // So many have failed that this one kept its place: now it is another's turn. Name, `Id` and container
                // follow from the batch, so little is lost with what the delivery knew.
                return self.defer(batch);
            }
            drop(rest);
            if place.is_none() {
                place = Some(self.place().await);
            }
        }
    }

    fn draining(&self) -> bool {
        *self.phase.borrow() >= Phase::Draining
    }

    fn defer(&self, batch: Batch) {
        let spool = self.settlement.spool.as_ref();
        let spool = spool.expect("the batch is in the spool");
        spool.segments().defer(batch);
    }

    fn segment_blob(&self, batch: &Batch) -> SegmentBlob<D> {
        let spool = self.settlement.spool.clone();
        SegmentBlob {
            spool: spool.expect("a batch is in memory or in the spool"),
            spooled: batch.spooled.clone().expect("as said"),
            totals: batch.totals,
        }
    }

    async fn settle(&self, batch: Batch, fate: Fate, memory: Option<Bytes>) {
        self.settlement.report(&batch, fate);
        drop(memory);
        self.settlement.release(batch).await;
    }

    /// Waits as the error asks; a drain ends the wait.
    async fn rest(&self, error: &UploadError, delivery: &Delivery, pause: Duration) {
        let mut phase = self.phase.clone();
        let rested = async {
            match error.remedy {
                Remedy::Retry { after } => {
                    tokio::time::sleep(pause.max(after.unwrap_or_default())).await;
                }
                // New resources may be what it takes, and may not come for long.
                Remedy::Refresh => {
                    let refreshed = delivery.refreshed();
                    let _ = tokio::time::timeout(DELIVERY_PARKED_PAUSE, refreshed).await;
                    tokio::time::sleep(pause).await;
                }
                Remedy::Park | Remedy::DeadLetter => {
                    let refreshed = delivery.refreshed();
                    let _ = tokio::time::timeout(DELIVERY_PARKED_PAUSE, refreshed).await;
                }
            }
        };
        if self.draining() {
            // Only what is in memory alone is still tried, until the drain ends.
            return tokio::time::sleep(pause).await;
        }
        tokio::select! {
            () = rested => {}
            _ = phase.wait_for(|phase| *phase >= Phase::Draining) => {}
        }
    }

    /// Puts a batch to the dead letters. `false` where it could not be: then it is kept.
    async fn bury(&self, batch: &Batch, memory: &Option<Bytes>, error: &UploadError) -> bool {
        let table = &self.tables[batch.table_index];
        let reason = Reason::new(batch, table, error);
        let dead_letters = self.dead_letters.clone();
        let memory = memory.clone();
        let segment = match &memory {
            Some(_) => None,
            None => Some(self.segment_blob(batch)),
        };
        let put = tokio::task::spawn_blocking(move || {
            dead_letters.put(&reason, |file| match (memory, segment) {
                (Some(bytes), _) => file.write_all(&bytes),
                (None, Some(blob)) => {
                    let mut window = vec![0; FRAME_BUFFER_SIZE];
                    let mut reader = blob.spool.reader(&blob.spooled, &mut window);
                    reader.copy_member(&blob.totals, file)
                }
                (None, None) => unreachable!("a batch is in memory or in the spool"),
            })
        });
        let put = put.await.expect("writing a dead letter does not panic");
        let blob = batch.id.blob_name();
        match put {
            Ok(()) => {
                tracing::error!(
                    %error, blob, database = table.database, table = table.table, rows = batch.totals.row_count,
                    "Kusto will never take this blob: it is a dead letter now; see `weir dead-letter`"
                );
                true
            }
            Err(fault) => {
                tracing::error!(%fault, blob, "a dead letter could not be written; the batch is kept");
                false
            }
        }
    }
}

/// What is known of a batch's blob before it is sent.
pub fn meta(batch: &Batch) -> BlobMeta {
    let begun_at = i64::try_from(batch.begun_at_ms).ok();
    let begun_at = begun_at.and_then(|ms| Timestamp::from_millisecond(ms).ok());
    BlobMeta {
        name: batch.id.blob_name(),
        table_index: batch.table_index,
        size: batch.blob_size(),
        raw_size: batch.totals.raw_size,
        row_count: batch.totals.row_count,
        // A header that was damaged within its checksum does not exist; a clock before 1970 does.
        created_at: begun_at.unwrap_or(Timestamp::UNIX_EPOCH),
    }
}
