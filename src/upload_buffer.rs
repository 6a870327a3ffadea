//! Upload buffers: fixed memory in which a blob comes to be, and the pool of them that a core owns.
//!
//! Before it: [`crate::encoder`] appends rows for a table; [`crate::commit`] makes them durable.
//! After it: a sealed buffer crosses to [`crate::uplink`] as a [`Batch`] and comes back empty.
//! Thread: one reactor; a batch moves to the uplink and back.
//! Allocates: at start only: memory and deflate states.
//! Invariant: `free + open + sealed + in_uplink == buffer_count`, at most one open buffer per table, a row is only
//! appended where the worst that deflate can make of it has room in memory and in the segment, and a batch of a spooled
//! table leaves only when all of it is durable.
//! Not here: what a row is, the writing itself, and where a batch goes.
//!
//! ```text
//! free → open → sealed → in uplink → free          a spooled table's buffer is sealed until its last commit,
//!   ▲                        │                     others leave at once
//!   └──── taken back ────────┘                     a durable batch can be read from its segment, so its memory is
//!                                                  taken back where a new batch needs it
//! ```

use std::cell::RefCell;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::ack::Acks;
use crate::config::{Config, Table};
use crate::deflate::{GzipMember, MEMBER_END_SIZE};
use crate::error::Refusal;
use crate::limits::{
    GZIP_TRAILER_SIZE, STAGING_SIZE, deflate_size_max, row_size_max, upload_buffer_size_min,
};
use crate::memory::Region;
use crate::metrics::{CoreMetrics, Count};
use crate::spool::disk::{Found, SegmentFile, Slot};
use crate::spool::frame::Totals;
use crate::spool::segment::{BatchId, FrameWrite, SegmentCursor, SegmentHeader};
use crate::spool::{Segments, Spooled};
use crate::uplink::{Delivered, Handover};
use crate::wait::{Bell, WaitQueue};

/// Memory for one blob, with the deflate state that fills it.
pub struct UploadBuffer {
    memory: Region,
    member: GzipMember,
}

impl UploadBuffer {
    fn totals(&self, row_count: u64) -> Totals {
        Totals {
            member_size: self.member.size() as u64,
            raw_size: self.member.raw_size(),
            raw_crc: self.member.raw_crc(),
            row_count,
        }
    }
}

/// The content of a sealed upload buffer: one gzip member of rows for one table.
pub struct Batch {
    pub id: BatchId,
    pub table_index: usize,
    /// Of the member without its end, which follows from them.
    pub totals: Totals,
    /// The complete `.gz` file, where it is still in memory.
    pub memory: Option<BatchMemory>,
    /// Where the batch is on disk, if it is.
    pub spooled: Option<Spooled>,
    /// Somebody waits for its delivery.
    pub awaited: bool,
    /// The last of the table's rows that is in it.
    pub position_end: u64,
}

/// A sealed buffer.
pub struct BatchMemory {
    buffer: Box<UploadBuffer>,
}

impl BatchMemory {
    /// The blob.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer.memory[..self.buffer.member.size() + MEMBER_END_SIZE]
    }

    /// Gives the memory up for reuse.
    pub fn into_buffer(self) -> Box<UploadBuffer> {
        self.buffer
    }
}

impl Batch {
    /// Bytes of the blob.
    pub fn blob_size(&self) -> u64 {
        self.totals.member_size + MEMBER_END_SIZE as u64
    }
}

/// A batch that is not yet with the uplink.
struct Filling {
    buffer: Box<UploadBuffer>,
    table_index: usize,
    sequence: u64,
    row_count: u64,
    /// The table's rows up to and including the last one here.
    position_end: u64,
    /// When the first row came; a buffer without rows has no age.
    first_row_at: Option<Instant>,
    sealed: bool,
    awaited: bool,
    /// Absent for a table that is not spooled, and where the disk has failed.
    on_disk: Option<OnDisk>,
}

