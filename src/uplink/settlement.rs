//! Settling: what is recorded, counted and given back once a batch is at its end.
//!
//! Before it: the destination has the batch, or the dead letters do.
//! After it: its core knows, its memory is back, its segment is free.
//! Thread: the uplink's runtime; retiring blocks, on a thread for that. Allocates: nothing.
//! Invariant: a core hears of a delivery before it gets the memory back, so that its books are never behind.
//! Not here: delivering.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::sync::Notify;

use super::{Delivered, Fate, Handover, UplinkMetrics};
use crate::spool::disk::Disk;
use crate::spool::{Segments, Spool};
use crate::upload_buffer::Batch;

/// What settling needs.
pub struct Settlement<D> {
    /// Of all cores: a batch from the backlog is reported to the one it came from.
    pub handovers: Arc<Vec<Arc<Handover>>>,
    pub spool: Option<Arc<Spool<D>>>,
    pub metrics: Arc<UplinkMetrics>,
    pub underway: Arc<Underway>,
}

/// Deliveries that have begun and not ended, and whether a drain goes on with what is in the spool alone.
#[derive(Debug, Default)]
pub struct Underway {
    count: AtomicUsize,
    ended: Notify,
    gave_up: AtomicBool,
}

/// One of them, until it is settled or its batch is where it came from.
pub struct Delivering(Arc<Underway>);

impl Drop for Delivering {
    fn drop(&mut self) {
        self.0.count.fetch_sub(1, Ordering::SeqCst);
        self.0.ended.notify_one();
    }
}

impl Underway {
    /// To be called before a batch is taken, so that none is ever nowhere.
    pub fn begin(self: &Arc<Self>) -> Delivering {
        self.count.fetch_add(1, Ordering::SeqCst);
        Delivering(self.clone())
    }

    /// A delivery failed during a drain: what is in the spool alone stays there.
    pub fn give_up(&self) {
        self.gave_up.store(true, Ordering::SeqCst);
    }

    pub fn gave_up(&self) -> bool {
        self.gave_up.load(Ordering::SeqCst)
    }

    /// Completes when everything in the spool is delivered, or nobody goes on with it. For one caller.
    pub async fn all_ended(&self, segments: &Segments) {
        while !(self.gave_up() || segments.backlog_count() == 0)
            || self.count.load(Ordering::SeqCst) > 0
        {
            self.ended.notified().await;
        }
    }
}

impl<D: Disk> Settlement<D> {
    /// The queues of the core that made the batch.
    pub fn handover(&self, batch: &Batch) -> &Arc<Handover> {
        &self.handovers[batch.id.core as usize % self.handovers.len()]
    }

    /// Counts the batch, and tells its core where that wants to know.
    pub fn report(&self, batch: &Batch, fate: Fate) {
        self.count(batch, fate);
        if batch.reported {
            self.handover(batch).delivered(Delivered {
                table_index: batch.table_index,
                position_end: batch.position_end,
                awaited: batch.awaited,
                spooled: batch.spooled.is_some(),
                fate,
            });
        }
    }

    /// Gives back what a reported batch held.
    pub async fn release(&self, mut batch: Batch) {
        if let Some(memory) = batch.memory.take() {
            self.handover(&batch).give_back(memory.into_buffer());
        }
        if let (Some(spool), Some(spooled)) = (&self.spool, batch.spooled) {
            let spool = spool.clone();
            let retired = tokio::task::spawn_blocking(move || spool.retire(&spooled));
            retired.await.expect("retiring does not panic");
        }
    }

    fn count(&self, batch: &Batch, fate: Fate) {
        let metrics = &self.metrics;
        let spooled = batch.spooled.is_some();
        let rows = match (fate, spooled) {
            (Fate::Delivered, true) => &metrics.rows_spooled,
            (Fate::Delivered, false) => &metrics.rows_unspooled,
            (Fate::DeadLetter, true) => &metrics.dead_rows_spooled,
            (Fate::DeadLetter, false) => &metrics.dead_rows_unspooled,
        };
        rows.fetch_add(batch.totals.row_count, Ordering::Relaxed);
        if fate == Fate::Delivered {
            metrics.blobs.fetch_add(1, Ordering::Relaxed);
            metrics
                .blob_bytes
                .fetch_add(batch.blob_size(), Ordering::Relaxed);
        }
    }
}
