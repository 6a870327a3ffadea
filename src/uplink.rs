//! The uplink: takes sealed upload buffers from the cores, delivers them, and gives the memory back.
//!
//! Before it: [`crate::upload_buffer`] seals a batch.
//! After it: the destination holds the blob, and the spool has recorded it.
//! Thread: the tokio runtime beside the reactors; the two ends of a [`Handover`] are on different threads.
//! Allocates: for each blob (names, file handles, a window to read a segment); bounded, because each core delivers one
//! batch at a time, or all cores together `uplink.concurrency` to Kusto.
//! Invariant: every batch is delivered, or stays in the spool; one that is in memory alone is kept and tried again until
//! the drain ends. Its buffer always goes back.
//! Not here: any memory of its own for blobs; they are written from the upload buffer, or read from their segment.

pub mod body;
pub mod courier;
pub mod dead_letter;
pub mod directory;
pub mod kusto;
pub mod settlement;

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use crossbeam_queue::ArrayQueue;
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};

use crate::config::{Config, Destination, Table};
use crate::error::Fatal;
use crate::limits::{DEAD_LETTER_CHECK_PAUSE, DELIVERY_PAUSE_MAX, DELIVERY_PAUSE_MIN};
use crate::memory::Region;
use crate::reactor::Phase;
use crate::spool::disk::Disk;
use crate::spool::{Segments, Spool};
use crate::upload_buffer::{Batch, UploadBuffer};
use courier::Courier;
use dead_letter::DeadLetters;
use directory::Directory;
use kusto::Kusto;
use settlement::{Delivering, Settlement};

/// A batch of this core is at its end.
pub struct Delivered {
    pub table_index: usize,
    pub position_end: u64,
    pub awaited: bool,
    /// Whether it was in the spool as well.
    pub spooled: bool,
    pub fate: Fate,
}

/// How a batch came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Delivered,
    /// Its destination will never take it; it is kept with the reason.
    DeadLetter,
}

/// The two bounded queues between one core and the uplink. Neither end allocates or blocks.
pub struct Handover {
    sealed: ArrayQueue<Batch>,
    sealed_notify: Notify,
    returned: ArrayQueue<Returned>,
    returned_notify: Notify,
    /// Where a batch goes whose memory is taken back.
    segments: Option<Arc<Segments>>,
}

/// What the uplink gives back to a core.
pub enum Returned {
    Buffer(Box<UploadBuffer>),
    Delivered(Delivered),
    /// Nothing came back, but something that the core waits for may have changed. It is never in the queue.
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
        self.send_back(Returned::Buffer(buffer));
    }

    /// Uplink: a batch of this core is delivered.
    pub fn delivered(&self, delivered: Delivered) {
        self.send_back(Returned::Delivered(delivered));
    }

    fn send_back(&self, returned: Returned) {
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
        if let Some(returned) = self.returned.pop() {
            return returned;
        }
        self.returned_notify.notified().await;
        self.returned.pop().unwrap_or(Returned::Nudge)
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
    /// Rows that became dead letters, likewise.
    pub dead_rows_spooled: AtomicU64,
    pub dead_rows_unspooled: AtomicU64,
    pub failures: AtomicU64,
}

impl UplinkMetrics {
    pub fn rows(&self) -> u64 {
        self.rows_spooled.load(Ordering::Relaxed) + self.rows_unspooled.load(Ordering::Relaxed)
    }

    pub fn dead_rows(&self) -> u64 {
        self.dead_rows_spooled.load(Ordering::Relaxed)
            + self.dead_rows_unspooled.load(Ordering::Relaxed)
    }
}

/// Where batches go.
pub enum Sink<D> {
    Directory(Arc<Directory>),
    /// Discards the blob after it was compressed.
    Null,
    Kusto(Arc<Courier<D>>),
}

impl<D> Clone for Sink<D> {
    fn clone(&self) -> Self {
        match self {
            Sink::Directory(directory) => Sink::Directory(directory.clone()),
            Sink::Null => Sink::Null,
            Sink::Kusto(courier) => Sink::Kusto(courier.clone()),
        }
    }
}

impl<D: Disk> Sink<D> {
    /// Makes the destination ready. A directory fails where it can already be seen that nothing could be written, or, if it
    /// `may_be_away`, says so; Kusto is asked on `runtime`, and may always be away.
    pub fn open(
        config: &Config,
        tables: &[Table],
        may_be_away: bool,
        settlement: &Arc<Settlement<D>>,
        phase: &watch::Receiver<Phase>,
        runtime: &Handle,
    ) -> Result<Sink<D>, Fatal> {
        Ok(match &config.destination {
            Destination::Directory { path } => {
                Sink::Directory(Arc::new(Directory::open(path, tables, may_be_away)?))
            }
            Destination::Null => Sink::Null,
            Destination::Kusto(kusto) => {
                let dead_letters = Arc::new(DeadLetters::take(&config.dead_letter)?);
                let kusto = Arc::new(Kusto::open(kusto, tables, runtime)?);
                runtime.spawn(expire(dead_letters.clone()));
                Sink::Kusto(Arc::new(Courier::new(
                    config,
                    kusto,
                    dead_letters,
                    settlement.clone(),
                    tables.to_vec(),
                    phase.clone(),
                )))
            }
        })
    }
}

