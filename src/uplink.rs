//! The uplink: takes sealed upload buffers from the cores, delivers them, and gives the memory back.
//!
//! Before it: [`crate::upload_buffer`] seals a batch.
//! After it: the destination holds the blob, and the spool has recorded it.
//! Thread: the tokio runtime beside the reactors; the two ends of a [`Handover`] are on different threads.
//! Allocates: for each blob (names, file handles, a window to read a segment); bounded, because each core delivers one
//! batch at a time.
//! Invariant: every batch is delivered, or stays in the spool; one that is in memory alone is kept and tried again until
//! the drain ends. Its buffer always goes back.
//! Not here: any memory of its own for blobs; they are written from the upload buffer, or read from their segment.

pub mod directory;

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use crossbeam_queue::ArrayQueue;
use tokio::sync::{Notify, watch};

use crate::config::{Config, Destination, Table};
use crate::memory::Region;
use crate::reactor::Phase;
use crate::spool::disk::Disk;
use crate::spool::{Segments, Spool};
use crate::upload_buffer::{Batch, UploadBuffer};
use directory::Directory;

/// What a core is told by the uplink.
enum Return {
    Buffer(Box<UploadBuffer>),
    Delivered(Delivered),
}

/// A batch of this core has reached its destination.
pub struct Delivered {
    pub table_index: usize,
    pub position_end: u64,
    pub awaited: bool,
    /// Whether it was in the spool as well.
    pub spooled: bool,
}

/// The two bounded queues between one core and the uplink. Neither end allocates or blocks.
pub struct Handover {
    sealed: ArrayQueue<Batch>,
    sealed_notify: Notify,
    returned: ArrayQueue<Return>,
    returned_notify: Notify,
    /// Where a batch goes whose memory is taken back.
    segments: Option<Arc<Segments>>,
}

/// What the uplink gives back to a core.
pub enum Returned {
    Buffer(Box<UploadBuffer>),
    Delivered(Delivered),
    /// Nothing, but something that the core waits for may have changed.
    Nudge,
}

