//! What a group commit does to the upload buffers: begin, stage, advance, end or fail.
//!
//! Before it: rows were appended. After it: they are durable, and whom they belong to is told.
//! Thread: one reactor; [`crate::commit`] calls these around its writes, during which rows go on being appended.
//! Allocates: never, but where a write failed.
//! Invariant: the bytes of a member up to its last flush do not change any more, so a frame is made from where they lie.

use std::borrow::Cow;

use super::batch::UploadBuffer;
use super::filling::OnDisk;
use super::{Pool, UploadBuffers};
use crate::metrics::Count;
use crate::spool::disk::SegmentFile;
use crate::spool::frame::Totals;
use crate::spool::segment::{FrameWrite, SegmentHeader};

/// A commit in progress: what is being made durable.
pub struct Commit {
    index: usize,
    pub table_index: usize,
    /// The table's rows up to here will be durable.
    pub position: u64,
    totals: Totals,
    pub file: SegmentFile,
}

impl UploadBuffers {
    /// Flushes a batch that has rows which are not durable, and begins to commit it. `None` where there is none.
    pub fn commit_begin(&self) -> Option<Commit> {
        let mut pool = self.pool.borrow_mut();
        let place_count = pool.filling.len();
        // Sealed ones first, oldest first: they hold buffers that others may wait for, and a table's rows settle in order.
        let sealed = (0..place_count)
            .filter(|index| {
                pool.filling[*index]
                    .as_ref()
                    .is_some_and(|f| f.sealed && !f.durable())
            })
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
                database: Cow::Borrowed(&table.database),
                table: Cow::Borrowed(&table.table),
            }
        };
        let member = &filling.buffer.memory[..member_size];
        Some(
            on_disk
                .cursor
                .stage(buffer, member, commit.totals, on_disk.durable, header),
        )
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
        let Commit {
            index,
            totals,
            file,
            ..
        } = commit;
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
    pub(super) fn seal_awaited(&self, pool: &mut Pool, index: usize) {
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
        self.metrics
            .update(|update| update.add(Count::CommitFailures, 1));
        let filling = pool.filling[commit.index].as_mut().expect("in commit");
        let on_disk = filling.on_disk.as_mut().expect("in commit");
        self.acks.failed(commit.table_index, commit.position);
        let moved_before = !on_disk.replaced.is_empty();
        let found = on_disk.found(&commit.file);
        on_disk.replaced.push(found);
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
                self.metrics
                    .update(|update| update.sub(Count::RowsDurable, durable_before));
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
}
