//! A batch that is filled: its buffer and, where its table is spooled, its segment.
//!
//! Before it: [`super::UploadBuffers`] opens it. After it: it is handed over as a [`super::Batch`].
//! Thread: one reactor. Allocates: never, but where a write failed.
//! Invariant: a segment is written by one commit at a time; a batch moves to another one at most once.

use std::time::Instant;

use super::batch::UploadBuffer;
use crate::limits::GZIP_TRAILER_SIZE;
use crate::spool::Segments;
use crate::spool::disk::{Found, SegmentFile};
use crate::spool::frame::Totals;
use crate::spool::segment::SegmentCursor;

/// A batch that is not yet with the uplink.
pub(super) struct Filling {
    pub(super) buffer: Box<UploadBuffer>,
    pub(super) table_index: usize,
    pub(super) sequence: u64,
    pub(super) row_count: u64,
    /// The table's rows up to and including the last one here.
    pub(super) position_end: u64,
    /// When the first row came; a buffer without rows has no age.
    pub(super) first_row_at: Option<Instant>,
    pub(super) sealed: bool,
    pub(super) awaited: bool,
    /// Absent for a table that is not spooled, and where the disk has failed.
    pub(super) on_disk: Option<OnDisk>,
}

/// The segment of a batch.
pub(super) struct OnDisk {
    /// Absent while a commit has it.
    pub(super) file: Option<SegmentFile>,
    pub(super) cursor: SegmentCursor,
    /// Of the last flush that is durable.
    pub(super) durable: Totals,
    /// Segments that hold a part of this batch and could not be written any more.
    pub(super) replaced: Vec<Found>,
}

impl Filling {
    pub(super) fn fits(&mut self, raw_size: usize) -> bool {
        let UploadBuffer { memory, member } = &mut *self.buffer;
        if !member.fits(memory, raw_size) {
            return false;
        }
        let member_size = member.size_max_after(raw_size) - GZIP_TRAILER_SIZE;
        let on_disk = self.on_disk.as_ref();
        on_disk.is_none_or(|on_disk| on_disk.cursor.fits(member_size))
    }

    pub(super) fn durable(&self) -> bool {
        let on_disk = self.on_disk.as_ref();
        on_disk.is_none_or(|on_disk| on_disk.durable.row_count == self.row_count)
    }

    pub(super) fn in_commit(&self) -> bool {
        let on_disk = self.on_disk.as_ref();
        on_disk.is_some_and(|on_disk| on_disk.file.is_none())
    }
}

impl OnDisk {
    pub(super) fn new(file: SegmentFile, segments: &Segments) -> Self {
        OnDisk {
            file: Some(file),
            cursor: SegmentCursor::new(segments.id_next(), segments.segment_size()),
            durable: Totals::default(),
            replaced: Vec::new(),
        }
    }

    /// The segment, as it is found in the directory.
    pub(super) fn found(&self, file: &SegmentFile) -> Found {
        Found {
            slot: file.slot,
            size: self.cursor.segment_size(),
            quarantined: false,
        }
    }
}