/// The segment of a batch.
struct OnDisk {
    /// Absent while a commit has it.
    file: Option<SegmentFile>,
    cursor: SegmentCursor,
    /// Of the last flush that is durable.
    durable: Totals,
    /// Segments that hold a part of this batch and could not be written any more.
    replaced: Vec<Slot>,
}

impl Filling {
    fn fits(&mut self, raw_size: usize) -> bool {
        let UploadBuffer { memory, member } = &mut *self.buffer;
        if !member.fits(memory, raw_size) {
            return false;
        }
        let member_size = member.size_max_after(raw_size) - GZIP_TRAILER_SIZE;
        let on_disk = self.on_disk.as_ref();
        on_disk.is_none_or(|on_disk| on_disk.cursor.fits(member_size))
    }

    fn durable(&self) -> bool {
        let on_disk = self.on_disk.as_ref();
        on_disk.is_none_or(|on_disk| on_disk.durable.row_count == self.row_count)
    }

    fn in_commit(&self) -> bool {
        let on_disk = self.on_disk.as_ref();
        on_disk.is_some_and(|on_disk| on_disk.file.is_none())
    }
}

/// A commit in progress: what is being made durable.
pub struct Commit {
    index: usize,
    pub table_index: usize,
    /// The table's rows up to here will be durable.
    pub position: u64,
    totals: Totals,
    pub file: SegmentFile,
}

struct Pool {
    free: Vec<Box<UploadBuffer>>,
    /// One place per buffer.
    filling: Vec<Option<Filling>>,
    /// By table: the place of its open buffer.
    open: Vec<Option<usize>>,
    /// By table: rows so far.
    positions: Vec<u64>,
    /// By table: batches with the uplink whose delivery is awaited.
    awaited_in_uplink: Vec<usize>,
    in_uplink_count: usize,
    /// Batches with the uplink that are in memory alone.
    unspooled_in_uplink_count: usize,
    sequence_next: u64,
    /// Segments that this core has claimed and not opened.
    claimed_count: usize,
    /// Where the search for the next commit begins, so that each table has its turn.
    commit_next: usize,
    storage_failed: bool,
}

/// How many upload buffers are where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UploadBufferCounts {
    pub free: usize,
    pub open: usize,
    /// Waiting to become durable.
    pub sealed: usize,
    pub in_uplink: usize,
}

/// The upload buffers of one core.
pub struct UploadBuffers {
    run: Uuid,
    core_index: usize,
    buffer_count: usize,
    buffer_size: usize,
    record_size_max: usize,
    tables: Vec<Table>,
    pool: RefCell<Pool>,
    queue: WaitQueue,
    dirty: Bell,
    acks: Acks,
    /// Absent where no table is spooled.
    segments: Option<Arc<Segments>>,
    handover: Arc<Handover>,
    metrics: Arc<CoreMetrics>,
}

impl UploadBuffers {
    /// Maps `buffer_count` buffers of `buffer_size` bytes, and as many deflate states.
    pub fn map(
        run: Uuid,
        core_index: usize,
        config: &Config,
        segments: Option<Arc<Segments>>,
        handover: Arc<Handover>,
        metrics: Arc<CoreMetrics>,
    ) -> io::Result<Self> {
        let buffer_count = config.upload.buffer_count;
        let buffer_size = config.upload.buffer_size;
        assert!(
            buffer_size >= upload_buffer_size_min(config.limits.record),
            "every record fits an empty upload buffer"
        );
        let mut free = Vec::with_capacity(buffer_count);
        for _ in 0..buffer_count {
            free.push(Box::new(UploadBuffer {
                memory: Region::map(buffer_size)?,
                member: GzipMember::new(config.compression.level),
            }));
        }
        let table_count = config.tables.len();
        let batch_count_max = config.segment_count() + buffer_count;
        Ok(UploadBuffers {
            run,
            core_index,
            buffer_count,
            buffer_size,
            record_size_max: config.limits.record,
            tables: config.tables.clone(),
            pool: RefCell::new(Pool {
                free,
                filling: (0..buffer_count).map(|_| None).collect(),
                open: vec![None; table_count],
                positions: vec![0; table_count],
                awaited_in_uplink: vec![0; table_count],
                in_uplink_count: 0,
                unspooled_in_uplink_count: 0,
                sequence_next: 0,
                claimed_count: 0,
                commit_next: 0,
                storage_failed: false,
            }),
            // One request encodes at a time, so at most one waits here.
            queue: WaitQueue::new(1),
            dirty: Bell::default(),
            acks: Acks::new(&config.tables, config.limits.connections, batch_count_max),
            segments,
            handover,
            metrics,
        })
    }

