//! The spool: a directory of segments, which keeps a batch from its first commit until its delivery is recorded.
//!
//! Before it: [`crate::upload_buffer`] takes a free segment for each batch, [`crate::commit`] fills it.
//! After it: [`crate::uplink`] delivers, from memory or from here, and retires the segment.
//! Thread: [`Segments`] is shared by the reactors, without a lock, once per batch; [`Spool`] blocks, and lives on the
//! uplink's runtime and, at start, on the main thread.
//! Allocates: at start; then names and handles, off the reactors.
//! Invariant: `spool.size` is never exceeded and never taken back: all segments are made, with their space, before
//! they are needed; and a segment becomes free only after its delivery is on disk.
//! Not here: what a segment looks like (`spool/segment.rs`, `spool/frame.rs`, and `docs/SPOOL_FORMAT.md`).
//!
//! ```text
//! missing → free → ready → filled by a core → backlog or uplink → retired: marked, synced → free
//!           (a number)  (open)                                 └→ quarantined, where a part of it was damaged
//! ```

pub mod disk;
pub mod frame;
pub mod reader;
pub mod recover;
pub mod segment;

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crossbeam_queue::ArrayQueue;
use tokio::sync::Notify;
use uuid::Uuid;

use crate::config::{Config, Dedup, Table};
use crate::error::Fatal;
use crate::limits::segment_size;
use crate::upload_buffer::Batch;
use disk::{Disk, Found, SegmentFile, Slot};
use reader::{SegmentReader, Tail};
use recover::{PendingSegment, State, state_of};
use segment::{SegmentHeader, delivery_mark};

/// Segments kept open for the cores, per core: one for a table that begins a batch, one for the next.
const READY_PER_CORE: usize = 4;

/// Where a durable batch is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spooled {
    pub found: Found,
    pub segment_id: u64,
    /// Segments that hold a part of the same batch and could not be written any more: they go first.
    pub replaced: Vec<Found>,
    /// Behind what is delivered the segment is damaged, so it is put aside then and not used again.
    pub damaged: bool,
}

/// The free segments, as the cores see them.
pub struct Segments {
    segment_size: u64,
    count: usize,
    /// Free segments that no core has claimed, open or not.
    unclaimed: AtomicUsize,
    ready: ArrayQueue<SegmentFile>,
    ready_wanted: Notify,
    id_next: AtomicU64,
    /// Durable batches that are no longer in memory.
    backlog: ArrayQueue<Batch>,
    backlog_grown: Notify,
}

impl Segments {
    /// Segments that fit in `spool.size`.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Bytes of each segment.
    pub fn segment_size(&self) -> u64 {
        self.segment_size
    }

    /// Free segments that no core has claimed.
    pub fn unclaimed_count(&self) -> usize {
        self.unclaimed.load(Ordering::Acquire)
    }

    /// Batches that wait in the spool alone.
    pub fn backlog_count(&self) -> usize {
        self.backlog.len()
    }

    /// Claims `count` segments, all or none.
    pub fn claim(&self, count: usize) -> bool {
        self.unclaimed
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |free| {
                free.checked_sub(count)
            })
            .is_ok()
    }

    /// Gives claims up.
    pub fn unclaim(&self, count: usize) {
        self.unclaimed.fetch_add(count, Ordering::AcqRel);
    }

    /// Takes a claimed segment; `None` where none is open at the moment: the core is told when one is.
    pub fn take(&self) -> Option<SegmentFile> {
        let file = self.ready.pop();
        self.ready_wanted.notify_one();
        file
    }

    /// Gives a segment back that was taken and not written to.
    pub fn put_back(&self, file: SegmentFile) {
        let kept = self.ready.push(file);
        assert!(kept.is_ok(), "more segments than there are");
        self.unclaim(1);
    }

    /// A new id for a use of a segment.
    pub fn id_next(&self) -> u64 {
        self.id_next.fetch_add(1, Ordering::Relaxed)
    }

    /// Adds a durable batch that has no memory.
    pub fn defer(&self, batch: Batch) {
        assert!(batch.memory.is_none() && batch.spooled.is_some());
        let deferred = self.backlog.push(batch);
        assert!(deferred.is_ok(), "more batches than segments");
        self.backlog_grown.notify_one();
    }

    /// The batch that has waited longest.
    pub fn backlog_next(&self) -> Option<Batch> {
        self.backlog.pop()
    }

    /// Completes when the backlog has grown.
    pub async fn backlog_grown(&self) {
        self.backlog_grown.notified().await;
    }
}