impl Handover {
    /// Queues for a core with `buffer_count` upload buffers, which wants to hear of up to `reported_max` deliveries
    /// besides those of batches in memory: neither can overflow.
    pub fn new(buffer_count: usize, reported_max: usize, segments: Option<Arc<Segments>>) -> Self {
        Handover {
            sealed: ArrayQueue::new(buffer_count),
            sealed_notify: Notify::new(),
            returned: ArrayQueue::new(2 * buffer_count + reported_max),
            returned_notify: Notify::new(),
            segments,
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

    /// Reactor: the memory of a durable batch that the uplink has not begun with; the batch stays in the spool.
    pub fn take_back(&self) -> Option<Box<UploadBuffer>> {
        let segments = self.segments.as_ref()?;
        for _ in 0..self.sealed.len() {
            let mut batch = self.sealed.pop()?;
            if batch.spooled.is_some()
                && let Some(memory) = batch.memory.take()
            {
                segments.defer(batch);
                return Some(memory.into_buffer());
            }
            self.send(batch);
        }
        None
    }

    /// Uplink: gives a buffer back.
    pub fn give_back(&self, buffer: Box<UploadBuffer>) {
        self.send_back(Return::Buffer(buffer));
    }

    /// Uplink: a batch of this core is delivered.
    pub fn delivered(&self, delivered: Delivered) {
        self.send_back(Return::Delivered(delivered));
    }

    fn send_back(&self, returned: Return) {
        let given = self.returned.push(returned);
        assert!(given.is_ok(), "more to give back than there is");
        self.returned_notify.notify_one();
    }

    /// Uplink: makes the core look again at what it waits for.
    pub fn nudge(&self) {
        self.returned_notify.notify_one();
    }

    /// Reactor: completes with the next thing that comes back.
    pub async fn returned(&self) -> Returned {
        let take = || match self.returned.pop() {
            Some(Return::Buffer(buffer)) => Some(Returned::Buffer(buffer)),
            Some(Return::Delivered(delivered)) => Some(Returned::Delivered(delivered)),
            None => None,
        };
        if let Some(returned) = take() {
            return returned;
        }
        self.returned_notify.notified().await;
        take().unwrap_or(Returned::Nudge)
    }
}

/// What the uplink counts.
#[derive(Debug, Default)]
pub struct UplinkMetrics {
    pub blobs: AtomicU64,
    pub blob_bytes: AtomicU64,
    /// Rows delivered, from tables that are spooled and from others.
    pub rows_spooled: AtomicU64,
    pub rows_unspooled: AtomicU64,
    pub failures: AtomicU64,
}

impl UplinkMetrics {
    pub fn rows(&self) -> u64 {
        self.rows_spooled.load(Ordering::Relaxed) + self.rows_unspooled.load(Ordering::Relaxed)
    }
}

/// Where batches go.
pub enum Sink {
    Directory(Arc<Directory>),
    /// Discards the blob after it was compressed.
    Null,
}

impl Sink {
    /// Makes the destination ready. Where it can already be seen that nothing could be written it fails, or, if
    /// `may_be_away`, says so.
    pub fn open(
        config: &Config,
        tables: &[Table],
        may_be_away: bool,
    ) -> Result<Sink, crate::error::Fatal> {
        match &config.destination {
            Destination::Directory { path } => {
                let directory = Directory::open(path, tables, may_be_away)?;
                Ok(Sink::Directory(Arc::new(directory)))
            }
            Destination::Null => Ok(Sink::Null),
        }
    }
}

/// Delivers the batches of one core, and its share of the backlog, for ever.
pub struct Uplink<D> {
    pub core_index: usize,
    /// Of all cores: a batch from the backlog is reported to the one it came from.
    pub handovers: Arc<Vec<Arc<Handover>>>,
    pub spool: Option<Arc<Spool<D>>>,
    /// Where segments are read; absent while one is.
    pub window: Option<Region>,
    pub sink: Arc<Sink>,
    pub metrics: Arc<UplinkMetrics>,
    pub phase: watch::Receiver<Phase>,
}

/// What became of an attempt to deliver.
enum Attempt {
    Delivered,
    /// It is kept, in memory or in the spool.
    Failed,
}

impl<D: Disk> Uplink<D> {
    /// Runs until the runtime ends it.
    pub async fn run(mut self) {
        let mut backoff = backoff();
        let mut from_backlog = false;
        loop {
            // By turns, so that neither what is new nor what is old waits for the other to end.
            let Some(batch) = self.next(from_backlog) else {
                self.wait().await;
                continue;
            };
            from_backlog = batch.memory.is_some();
            match self.attempt(batch).await {
                Attempt::Delivered => backoff = self::backoff(),
                Attempt::Failed => {
                    let pause = backoff.next().unwrap_or(BACKOFF_MAX);
                    self.pause(pause).await;
                }
            }
        }
    }

    fn handover(&self) -> &Handover {
        &self.handovers[self.core_index]
    }

    /// The next batch to deliver. While the node drains, what is in the spool alone stays there.
    fn next(&self, backlog_first: bool) -> Option<Batch> {
        let sealed = || self.handover().receive();
        let backlog = || {
            let spool = self.spool.as_ref().filter(|_| !self.draining())?;
            spool.segments().backlog_next()
        };
        if backlog_first {
            backlog().or_else(sealed)
        } else {
            sealed().or_else(backlog)
        }
    }

    fn draining(&self) -> bool {
        *self.phase.borrow() >= Phase::Draining
    }

    async fn wait(&self) {
        let sealed = self.handover().sealed_notify.notified();
        match &self.spool {
            Some(spool) if !self.draining() => tokio::select! {
                () = sealed => {}
                () = spool.segments().backlog_grown() => {}
            },
            _ => sealed.await,
        }
    }

    /// Lets a destination that failed rest; a drain ends the rest.
    async fn pause(&self, pause: Duration) {
        let mut phase = self.phase.clone();
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = phase.wait_for(|phase| *phase >= Phase::Draining), if !self.draining() => {}
        }
    }

    /// Delivers a batch. Where it fails, a batch that is in the spool gives up its memory.
    async fn attempt(&mut self, mut batch: Batch) -> Attempt {
        let (outcome, returned) = match &*self.sink {
            Sink::Null => (Ok(()), batch),
            Sink::Directory(directory) => {
                let directory = directory.clone();
                self.write(directory, batch).await
            }
        };
        batch = returned;
        match outcome {
            Ok(()) => {
                self.settle(batch).await;
                Attempt::Delivered
            }
            Err(error) => {
                self.metrics.failures.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%error, blob = batch.id.blob_name(), "a blob could not be delivered; it is kept and tried again");
                match &self.spool {
                    Some(spool) if batch.spooled.is_some() => {
                        if let Some(memory) = batch.memory.take() {
                            self.handover().give_back(memory.into_buffer());
                        }
                        spool.segments().defer(batch);
                    }
                    // It is nowhere else. It keeps its buffer, and its turn.
                    _ => self.handover().send(batch),
                }
                Attempt::Failed
            }
        }
    }