    pub fn acks(&self) -> &Acks {
        &self.acks
    }

    pub fn counts(&self) -> UploadBufferCounts {
        let pool = self.pool.borrow();
        let sealed = pool.filling.iter().flatten().filter(|f| f.sealed).count();
        let open = pool.filling.iter().flatten().count() - sealed;
        assert_eq!(
            pool.free.len() + open + sealed + pool.in_uplink_count,
            self.buffer_count,
            "upload buffers are neither made nor lost"
        );
        UploadBufferCounts {
            free: pool.free.len(),
            open,
            sealed,
            in_uplink: pool.in_uplink_count,
        }
    }

    /// Rows that are in upload buffers and not durable; those of tables that are not spooled are counted until sealed.
    pub fn rows_in_memory(&self) -> u64 {
        let pool = self.pool.borrow();
        let rows = pool.filling.iter().flatten().map(|filling| {
            let on_disk = filling.on_disk.as_ref();
            filling.row_count - on_disk.map_or(0, |on_disk| on_disk.durable.row_count)
        });
        rows.sum()
    }

    /// Batches with the uplink that are in memory alone.
    pub fn unspooled_in_uplink_count(&self) -> usize {
        self.pool.borrow().unspooled_in_uplink_count
    }

    /// Whether this core's disk has failed, so that nothing more can become durable here.
    pub fn storage_failed(&self) -> bool {
        self.pool.borrow().storage_failed
    }

    /// The table's rows so far.
    pub fn position(&self, table_index: usize) -> u64 {
        self.pool.borrow().positions[table_index]
    }

    // --- a request's rows ---------------------------------------------------------------------

    /// Claims as many segments as a request of `row_count` rows and `raw_size` bytes can need at worst, so that it
    /// cannot meet the end of the spool half way. [`UploadBuffers::unclaim`] gives back what it did not use.
    pub fn claim(&self, table_index: usize, row_count: usize, raw_size: usize) -> Result<(), Refusal> {
        let Some(segments) = self.segments_of(table_index) else {
            return Ok(());
        };
        let mut pool = self.pool.borrow_mut();
        if pool.storage_failed {
            return Err(Refusal::StorageFault);
        }
        if let Some(index) = pool.open[table_index]
            && let Some(filling) = &mut pool.filling[index]
            && filling.fits(raw_size)
        {
            return Ok(());
        }
        let piece = row_size_max(self.record_size_max).max(STAGING_SIZE);
        let filled_at_least = self.buffer_size.saturating_sub(deflate_size_max(piece)).max(1);
        let worst = deflate_size_max(raw_size).div_ceil(filled_at_least).min(row_count) + 1;
        // What needs more than half of the spool may meet its end: better than never to be taken at all.
        let wanted = worst.min((segments.count() / 2).max(1));
        let wanted = wanted.saturating_sub(pool.claimed_count);
        if !segments.claim(wanted) {
            return Err(Refusal::SpoolFull);
        }
        pool.claimed_count += wanted;
        Ok(())
    }

    /// Gives claimed segments back that were not used.
    pub fn unclaim(&self) {
        if let Some(segments) = &self.segments {
            segments.unclaim(std::mem::take(&mut self.pool.borrow_mut().claimed_count));
        }
    }

