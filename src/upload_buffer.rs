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

mod batch;
mod commits;
mod filling;

use std::cell::RefCell;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use uuid::Uuid;

use crate::ack::Acks;
use crate::config::{Config, Table};
use crate::deflate::MEMBER_END_SIZE;
use crate::error::Refusal;
use crate::limits::{STAGING_SIZE, deflate_size_max, row_size_max, upload_buffer_size_min};
use crate::metrics::{CoreMetrics, Count};
use crate::spool::segment::BatchId;
use crate::spool::{Segments, Spooled};
use crate::uplink::{Delivered, Fate, Handover};
use crate::wait::{Bell, WaitQueue};
pub use batch::{Batch, BatchMemory, UploadBuffer};
pub use commits::Commit;
use filling::{Filling, OnDisk};

struct Pool {
    #[expect(
        clippy::vec_box,
        reason = "a buffer goes from here to the uplink and back, and moves as a pointer"
    )]
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
            free.push(Box::new(UploadBuffer::map(
                buffer_size,
                config.compression.level,
            )?));
        }
        let table_count = config.tables.len();
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
            acks: Acks::new(
                &config.tables,
                config.requests_max(),
                config.reported_max() + buffer_count,
            ),
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
    pub fn claim(
        &self,
        table_index: usize,
        row_count: usize,
        raw_size: usize,
    ) -> Result<(), Refusal> {
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
        let filled_at_least = self
            .buffer_size
            .saturating_sub(deflate_size_max(piece))
            .max(1);
        let worst = deflate_size_max(raw_size)
            .div_ceil(filled_at_least)
            .min(row_count);
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
        let reserved =
            self.queue
                .until(deadline, || match self.try_reserve(table_index, raw_size) {
                    Ok(true) => Some(Ok(())),
                    Ok(false) => None,
                    Err(refusal) => Some(Err(refusal)),
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
            begun_at_ms: 0,
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
        self.metrics
            .update(|update| update.add(Count::RowsAppended, row_count));
        let position = pool.positions[table_index];
        let index = pool.open[table_index].expect("reserved before");
        let filling = pool.filling[index].as_mut().expect("an open buffer");
        let UploadBuffer { memory, member } = &mut *filling.buffer;
        member.append(memory, rows);
        filling.row_count += row_count;
        filling.position_end = position;
        if filling.first_row_at.is_none() {
            filling.first_row_at = Some(Instant::now());
            let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            filling.begun_at_ms = since_1970.map_or(0, |since| since.as_millis() as u64);
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
        let filling = || {
            pool.filling
                .iter()
                .enumerate()
                .filter_map(|(index, f)| Some((index, f.as_ref()?)))
        };
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
            update.add(
                Count::BatchBytes,
                totals.member_size + MEMBER_END_SIZE as u64,
            );
        });
        pool.in_uplink_count += 1;
        if self.tables[table_index].delivered {
            self.acks.sent(table_index, filling.position_end);
        }
        if filling.awaited {
            pool.awaited_in_uplink[table_index] += 1;
        }
        let reported = filling.on_disk.is_none() || self.tables[table_index].delivered;
        if filling.on_disk.is_none() {
            pool.unspooled_in_uplink_count += 1;
        }
        self.handover.send(Batch {
            id: self.batch_id(filling.sequence),
            table_index,
            totals,
            memory: Some(BatchMemory::new(filling.buffer)),
            spooled: filling.on_disk.map(|on_disk| Spooled {
                found: on_disk.found(on_disk.file.as_ref().expect("no commit is in progress")),
                segment_id: on_disk.cursor.segment_id(),
                replaced: on_disk.replaced,
                damaged: false,
            }),
            reported,
            awaited: filling.awaited,
            position_end: filling.position_end,
            begun_at_ms: filling.begun_at_ms,
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
            match delivered.fate {
                Fate::Delivered => self.acks.delivered(table_index, delivered.position_end),
                Fate::DeadLetter => self.acks.undeliverable(table_index, delivered.position_end),
            }
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

#[cfg(test)]
mod tests;