    /// Writes a batch to the directory. File systems block, so it happens on a thread for that.
    async fn write(&mut self, directory: Arc<Directory>, batch: Batch) -> (io::Result<()>, Batch) {
        let spool = self.spool.clone();
        let window = self.window.take();
        let mut window = window.expect("one delivery at a time");
        let written = tokio::task::spawn_blocking(move || {
            let outcome = directory.write(&batch, |file| {
                match (&batch.memory, &spool, &batch.spooled) {
                    (Some(memory), ..) => file.write_all(memory.bytes()),
                    (None, Some(spool), Some(spooled)) => {
                        let mut reader = spool.reader(spooled, &mut window);
                        reader.copy_member(&batch.totals, file)
                    }
                    _ => unreachable!("a batch is in memory or in the spool"),
                }
            });
            (outcome, batch, window)
        });
        let (outcome, batch, window) = written.await.expect("a delivery does not panic");
        self.window = Some(window);
        (outcome, batch)
    }

    /// Records that a batch is delivered, and gives back what it held.
    async fn settle(&self, mut batch: Batch) {
        self.count(&batch);
        let handover = &self.handovers[batch.id.core as usize % self.handovers.len()];
        if batch.reported {
            handover.delivered(Delivered {
                table_index: batch.table_index,
                position_end: batch.position_end,
                awaited: batch.awaited,
                spooled: batch.spooled.is_some(),
            });
        }
        if let Some(memory) = batch.memory.take() {
            handover.give_back(memory.into_buffer());
        }
        if let (Some(spool), Some(spooled)) = (&self.spool, batch.spooled) {
            let spool = spool.clone();
            let retired = tokio::task::spawn_blocking(move || spool.retire(&spooled));
            retired.await.expect("retiring does not panic");
        }
    }

    fn count(&self, batch: &Batch) {
        let rows = if batch.spooled.is_some() {
            &self.metrics.rows_spooled
        } else {
            &self.metrics.rows_unspooled
        };
        rows.fetch_add(batch.totals.row_count, Ordering::Relaxed);
        self.metrics.blobs.fetch_add(1, Ordering::Relaxed);
        self.metrics
            .blob_bytes
            .fetch_add(batch.blob_size(), Ordering::Relaxed);
    }
}

const BACKOFF_MAX: Duration = Duration::from_secs(10);

fn backoff() -> impl Iterator<Item = Duration> {
    ExponentialBuilder::default()
        .with_jitter()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(BACKOFF_MAX)
        .without_max_times()
        .build()
}

/// Keeps segments open for the cores, and takes space that the disk did not have before.
pub async fn refill<D: Disk>(spool: Arc<Spool<D>>, handovers: Arc<Vec<Arc<Handover>>>) {
    const SHORT_PAUSE: Duration = Duration::from_secs(1);
    loop {
        let again = spool.clone();
        let work = move || {
            if again.is_short() {
                let _ = again.make_missing();
            }
            again.refill()
        };
        if tokio::task::spawn_blocking(work).await.unwrap_or(false) {
            for handover in handovers.iter() {
                handover.nudge();
            }
        }
        if spool.is_short() {
            let _ = tokio::time::timeout(SHORT_PAUSE, spool.ready_wanted()).await;
        } else {
            spool.ready_wanted().await;
        }
    }
}