    /// Makes sure that the table has an open buffer where `raw_size` more bytes fit, sealing a full one on the way.
    /// Refuses where `deadline` passes before a buffer comes free.
    pub async fn reserve(
        &self,
        table_index: usize,
        raw_size: usize,
        deadline: Option<Instant>,
    ) -> Result<(), Refusal> {
        let reserved = self.queue.until(deadline, || {
            match self.try_reserve(table_index, raw_size) {
                Ok(true) => Some(Ok(())),
                Ok(false) => None,
                Err(refusal) => Some(Err(refusal)),
            }
        });
        reserved.await.unwrap_or(Err(Refusal::Busy))
    }

    /// [`UploadBuffers::reserve`] without waiting; `false` where waiting may help.
    pub fn try_reserve(&self, table_index: usize, raw_size: usize) -> Result<bool, Refusal> {
        let mut pool = self.pool.borrow_mut();
        if let Some(index) = pool.open[table_index]
            && let Some(filling) = &mut pool.filling[index]
        {
            if filling.fits(raw_size) {
                return Ok(true);
            }
            assert!(
                filling.row_count > 0,
                "{raw_size} bytes of rows fit no upload buffer"
            );
            self.seal(&mut pool, index);
        }
        let segments = self.segments_of(table_index);
        if segments.is_some() && pool.storage_failed {
            return Err(Refusal::StorageFault);
        }
        // Where batches can wait in memory alone, they must leave a buffer for those that can leave for the disk.
        let left_alone = usize::from(segments.is_none() && self.segments.is_some());
        if pool.free.len() <= left_alone {
            self.take_back(&mut pool);
        }
        if pool.free.is_empty() && pool.in_uplink_count == 0 {
            self.seal_oldest(&mut pool);
        }
        if pool.free.len() <= left_alone {
            return Ok(false);
        }
        let sequence = pool.sequence_next;
        let on_disk = match segments {
            None => None,
            Some(segments) => {
                if pool.claimed_count == 0 {
                    if !segments.claim(1) {
                        return Err(Refusal::SpoolFull);
                    }
                    pool.claimed_count = 1;
                }
                // Claimed, but perhaps not opened yet.
                let Some(file) = segments.take() else {
                    return Ok(false);
                };
                pool.claimed_count -= 1;
                Some(OnDisk::new(file, segments))
            }
        };
        let mut buffer = pool.free.pop().expect("counted above");
        let UploadBuffer { memory, member } = &mut *buffer;
        member.open(memory);
        let mut filling = Filling {
            buffer,
            table_index,
            sequence,
            row_count: 0,
            position_end: pool.positions[table_index],
            first_row_at: None,
            sealed: false,
            awaited: false,
            on_disk,
        };
        assert!(
            filling.fits(raw_size),
            "{raw_size} bytes of rows do not fit {} bytes",
            self.buffer_size
        );
        let index = pool.filling.iter().position(Option::is_none);
        let index = index.expect("as many places as buffers");
        pool.filling[index] = Some(filling);
        pool.open[table_index] = Some(index);
        pool.sequence_next += 1;
        Ok(true)
    }

    /// Appends `row_count` whole rows that were reserved for.
    pub fn append(&self, table_index: usize, rows: &[u8], row_count: u64) {
        let mut pool = self.pool.borrow_mut();
        pool.positions[table_index] += row_count;
        self.metrics.update(|update| update.add(Count::RowsAppended, row_count));
        let position = pool.positions[table_index];
        let index = pool.open[table_index].expect("reserved before");
        let filling = pool.filling[index].as_mut().expect("an open buffer");
        let UploadBuffer { memory, member } = &mut *filling.buffer;
        member.append(memory, rows);
        filling.row_count += row_count;
        filling.position_end = position;
        if filling.first_row_at.is_none() {
            filling.first_row_at = Some(Instant::now());
        }
    }

    /// The rows of a request are complete: they are to be made durable, and delivered soon where that is `awaited`.
    pub fn complete(&self, table_index: usize, awaited: bool) {
        if self.segments_of(table_index).is_none() {
            return;
        }
        let mut pool = self.pool.borrow_mut();
        if awaited
            && let Some(index) = pool.open[table_index]
            && let Some(filling) = &mut pool.filling[index]
        {
            filling.awaited = true;
        }
        drop(pool);
        self.dirty.ring();
    }

