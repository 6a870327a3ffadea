//! A batch: the content of a sealed upload buffer, on its way to its destination.
//!
//! Before it: [`super::UploadBuffers`] seals a buffer.
//! After it: [`crate::uplink`] delivers it; its memory comes back, its segment is retired.
//! Thread: moves from a reactor to the uplink and back. Allocates: never.
//! Invariant: a batch is in memory or in the spool, or both.

use std::io;

use crate::deflate::{GzipMember, MEMBER_END_SIZE};
use crate::memory::Region;
use crate::spool::Spooled;
use crate::spool::frame::Totals;
use crate::spool::segment::BatchId;

/// Memory for one blob, with the deflate state that fills it.
pub struct UploadBuffer {
    pub(super) memory: Region,
    pub(super) member: GzipMember,
}

impl UploadBuffer {
    pub(super) fn map(size: usize, level: u8) -> io::Result<Self> {
        Ok(UploadBuffer {
            memory: Region::map(size)?,
            member: GzipMember::new(level),
        })
    }

    pub(super) fn totals(&self, row_count: u64) -> Totals {
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
    /// Its core wants to hear of its delivery.
    pub reported: bool,
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
    /// The buffer's member is closed.
    pub(super) fn new(buffer: Box<UploadBuffer>) -> Self {
        BatchMemory { buffer }
    }

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
