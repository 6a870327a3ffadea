//! Recovery: what the files of the spool's directory are, after whatever happened.
//!
//! Before it: [`super::disk`] lists the files.
//! After it: [`crate::spool`] knows which are free and which hold a batch to deliver.
//! Thread: the main thread at start; it reads a page of each file, so that a start does not take longer for what is
//! in them. Allocates: an entry per file that holds a batch.
//! Invariant: a file is only called free where its batch was delivered, or where nothing in it can have been
//! acknowledged.
//! Not here: the frames, which are checked when a batch's turn to be delivered comes ([`super::reader`]).

use std::io;

use super::disk::{Disk, Found};
use super::frame::FrameHeader;
use super::reader::SegmentReader;
use super::segment::{BatchId, HeaderFault, SegmentHeader, is_delivered};
use crate::limits::{FRAME_BUFFER_SIZE, SECTOR_SIZE, SEGMENT_HEADER_SIZE};

/// What a file is, as far as its first page tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Never used, or used and delivered.
    Free,
    /// Holds a batch that is not known to be delivered.
    Pending(SegmentHeader<'static>),
    /// The header cannot be read, and there are frames behind it: nobody can say whose they are.
    Damaged,
    /// The format is another version's.
    Version(u32),
    /// Put aside earlier.
    Quarantined,
}

/// The state of one file.
pub fn state_of<D: Disk>(disk: &D, found: Found) -> io::Result<State> {
    if found.quarantined {
        return Ok(State::Quarantined);
    }
    let mut head = [0; SEGMENT_HEADER_SIZE];
    let size = disk.read(found, &mut head, 0)?;
    match SegmentHeader::decode(&head[..size]) {
        Ok(header) => {
            if is_delivered(&head[..size], header.segment_id) {
                Ok(State::Free)
            } else {
                Ok(State::Pending(header))
            }
        }
        Err(HeaderFault::Blank) => Ok(State::Free),
        Err(HeaderFault::Version(version)) => Ok(State::Version(version)),
        Err(HeaderFault::Damaged) => {
            // The header goes out with the first frame, and a crash may have cut that write off. But where the frame is
            // whole, or the file was cut, the write may have been confirmed: then nothing is thrown away.
            let cut = size < SEGMENT_HEADER_SIZE;
            Ok(if cut || first_frame_id(disk, found)?.is_some() {
                State::Damaged
            } else {
                State::Free
            })
        }
    }
}

/// The segment that the first frame says it belongs to, if that frame is whole.
fn first_frame_id<D: Disk>(disk: &D, found: Found) -> io::Result<Option<u64>> {
    let mut sector = [0; SECTOR_SIZE];
    let size = disk.read(found, &mut sector, SEGMENT_HEADER_SIZE as u64)?;
    let Some(header) = FrameHeader::decode(&sector[..size]) else {
        return Ok(None);
    };
    let mut window = vec![0; FRAME_BUFFER_SIZE];
    let mut reader = SegmentReader::new(disk, found, header.segment_id, &mut window);
    Ok(reader.next_frame()?.map(|_| header.segment_id))
}

/// A segment that holds a batch, or a part of one that has moved. Its names are read again when its turn comes: there can
/// be as many as the spool has segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PendingSegment {
    // First, so that the oldest batches come first and the segments of one stand together: UUIDv7 sorts by time.
    pub batch: BatchId,
    pub segment_id: u64,
    pub found: Found,
}

/// The segments of each batch, oldest batches first.
pub fn pending_batches(pending: &mut [PendingSegment]) -> impl Iterator<Item = &[PendingSegment]> {
    pending.sort_unstable();
    pending.chunk_by(|a, b| a.batch == b.batch)
}