    // --- sealing ------------------------------------------------------------------------------

    /// Seals every open buffer whose first row is at least `age` old.
    pub fn seal_older_than(&self, age: Duration) {
        let mut pool = self.pool.borrow_mut();
        for index in 0..pool.filling.len() {
            if let Some(filling) = &pool.filling[index]
                && !filling.sealed
                && filling.first_row_at.is_some_and(|at| at.elapsed() >= age)
            {
                self.seal(&mut pool, index);
            }
        }
    }

    fn seal_oldest(&self, pool: &mut Pool) {
        // More tables than buffers: the oldest open one makes room. One that was sealed before is on its way.
        let filling = || pool.filling.iter().enumerate().filter_map(|(index, f)| Some((index, f.as_ref()?)));
        if filling().all(|(_, filling)| !filling.sealed)
            && let Some((oldest, _)) = filling().min_by_key(|(_, filling)| filling.sequence)
        {
            self.seal(pool, oldest);
        }
    }

    fn seal(&self, pool: &mut Pool, index: usize) {
        let filling = pool.filling[index].as_mut().expect("an open buffer");
        filling.sealed = true;
        let table_index = filling.table_index;
        if pool.open[table_index] == Some(index) {
            pool.open[table_index] = None;
        }
        if filling.row_count == 0 && !filling.in_commit() {
            // Nothing was written: the segment is as good as new.
            let filling = pool.filling[index].take().expect("just seen");
            if let (Some(on_disk), Some(segments)) = (filling.on_disk, &self.segments)
                && let Some(file) = on_disk.file
            {
                segments.put_back(file);
            }
            pool.free.push(filling.buffer);
        } else if filling.durable() && !filling.in_commit() {
            self.hand_over(pool, index);
        } else {
            self.dirty.ring();
        }
    }

    /// Sends a sealed batch to the uplink.
    fn hand_over(&self, pool: &mut Pool, index: usize) {
        let mut filling = pool.filling[index].take().expect("a sealed buffer");
        let UploadBuffer { memory, member } = &mut *filling.buffer;
        member.close(memory);
        let table_index = filling.table_index;
        let totals = filling.buffer.totals(filling.row_count);
        self.metrics.update(|update| {
            update.add(Count::BatchesSealed, 1);
            update.add(Count::BatchBytes, totals.member_size + MEMBER_END_SIZE as u64);
        });
        pool.in_uplink_count += 1;
        if self.tables[table_index].delivered {
            self.acks.sent(table_index, filling.position_end);
        }
        if filling.awaited {
            pool.awaited_in_uplink[table_index] += 1;
        }
        if filling.on_disk.is_none() {
            pool.unspooled_in_uplink_count += 1;
        }
        self.handover.send(Batch {
            id: self.batch_id(filling.sequence),
            table_index,
            totals,
            memory: Some(BatchMemory {
                buffer: filling.buffer,
            }),
            spooled: filling.on_disk.map(|on_disk| Spooled {
                found: Found {
                    slot: on_disk.file.expect("no commit is in progress").slot,
                    size: on_disk.cursor.segment_size(),
                    quarantined: false,
                },
                segment_id: on_disk.cursor.segment_id(),
                replaced: on_disk.replaced,
                damaged: false,
            }),
            awaited: filling.awaited,
            position_end: filling.position_end,
        });
    }

    // --- from and to the uplink ---------------------------------------------------------------

    /// Takes the memory of a durable batch back that the uplink has not begun with, if there is one.
    fn take_back(&self, pool: &mut Pool) {
        if let Some(buffer) = self.handover.take_back() {
            pool.in_uplink_count -= 1;
            pool.free.push(buffer);
        }
    }

    /// Takes a buffer back from the uplink.
    pub fn give_back(&self, buffer: Box<UploadBuffer>) {
        let mut pool = self.pool.borrow_mut();
        assert!(
            pool.in_uplink_count > 0,
            "a buffer came back that was not away"
        );
        pool.in_uplink_count -= 1;
        pool.free.push(buffer);
        drop(pool);
        self.queue.wake_one();
    }