/// Looks at the age of the dead letters, now and from time to time.
async fn expire(dead_letters: Arc<DeadLetters>) {
    loop {
        let again = dead_letters.clone();
        let expired = tokio::task::spawn_blocking(move || again.expire(jiff::Timestamp::now()));
        if let Ok(Err(error)) = expired.await {
            tracing::error!(%error, "the age of the dead letters could not be looked at");
        }
        tokio::time::sleep(DEAD_LETTER_CHECK_PAUSE).await;
    }
}

/// Delivers the batches of one core, and its share of the backlog, for ever.
pub struct Uplink<D> {
    pub core_index: usize,
    pub settlement: Arc<Settlement<D>>,
    /// Where segments are read for the directory; absent while one is.
    pub window: Option<Region>,
    pub sink: Sink<D>,
    pub phase: watch::Receiver<Phase>,
}

impl<D: Disk> Uplink<D> {
    /// Runs until the runtime ends it.
    pub async fn run(self) {
        match self.sink.clone() {
            Sink::Directory(directory) => self.deliver_in_turn(Some(directory)).await,
            Sink::Null => self.deliver_in_turn(None).await,
            Sink::Kusto(courier) => self.dispatch(courier).await,
        }
    }

    /// Gives each batch to the courier as soon as there is a place for it.
    async fn dispatch(self, courier: Arc<Courier<D>>) {
        let mut from_backlog = false;
        loop {
            let place = courier.place().await;
            let delivering = self.settlement.underway.begin();
            // By turns, so that neither what is new nor what is old waits for the other to end.
            let Some(batch) = self.next(from_backlog) else {
                drop((place, delivering));
                self.wait().await;
                continue;
            };
            from_backlog = batch.memory.is_some();
            tokio::spawn(courier.clone().deliver(batch, place, delivering));
        }
    }

    /// Delivers one batch after the other.
    async fn deliver_in_turn(mut self, directory: Option<Arc<Directory>>) {
        let mut backoff = backoff();
        let mut from_backlog = false;
        loop {
            let delivering = self.settlement.underway.begin();
            let Some(batch) = self.next(from_backlog) else {
                drop(delivering);
                self.wait().await;
                continue;
            };
            from_backlog = batch.memory.is_some();
            if self.attempt(batch, &directory, delivering).await {
                backoff = self::backoff();
            } else {
                let pause = backoff.next().unwrap_or(DELIVERY_PAUSE_MAX);
                self.pause(pause).await;
            }
        }
    }

    fn handover(&self) -> &Handover {
        &self.settlement.handovers[self.core_index]
    }

    fn spool(&self) -> Option<&Arc<Spool<D>>> {
        self.settlement.spool.as_ref()
    }

    /// The next batch to deliver. While the node drains, what is in memory goes first: some of it may be nowhere else.
    fn next(&self, backlog_first: bool) -> Option<Batch> {
        let sealed = || self.handover().receive();
        let backlog = || {
            let spool = self.spool().filter(|_| self.takes_backlog())?;
            spool.segments().backlog_next()
        };
        if backlog_first && !self.draining() {
            backlog().or_else(sealed)
        } else {
            sealed().or_else(backlog)
        }
    }

    fn draining(&self) -> bool {
        *self.phase.borrow() >= Phase::Draining
    }

    /// Whether what is in the spool alone is delivered: during a drain until the first failure, since it is safe where
    /// it is, and nobody waits at a shutdown for a destination that is away.
    fn takes_backlog(&self) -> bool {
        !(self.draining() && self.settlement.underway.gave_up())
    }

    async fn wait(&self) {
        let sealed = self.handover().sealed_notify.notified();
        match self.spool() {
            Some(spool) if self.takes_backlog() => tokio::select! {
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

    /// Whether the batch is delivered. Where it is not, one that is in the spool gives up its memory.
    async fn attempt(
        &mut self,
        batch: Batch,
        directory: &Option<Arc<Directory>>,
        _delivering: Delivering,
    ) -> bool {
        let (outcome, mut batch) = match directory {
            None => (Ok(()), batch),
            Some(directory) => self.write(directory.clone(), batch).await,
        };
        match outcome {
            Ok(()) => {
                self.settlement.report(&batch, Fate::Delivered);
                self.settlement.release(batch).await;
                true
            }
            Err(error) => {
                let failures = &self.settlement.metrics.failures;
                failures.fetch_add(1, Ordering::Relaxed);
                if self.draining() {
                    self.settlement.underway.give_up();
                }
                tracing::warn!(%error, blob = batch.id.blob_name(), "a blob could not be delivered; it is kept and tried again");
                match self.spool() {
                    Some(spool) if batch.spooled.is_some() => {
                        if let Some(memory) = batch.memory.take() {
                            self.handover().give_back(memory.into_buffer());
                        }
                        spool.segments().defer(batch);
                    }
                    // It is nowhere else. It keeps its buffer, and its turn.
                    _ => self.handover().send(batch),
                }
                false
            }
        }
    }

    /// Writes a batch to the directory. File systems block, so it happens on a thread for that.
    async fn write(&mut self, directory: Arc<Directory>, batch: Batch) -> (io::Result<()>, Batch) {
        let spool = self.spool().cloned();
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
}

fn backoff() -> impl Iterator<Item = Duration> {
    ExponentialBuilder::default()
        .with_jitter()
        .with_min_delay(DELIVERY_PAUSE_MIN)
        .with_max_delay(DELIVERY_PAUSE_MAX)
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
