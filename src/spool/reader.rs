//! Reading a segment: its frames, one after the other, each checked; and what became of its end.
//!
//! Before it: [`super::disk`] has the file.
//! After it: [`super::recover`] decides what a crash left; [`crate::uplink`] delivers the member.
//! Thread: any that may block. Allocates: never; it reads into a window of [`FRAME_BUFFER_SIZE`] that it is lent.
//! Invariant: a byte comes out only from a frame of this use of the file whose checksum holds, in order, without a gap.
//! Not here: inflating; a member is finished from its totals.

use std::io::{self, Write};

use super::disk::{Disk, Found};
use super::frame::{FrameHeader, Totals, payload_crc};
use super::segment::SegmentHeader;
use crate::deflate::member_end;
use crate::limits::{FRAME_BUFFER_SIZE, FRAME_HEADER_SIZE, SECTOR_SIZE, SEGMENT_HEADER_SIZE};

/// The frames of one segment, in order.
pub struct SegmentReader<'a, D> {
    disk: &'a D,
    found: Found,
    segment_id: u64,
    window: &'a mut [u8],
    window_offset: u64,
    window_size: usize,
    index_next: u32,
    offset_next: u64,
    /// Of the frames so far.
    member_size: u64,
}

/// What is behind the last good frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tail {
    /// Nothing that was written for this batch.
    Clean,
    /// A frame that did not get to the disk whole, and none after it: what a crash during a commit leaves.
    /// Nothing in it was acknowledged, unless the disk has lost what it had confirmed.
    Torn {
        /// Rows that the frame would have added.
        row_count: u64,
    },
    /// A frame is damaged that was durable once, because a later one was begun; or the file was cut.
    Corrupt {
        /// Rows up to the end of the last frame that can be told of, less those before the damage.
        row_count: u64,
    },
}

/// What a segment holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Contents {
    /// Of the member up to the last flush that is whole.
    pub totals: Totals,
    /// Frames up to there.
    pub frame_count: u32,
    pub tail: Tail,
}

impl<'a, D: Disk> SegmentReader<'a, D> {
    /// Reads the frames that belong to `segment_id`, through a `window` of [`FRAME_BUFFER_SIZE`] bytes.
    pub fn new(disk: &'a D, found: Found, segment_id: u64, window: &'a mut [u8]) -> Self {
        assert!(window.len() >= FRAME_BUFFER_SIZE, "a frame fits the window");
        SegmentReader {
            disk,
            found,
            segment_id,
            window,
            window_offset: 0,
            window_size: 0,
            index_next: 0,
            offset_next: SEGMENT_HEADER_SIZE as u64,
            member_size: 0,
        }
    }

    /// The next good frame: its header and its payload. `None` where there is none.
    pub fn next_frame(&mut self) -> io::Result<Option<(FrameHeader, &[u8])>> {
        let Some(header) = self.header_at_next()? else {
            return Ok(None);
        };
        let offset = self.offset_next;
        let size = header.frame_size();
        let payload = FRAME_HEADER_SIZE..FRAME_HEADER_SIZE + header.payload_size as usize;
        let frame = self.bytes(offset, size)?;
        let whole =
            frame.len() == size && payload_crc(&frame[payload.clone()]) == header.payload_crc;
        let member_size = self.member_size + u64::from(header.payload_size);
        if !whole || header.totals.member_size != member_size {
            return Ok(None);
        }
        self.member_size = member_size;
        self.index_next += 1;
        self.offset_next += size as u64;
        Ok(Some((header, &self.bytes(offset, size)?[payload])))
    }