    /// The uplink has delivered a batch of this core.
    pub fn delivered(&self, delivered: &Delivered) {
        let table_index = delivered.table_index;
        if self.tables[table_index].delivered {
            self.acks.delivered(table_index, delivered.position_end);
        }
        let mut pool = self.pool.borrow_mut();
        if !delivered.spooled {
            pool.unspooled_in_uplink_count -= 1;
        }
        if delivered.awaited {
            pool.awaited_in_uplink[table_index] -= 1;
            if let Some(index) = pool.open[table_index] {
                self.seal_awaited(&mut pool, index);
            }
        }
    }

    /// Something may have changed for who waits for a buffer: a segment is ready.
    pub fn look_again(&self) {
        self.queue.wake_one();
    }

    /// Completes when neither the uplink nor a commit has a buffer; to be called when nobody encodes any more.
    pub async fn all_returned(&self) {
        let returned = || {
            let pool = self.pool.borrow();
            let idle = pool.in_uplink_count == 0 && pool.filling.iter().all(Option::is_none);
            idle.then_some(())
        };
        let _ = self.queue.until(None, returned).await;
    }

    // --- commits ------------------------------------------------------------------------------

    /// Completes when there may be something to commit.
    pub async fn dirty(&self) {
        self.dirty.rung().await;
    }

    /// Flushes a batch that has rows which are not durable, and begins to commit it. `None` where there is none.
    pub fn commit_begin(&self) -> Option<Commit> {
        let mut pool = self.pool.borrow_mut();
        let place_count = pool.filling.len();
        // Sealed ones first, oldest first: they hold buffers that others may wait for, and a table's rows settle in order.
        let sealed = (0..place_count)
            .filter(|index| pool.filling[*index].as_ref().is_some_and(|f| f.sealed && !f.durable()))
            .min_by_key(|index| pool.filling[*index].as_ref().map(|f| f.sequence));
        let open = || {
            (0..place_count)
                .map(|step| (pool.commit_next + step) % place_count)
                .find(|index| pool.filling[*index].as_ref().is_some_and(|f| !f.durable()))
        };
        let index = sealed.or_else(open)?;
        pool.commit_next = (index + 1) % place_count;
        let filling = pool.filling[index].as_mut()?;
        let UploadBuffer { memory, member } = &mut *filling.buffer;
        member.flush(memory);
        let totals = filling.buffer.totals(filling.row_count);
        let on_disk = filling.on_disk.as_mut()?;
        let file = on_disk.file.take().expect("one commit at a time");
        Some(Commit {
            index,
            table_index: filling.table_index,
            position: filling.position_end,
            totals,
            file,
        })
    }

    /// Puts the next frame of the commit into `buffer`. `None` when all of it is written.
    pub fn commit_stage(&self, commit: &Commit, buffer: &mut [u8]) -> Option<FrameWrite> {
        let pool = self.pool.borrow();
        let filling = pool.filling[commit.index].as_ref().expect("in commit");
        let on_disk = filling.on_disk.as_ref().expect("in commit");
        let member_size = commit.totals.member_size as usize;
        if on_disk.cursor.framed_size() == member_size {
            return None;
        }
        let segments = self.segments.as_ref().expect("a spooled table");
        let header = || {
            let table = &self.tables[filling.table_index];
            SegmentHeader {
                segment_id: on_disk.cursor.segment_id(),
                segment_size: segments.segment_size(),
                batch: self.batch_id(filling.sequence),
                database: table.database.clone(),
                table: table.table.clone(),
            }
        };
        let member = &filling.buffer.memory[..member_size];
        Some(on_disk.cursor.stage(buffer, member, commit.totals, on_disk.durable, header))
    }