/// What the spool counts, besides what the cores do.
#[derive(Debug, Default)]
pub struct SpoolMetrics {
    /// Rows of batches that an earlier run left.
    pub rows_recovered: AtomicU64,
    pub batches_recovered: AtomicU64,
    /// Commits that a crash cut off; nothing of them was acknowledged.
    pub torn_frames: AtomicU64,
    pub rows_torn: AtomicU64,
    /// Segments put aside because a part of them was damaged, and the rows that could be told to be lost with them.
    pub segments_quarantined: AtomicU64,
    pub rows_quarantined: AtomicU64,
    /// Times that a delivery could not be recorded.
    pub retire_failures: AtomicU64,
}

/// The spool of a node.
pub struct Spool<D> {
    disk: D,
    segments: Arc<Segments>,
    /// Free segments that are not open.
    free: Mutex<VecDeque<Slot>>,
    /// Segments that `spool.size` allows and the disk has had no space for.
    missing: AtomicUsize,
    slot_next: AtomicU64,
    ready_target: usize,
    metrics: Arc<SpoolMetrics>,
}

/// A spool, and what an earlier run left in it.
pub struct Opened<D> {
    pub spool: Arc<Spool<D>>,
    /// To be given to [`Spool::recover`], batch by batch.
    pub pending: Vec<PendingSegment>,
    /// The configured tables, and behind them those that only the spool knows.
    pub tables: Vec<Table>,
}

impl<D: Disk> Spool<D> {
    /// Looks at every segment, and makes those that are missing. It reads a page of each: the time it takes does not
    /// depend on what they hold.
    pub fn open(disk: D, config: &Config, run: Uuid) -> Result<Opened<D>, Fatal> {
        let path = &config.spool.directory;
        let unusable = |source| Fatal::SpoolUnusable {
            path: path.clone(),
            source,
        };
        let size = segment_size(config.upload.buffer_size) as u64;
        let mut free = VecDeque::new();
        let mut pending = Vec::new();
        let mut tables = config.tables.clone();
        let mut left = config.spool.size;
        let mut slot_next = 0;
        let metrics = SpoolMetrics::default();
        let mut listed = disk.list().map_err(unusable)?;
        listed.sort_by_key(|found| found.slot);
        for found in listed {
            slot_next = slot_next.max(u64::from(found.slot.0) + 1);
            match state_of(&disk, found).map_err(unusable)? {
                State::Version(version) => {
                    return Err(Fatal::SpoolVersion {
                        path: path.join(found.slot.file_name()),
                        version,
                    });
                }
                State::Free if found.size != size => {
                    disk.remove(found.slot).map_err(unusable)?;
                    continue;
                }
                State::Free => free.push_back(found.slot),
                State::Pending(header) => {
                    add_table(&mut tables, &header);
                    pending.push(PendingSegment {
                        batch: header.batch,
                        segment_id: header.segment_id,
                        found,
                    });
                }
                State::Damaged => {
                    tracing::error!(
                        segment = found.slot.quarantine_name(),
                        "the header of a segment is damaged, so nobody can say whose rows it holds; it is put aside"
                    );
                    disk.quarantine(found.slot).map_err(unusable)?;
                    metrics.segments_quarantined.fetch_add(1, Ordering::Relaxed);
                }
                State::Quarantined => {}
            }
            left = left.saturating_sub(found.size);
        }
        let pending_count = pending.len();
        let missing = (left / size) as usize;
        let count = free.len() + missing + pending_count;
        let spool = Spool {
            disk,
            segments: Arc::new(Segments {
                segment_size: size,
                count: (config.spool.size / size) as usize,
                unclaimed: AtomicUsize::new(free.len()),
                ready: ArrayQueue::new(count.max(1)),
                ready_wanted: Notify::new(),
                id_next: AtomicU64::new(id_first(run)),
                backlog: ArrayQueue::new(count.max(1)),
                backlog_grown: Notify::new(),
            }),
            free: Mutex::new(free),
            missing: AtomicUsize::new(missing),
            slot_next: AtomicU64::new(slot_next),
            ready_target: READY_PER_CORE * config.cores,
            metrics: Arc::new(metrics),
        };
        if let Err(source) = spool.make_missing() {
            if source.kind() != std::io::ErrorKind::StorageFull {
                return Err(unusable(source));
            }
            tracing::warn!(
                directory = %path.display(),
                missing_segments = spool.missing.load(Ordering::Relaxed),
                "the disk has no space for the whole spool; weir takes the rest when there is"
            );
        }
        spool.refill();
        Ok(Opened {
            spool: Arc::new(spool),
            pending,
            tables,
        })
    }