    /// Writes the complete member whose end is at `totals`.
    pub fn copy_member(&mut self, totals: &Totals, output: &mut impl Write) -> io::Result<()> {
        let mut size = 0;
        while size < totals.member_size {
            let Some((header, payload)) = self.next_frame()? else {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "a segment was damaged after it was written",
                ));
            };
            size = header.totals.member_size;
            output.write_all(payload)?;
        }
        output.write_all(&member_end(totals.raw_crc, totals.raw_size))
    }

    /// Reads to the end, and tells what is there.
    pub fn contents(mut self, segment: &SegmentHeader<'_>) -> io::Result<Contents> {
        let mut totals = Totals::default();
        let mut frame_count = 0;
        while let Some((header, _)) = self.next_frame()? {
            if !header.continued {
                totals = header.totals;
                frame_count = header.index + 1;
            }
        }
        Ok(Contents {
            totals,
            frame_count,
            tail: self.tail(totals, segment)?,
        })
    }

    /// What is behind the last good frame, whose totals were `totals`.
    fn tail(&mut self, totals: Totals, segment: &SegmentHeader<'_>) -> io::Result<Tail> {
        let (segment_id, index_next) = (self.segment_id, self.index_next);
        let damaged = self.header_at_next()?;
        let mut row_count_max = damaged.map(|header| header.totals.row_count);
        let mut later = false;
        let mut offset = self.offset_next;
        loop {
            let sector = self.bytes(offset, SECTOR_SIZE)?;
            if sector.len() < SECTOR_SIZE {
                break;
            }
            // Either end of a frame shows that it was begun, and that it was begun shows that all before it were durable.
            for at in [0, SECTOR_SIZE - FRAME_HEADER_SIZE] {
                if let Some(header) = FrameHeader::decode(&sector[at..])
                    && header.segment_id == segment_id
                    && header.index > index_next
                {
                    later = true;
                    row_count_max = row_count_max.max(Some(header.totals.row_count));
                }
            }
            offset += SECTOR_SIZE as u64;
        }
        let row_count = row_count_max.map(|rows| rows.saturating_sub(totals.row_count));
        let cut = self.found.size < segment.segment_size;
        Ok(match row_count {
            Some(row_count) if later => Tail::Corrupt { row_count },
            _ if cut => Tail::Corrupt {
                row_count: row_count.unwrap_or(0),
            },
            Some(row_count) => Tail::Torn { row_count },
            None => Tail::Clean,
        })
    }

    /// The header of the frame that should come next, from either of its ends.
    fn header_at_next(&mut self) -> io::Result<Option<FrameHeader>> {
        let (segment_id, index) = (self.segment_id, self.index_next);
        let ours = |header: &FrameHeader| header.segment_id == segment_id && header.index == index;
        let begin = self.offset_next;
        let front = FrameHeader::decode(self.bytes(begin, SECTOR_SIZE)?);
        if front.is_some_and(|header| ours(&header)) {
            return Ok(front);
        }
        // Its first header is damaged or was never there: look for the second, which ends a sector.
        let mut end = begin + SECTOR_SIZE as u64;
        while end - begin <= FRAME_BUFFER_SIZE as u64 {
            let sector = self.bytes(end - SECTOR_SIZE as u64, SECTOR_SIZE)?;
            if sector.len() < SECTOR_SIZE {
                break;
            }
            if let Some(back) = FrameHeader::decode(&sector[SECTOR_SIZE - FRAME_HEADER_SIZE..])
                && ours(&back)
                && back.frame_size() as u64 == end - begin
            {
                return Ok(Some(back));
            }
            end += SECTOR_SIZE as u64;
        }
        Ok(None)
    }

    /// The bytes at `offset`, fewer where the file ends; `size` is at most the window's.
    fn bytes(&mut self, offset: u64, size: usize) -> io::Result<&[u8]> {
        assert!(size <= self.window.len());
        let held = self.window_offset..self.window_offset + self.window_size as u64;
        let wanted_end = (offset + size as u64).min(self.found.size);
        if !(held.contains(&offset) && wanted_end <= held.end) {
            self.window_size = 0;
            self.window_size = self.disk.read(self.found, self.window, offset)?;
            self.window_offset = offset;
        }
        let begin = (offset - self.window_offset) as usize;
        Ok(&self.window[begin.min(self.window_size)..(begin + size).min(self.window_size)])
    }
}