    /// The frame is durable.
    pub fn commit_advance(&self, commit: &Commit, write: &FrameWrite) {
        let mut pool = self.pool.borrow_mut();
        let filling = pool.filling[commit.index].as_mut().expect("in commit");
        let on_disk = filling.on_disk.as_mut().expect("in commit");
        on_disk.cursor.advance(write);
    }

    /// All of the commit is durable: whom it covers can be answered.
    pub fn commit_end(&self, commit: Commit) {
        let mut pool = self.pool.borrow_mut();
        let Commit { index, totals, file, .. } = commit;
        let filling = pool.filling[index].as_mut().expect("in commit");
        let on_disk = filling.on_disk.as_mut().expect("in commit");
        let row_count = totals.row_count - on_disk.durable.row_count;
        on_disk.durable = totals;
        on_disk.file = Some(file);
        self.metrics.update(|update| {
            update.add(Count::Commits, 1);
            update.add(Count::RowsDurable, row_count);
        });
        self.acks.durable(commit.table_index, commit.position);
        if filling.sealed && filling.durable() {
            self.hand_over(&mut pool, index);
        } else {
            self.seal_awaited(&mut pool, index);
        }
    }

    /// Seals an open batch that somebody waits for, unless another of its table is on its way.
    fn seal_awaited(&self, pool: &mut Pool, index: usize) {
        if let Some(filling) = &pool.filling[index]
            && filling.awaited
            && !filling.sealed
            && pool.awaited_in_uplink[filling.table_index] == 0
        {
            self.seal(pool, index);
        }
    }

    /// A write or its sync failed: nothing it covers is acknowledged, and its file is not written again.
    /// The batch moves to another segment, once; where it has moved before or there is none, this core's disk has failed.
    pub fn commit_fail(&self, commit: Commit) {
        let mut pool = self.pool.borrow_mut();
        self.metrics.update(|update| update.add(Count::CommitFailures, 1));
        let filling = pool.filling[commit.index].as_mut().expect("in commit");
        let on_disk = filling.on_disk.as_mut().expect("in commit");
        self.acks.failed(commit.table_index, commit.position);
        let moved_before = !on_disk.replaced.is_empty();
        on_disk.replaced.push(commit.file.slot);
        let segments = self.segments.as_ref().expect("a spooled table");
        let another = match moved_before {
            false if segments.claim(1) => segments.take().or_else(|| {
                segments.unclaim(1);
                None
            }),
            _ => None,
        };
        match another {
            Some(file) => {
                let durable_before = on_disk.durable.row_count;
                let replaced = std::mem::take(&mut on_disk.replaced);
                *on_disk = OnDisk::new(file, segments);
                on_disk.replaced = replaced;
                // Still durable where they were; they will be counted again.
                self.metrics.update(|update| update.sub(Count::RowsDurable, durable_before));
                self.dirty.ring();
            }
            None => self.storage_fail(&mut pool),
        }
    }

    /// Nothing more can become durable here: what is in memory goes out from memory.
    fn storage_fail(&self, pool: &mut Pool) {
        pool.storage_failed = true;
        for index in 0..pool.filling.len() {
            let Some(filling) = pool.filling[index].as_mut() else {
                continue;
            };
            let Some(on_disk) = filling.on_disk.take() else {
                continue;
            };
            self.metrics.update(|update| {
                update.sub(Count::RowsDurable, on_disk.durable.row_count);
            });
            self.acks.failed(filling.table_index, filling.position_end);
            self.seal(pool, index);
        }
        self.queue.wake_one();
    }

    fn batch_id(&self, sequence: u64) -> BatchId {
        BatchId {
            run: self.run,
            sequence,
            core: self.core_index as u32,
        }
    }

    /// The spool's segments, where the table is spooled.
    fn segments_of(&self, table_index: usize) -> Option<&Segments> {
        let segments = self.segments.as_deref();
        segments.filter(|_| self.tables[table_index].spooled)
    }
}