    pub fn segments(&self) -> &Arc<Segments> {
        &self.segments
    }

    pub fn metrics(&self) -> &Arc<SpoolMetrics> {
        &self.metrics
    }

    pub fn disk(&self) -> &D {
        &self.disk
    }

    /// Completes when the cores have taken open segments.
    pub async fn ready_wanted(&self) {
        self.segments.ready_wanted.notified().await;
    }

    /// Opens free segments for the cores. Whether there are more open than before.
    pub fn refill(&self) -> bool {
        let ready = &self.segments.ready;
        let mut grown = false;
        while ready.len() < self.ready_target {
            let Some(slot) = self.free.lock().expect("no holder panics").pop_front() else {
                break;
            };
            match self.disk.open(slot) {
                Ok(file) => {
                    let kept = ready.push(file);
                    assert!(kept.is_ok(), "more segments than there are");
                    grown = true;
                }
                Err(error) => {
                    tracing::error!(%error, segment = slot.file_name(), "a segment cannot be opened");
                    self.free.lock().expect("no holder panics").push_back(slot);
                    break;
                }
            }
        }
        grown
    }

    /// Makes segments that could not be made before.
    pub fn make_missing(&self) -> std::io::Result<()> {
        let mut made = 0;
        let mut outcome = Ok(());
        while self.missing.load(Ordering::Relaxed) > 0 {
            let number = self.slot_next.fetch_add(1, Ordering::Relaxed);
            let slot = Slot(u32::try_from(number).expect("fewer segments than numbers"));
            outcome = self.disk.create(slot, self.segments.segment_size);
            if outcome.is_err() {
                break;
            }
            self.missing.fetch_sub(1, Ordering::Relaxed);
            self.free.lock().expect("no holder panics").push_back(slot);
            made += 1;
        }
        if made > 0 {
            self.disk.sync_entries()?;
            self.segments.unclaim(made);
        }
        outcome
    }

    /// Whether segments are missing that the disk had no space for.
    pub fn is_short(&self) -> bool {
        self.missing.load(Ordering::Relaxed) > 0
    }

    /// The segment is delivered, and that is recorded before it is used again.
    pub fn retire(&self, spooled: &Spooled) {
        let retired = self.try_retire(spooled);
        if let Err(error) = retired {
            // It is delivered once more at the next start, under the same name.
            self.metrics.retire_failures.fetch_add(1, Ordering::Relaxed);
            tracing::error!(
                %error,
                segment = spooled.found.slot.file_name(),
                "a delivery could not be recorded; the segment is not used again until the next start"
            );
        }
    }

    fn try_retire(&self, spooled: &Spooled) -> std::io::Result<()> {
        // A part of the batch must never outlive the whole: it would be delivered in its place.
        for found in &spooled.replaced {
            self.remove(*found)?;
        }
        let Found { slot, size, .. } = spooled.found;
        if spooled.damaged {
            self.metrics
                .segments_quarantined
                .fetch_add(1, Ordering::Relaxed);
            return self.disk.quarantine(slot);
        }
        if size != self.segments.segment_size {
            // Of another configuration.
            return self.remove(spooled.found);
        }
        self.disk
            .overwrite(slot, &delivery_mark(spooled.segment_id), 0)?;
        self.free.lock().expect("no holder panics").push_back(slot);
        self.segments.unclaim(1);
        self.segments.ready_wanted.notify_one();
        Ok(())
    }

    /// Removes a segment that is not to be used again, and lets another be made of its space.
    fn remove(&self, found: Found) -> std::io::Result<()> {
        self.disk.remove(found.slot)?;
        let count = found.size / self.segments.segment_size;
        self.missing.fetch_add(count as usize, Ordering::Relaxed);
        self.segments.ready_wanted.notify_one();
        Ok(())
    }