impl OnDisk {
    fn new(file: SegmentFile, segments: &Segments) -> Self {
        OnDisk {
            file: Some(file),
            cursor: SegmentCursor::new(segments.id_next(), segments.segment_size()),
            durable: Totals::default(),
            replaced: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn buffers(text: &str) -> (UploadBuffers, Arc<Handover>) {
        let config = Config::parse(text, "test.toml".as_ref(), ".".as_ref()).unwrap();
        let handover = Arc::new(Handover::new(config.upload.buffer_count));
        let metrics = Arc::new(CoreMetrics::new());
        let buffers = UploadBuffers::map(0, &config, handover.clone(), metrics).unwrap();
        (buffers, handover)
    }

    const TWO_TABLES: &str = r#"
        [upload]
        buffer_count = 2
        buffer_size = "64KiB"
        [limits]
        record = "16KiB"
        [[route]]
        path = "/a"
        table = "A"
        [[route]]
        path = "/b"
        table = "B"
        [[route]]
        path = "/c"
        table = "C"
    "#;

    #[test]
    fn a_full_buffer_is_sealed_and_the_pool_never_grows() {
        let (buffers, handover) = buffers(TWO_TABLES);
        let row = [b'x'; 1_000];
        let mut row_count = 0_u64;
        while buffers.try_reserve(0, row.len()) {
            buffers.append(0, &row, 1);
            row_count += 1;
            assert!(row_count < 1_000_000);
            if handover.sealed_count() == 2 {
                break;
            }
        }
        assert!(!buffers.try_reserve(0, row.len()));
        let batches = [handover.receive().unwrap(), handover.receive().unwrap()];
        assert!(handover.receive().is_none());
        assert_eq!(
            batches.iter().map(|batch| batch.row_count).sum::<u64>(),
            row_count
        );
        assert_eq!((batches[0].sequence, batches[1].sequence), (0, 1));
        for batch in batches {
            assert_eq!(batch.member.raw_size, batch.row_count * 1_000);
            buffers.give_back(batch.into_buffer());
        }
        assert_eq!(
            buffers.counts(),
            UploadBufferCounts {
                free: 2,
                open: 0,
                in_uplink: 0
            }
        );
    }

    #[test]
    fn with_more_tables_than_buffers_the_oldest_open_one_makes_room() {
        let (buffers, handover) = buffers(TWO_TABLES);
        for table_index in [0, 1] {
            assert!(buffers.try_reserve(table_index, 8));
            buffers.append(table_index, b"{\"a\":1}\n", 1);
        }
        assert!(
            !buffers.try_reserve(2, 8),
            "its buffer is still with the uplink"
        );
        let batch = handover.receive().unwrap();
        assert_eq!(batch.table_index, 0);
        buffers.give_back(batch.into_buffer());
        assert!(buffers.try_reserve(2, 8));
    }

    #[test]
    fn a_reservation_waits_for_a_buffer_to_come_back() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, async {
            let (buffers, handover) = buffers(TWO_TABLES);
            let buffers = std::rc::Rc::new(buffers);
            for table_index in [0, 1] {
                assert!(buffers.try_reserve(table_index, 8));
                buffers.append(table_index, b"{\"a\":1}\n", 1);
            }
            let waiting = {
                let buffers = buffers.clone();
                tokio::task::spawn_local(async move { buffers.reserve(2, 8, None).await })
            };
            tokio::task::yield_now().await;
            assert!(!waiting.is_finished());
            buffers.give_back(handover.receive().unwrap().into_buffer());
            assert!(waiting.await.unwrap());
        });
    }

    #[test]
    fn an_open_buffer_without_rows_has_no_age_and_makes_no_blob() {
        let (buffers, handover) = buffers(TWO_TABLES);
        assert!(buffers.try_reserve(0, 8));
        buffers.seal_older_than(Duration::ZERO);
        assert!(handover.receive().is_none());
        buffers.append(0, b"{\"a\":1}\n", 1);
        buffers.seal_older_than(Duration::from_secs(3_600));
        assert!(handover.receive().is_none());
        buffers.seal_older_than(Duration::ZERO);
        assert_eq!(handover.receive().unwrap().row_count, 1);
    }
}