    /// Reads what an earlier run left of a batch, in all its segments; `None` where no row of it is whole.
    pub fn recover(
        &self,
        segments: &[PendingSegment],
        tables: &[Table],
        window: &mut [u8],
    ) -> std::io::Result<Option<Batch>> {
        let mut best: Option<(Found, SegmentHeader<'_>, reader::Contents)> = None;
        let mut rest = Vec::new();
        for pending in segments {
            let found = pending.found;
            let State::Pending(header) = state_of(&self.disk, found)? else {
                return Err(std::io::ErrorKind::InvalidData.into());
            };
            let reader = SegmentReader::new(&self.disk, found, header.segment_id, window);
            let contents = reader.contents(&header)?;
            self.count_tail(found, &contents);
            let better = best
                .as_ref()
                .is_none_or(|(_, _, best)| best.totals.row_count < contents.totals.row_count);
            let worse = if better {
                best.replace((found, header, contents))
                    .map(|(found, ..)| found)
            } else {
                Some(found)
            };
            rest.extend(worse);
        }
        let (found, header, contents) = best.expect("a batch has a segment");
        let spooled = Spooled {
            found,
            segment_id: header.segment_id,
            replaced: rest,
            damaged: matches!(contents.tail, Tail::Corrupt { .. }),
        };
        if contents.totals.row_count == 0 {
            self.try_retire(&spooled)?;
            return Ok(None);
        }
        self.metrics
            .batches_recovered
            .fetch_add(1, Ordering::Relaxed);
        self.metrics
            .rows_recovered
            .fetch_add(contents.totals.row_count, Ordering::Relaxed);
        let table_index = tables
            .iter()
            .position(|table| header.is_of(table))
            .expect("the tables of all segments are known");
        Ok(Some(Batch {
            id: header.batch,
            table_index,
            totals: contents.totals,
            memory: None,
            spooled: Some(spooled),
            reported: false,
            awaited: false,
            position_end: 0,
            begun_at_ms: header.begun_at_ms(),
        }))
    }

    /// Says and counts what is behind the last whole frame.
    fn count_tail(&self, found: Found, contents: &reader::Contents) {
        let segment = found.slot.file_name();
        match contents.tail {
            Tail::Clean => {}
            Tail::Torn { row_count } => {
                self.metrics.torn_frames.fetch_add(1, Ordering::Relaxed);
                self.metrics
                    .rows_torn
                    .fetch_add(row_count, Ordering::Relaxed);
                tracing::info!(
                    segment,
                    rows = row_count,
                    "a commit did not get to the disk whole before the last run ended, and was never acknowledged"
                );
            }
            Tail::Corrupt { row_count } => {
                self.metrics
                    .rows_quarantined
                    .fetch_add(row_count, Ordering::Relaxed);
                tracing::error!(
                    segment,
                    rows_whole = contents.totals.row_count,
                    rows_lost = row_count,
                    "a segment is damaged: the rows before the damage are delivered, then it is put aside as {}",
                    found.slot.quarantine_name()
                );
            }
        }
    }

    /// The frames of a durable batch, read through `window`.
    pub fn reader<'a>(&'a self, spooled: &Spooled, window: &'a mut [u8]) -> SegmentReader<'a, D> {
        SegmentReader::new(&self.disk, spooled.found, spooled.segment_id, window)
    }
}

/// The first segment id of a run. The ids on disk cannot tell which one is free: of a write that was cut off, a frame can
/// be there without the header, and would be taken for one of the next use of its id. So ids begin at a random number
/// (RFC 9562 §5.7: the last 62 bits of a UUIDv7).
fn id_first(run: Uuid) -> u64 {
    run.as_u64_pair().1
}

/// Adds the table of `header` where it is not among `tables`.
fn add_table(tables: &mut Vec<Table>, header: &SegmentHeader<'_>) {
    if tables.iter().any(|table| header.is_of(table)) {
        return;
    }
    let ingestion = header.ingestion.as_ref();
    tables.push(Table {
        database: header.database.to_string(),
        table: header.table.to_string(),
        mapping: ingestion.and_then(|ingestion| ingestion.mapping.as_deref().map(Into::into)),
        dedup: ingestion.map_or(Dedup::Off, |ingestion| ingestion.dedup),
        spooled: true,
        delivered: false,
    });
}

/// Takes the spool's directory, where the configuration has a table that is spooled.
pub fn take(config: &Config) -> Result<Option<disk::Directory>, Fatal> {
    if !config.tables.iter().any(|table| table.spooled) {
        return Ok(None);
    }
    let path: &Path = &config.spool.directory;
    match disk::Directory::take(path) {
        Ok(directory) => Ok(Some(directory)),
        Err(disk::TakeError::Locked) => Err(Fatal::SpoolLocked { path: path.into() }),
        Err(disk::TakeError::Io(source)) => Err(Fatal::SpoolUnusable {
            path: path.into(),
            source,
        }),
    }
}

const _: () = assert!(
    size_of::<Batch>() + size_of::<SegmentFile>() + size_of::<Slot>()
        <= crate::limits::SEGMENT_STATE_SIZE
);
