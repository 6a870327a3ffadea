//! Frames: what one group commit adds to a segment.
//!
//! Before it: [`crate::commit`] has flushed a gzip member and wants its new bytes on disk.
//! After it: [`super::recover`] reads frames back after a crash, [`super::reader`] for delivery.
//! Thread: any; pure functions of bytes. Allocates: never.
//! Invariant: a frame is whole sectors, and everything that decides about it is covered by a checksum.
//! Not here: where in a segment a frame stands ([`super::segment`]).
//!
//! ```text
//! | header 64 | payload: bytes of the gzip member | zeros | header once more 64 |
//! 0                                                       ^ ends a sector
//! ```
//!
//! The second header makes the extent and the totals of a frame known also where the first is damaged, so that a loss
//! can be counted exactly. `docs/SPOOL_FORMAT.md` has every offset.

use zlib_rs::crc32::crc32;

use crate::limits::{FRAME_BUFFER_SIZE, FRAME_HEADER_SIZE, frame_size};

/// `WFRM`.
const MAGIC: u32 = u32::from_le_bytes(*b"WFRM");

/// The payload does not end at a flush: without the next frame it cannot be inflated to its end.
const FLAG_CONTINUED: u32 = 1;

// Offsets in the header, all little-endian.
const MAGIC_AT: usize = 0;
const HEADER_CRC_AT: usize = 4;
const SEGMENT_ID_AT: usize = 8;
const INDEX_AT: usize = 16;
const FLAGS_AT: usize = 20;
const PAYLOAD_SIZE_AT: usize = 24;
const PAYLOAD_CRC_AT: usize = 28;
const MEMBER_SIZE_AT: usize = 32;
const RAW_SIZE_AT: usize = 40;
const ROW_COUNT_AT: usize = 48;
const RAW_CRC_AT: usize = 56;
const RESERVED_AT: usize = 60;

const _: () = {
    assert!(HEADER_CRC_AT == MAGIC_AT + 4 && SEGMENT_ID_AT == HEADER_CRC_AT + 4);
    assert!(INDEX_AT == SEGMENT_ID_AT + 8 && FLAGS_AT == INDEX_AT + 4);
    assert!(PAYLOAD_SIZE_AT == FLAGS_AT + 4 && PAYLOAD_CRC_AT == PAYLOAD_SIZE_AT + 4);
    assert!(MEMBER_SIZE_AT == PAYLOAD_CRC_AT + 4 && RAW_SIZE_AT == MEMBER_SIZE_AT + 8);
    assert!(ROW_COUNT_AT == RAW_SIZE_AT + 8 && RAW_CRC_AT == ROW_COUNT_AT + 8);
    assert!(RESERVED_AT == RAW_CRC_AT + 4 && RESERVED_AT + 4 == FRAME_HEADER_SIZE);
};

/// The sums of a gzip member up to the end of a frame: what it takes to finish it without inflating it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Bytes of the member, its gzip header included.
    pub member_size: u64,
    /// Bytes before compression.
    pub raw_size: u64,
    /// CRC-32 of the bytes before compression (RFC 1952 §8).
    pub raw_crc: u32,
    pub row_count: u64,
}

/// What the header of a frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// The segment's, so that a frame of an earlier use of the file is never taken for one of this.
    pub segment_id: u64,
    /// From 0 in each segment.
    pub index: u32,
    pub continued: bool,
    pub payload_size: u32,
    /// CRC-32 of the payload.
    pub payload_crc: u32,
    /// Of the member up to the end of this frame; where `continued`, of the last flush before it, but for `member_size`.
    pub totals: Totals,
}

impl FrameHeader {
    pub fn encode(&self) -> [u8; FRAME_HEADER_SIZE] {
        let mut bytes = [0; FRAME_HEADER_SIZE];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(MAGIC_AT, &MAGIC.to_le_bytes());
        put(SEGMENT_ID_AT, &self.segment_id.to_le_bytes());
        put(INDEX_AT, &self.index.to_le_bytes());
        let flags = if self.continued { FLAG_CONTINUED } else { 0 };
        put(FLAGS_AT, &flags.to_le_bytes());
        put(PAYLOAD_SIZE_AT, &self.payload_size.to_le_bytes());
        put(PAYLOAD_CRC_AT, &self.payload_crc.to_le_bytes());
        put(MEMBER_SIZE_AT, &self.totals.member_size.to_le_bytes());
        put(RAW_SIZE_AT, &self.totals.raw_size.to_le_bytes());
        put(ROW_COUNT_AT, &self.totals.row_count.to_le_bytes());
        put(RAW_CRC_AT, &self.totals.raw_crc.to_le_bytes());
        let crc = crc32(0, &bytes[SEGMENT_ID_AT..]);
        bytes[HEADER_CRC_AT..SEGMENT_ID_AT].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// `None` where the bytes are not a header, or not all of one.
    pub fn decode(bytes: &[u8]) -> Option<FrameHeader> {
        let bytes: &[u8; FRAME_HEADER_SIZE] = bytes.get(..FRAME_HEADER_SIZE)?.try_into().ok()?;
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte]));
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte]));
        let flags = u32_at(FLAGS_AT);
        let sound = u32_at(MAGIC_AT) == MAGIC
            && u32_at(HEADER_CRC_AT) == crc32(0, &bytes[SEGMENT_ID_AT..])
            && flags & !FLAG_CONTINUED == 0
            && frame_size(u32_at(PAYLOAD_SIZE_AT) as usize) <= FRAME_BUFFER_SIZE;
        sound.then(|| FrameHeader {
            segment_id: u64_at(SEGMENT_ID_AT),
            index: u32_at(INDEX_AT),
            continued: flags & FLAG_CONTINUED != 0,
            payload_size: u32_at(PAYLOAD_SIZE_AT),
            payload_crc: u32_at(PAYLOAD_CRC_AT),
            totals: Totals {
                member_size: u64_at(MEMBER_SIZE_AT),
                raw_size: u64_at(RAW_SIZE_AT),
                raw_crc: u32_at(RAW_CRC_AT),
                row_count: u64_at(ROW_COUNT_AT),
            },
        })
    }

    /// Bytes of the whole frame on disk.
    pub fn frame_size(&self) -> usize {
        frame_size(self.payload_size as usize)
    }
}

/// CRC-32 of a payload.
pub fn payload_crc(payload: &[u8]) -> u32 {
    crc32(0, payload)
}

/// Writes a whole frame to the start of `output`; the bytes it takes.
pub fn write_frame(output: &mut [u8], header: &FrameHeader, payload: &[u8]) -> usize {
    assert_eq!(payload.len(), header.payload_size as usize);
    let size = header.frame_size();
    let frame = &mut output[..size];
    let header = header.encode();
    let (front, rest) = frame.split_at_mut(FRAME_HEADER_SIZE);
    let (body, back) = rest.split_at_mut(size - 2 * FRAME_HEADER_SIZE);
    front.copy_from_slice(&header);
    body[..payload.len()].copy_from_slice(payload);
    body[payload.len()..].fill(0);
    back.copy_from_slice(&header);
    size
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::limits::SECTOR_SIZE;

    fn headers() -> impl Strategy<Value = FrameHeader> {
        let payload_size = 0..=(FRAME_BUFFER_SIZE - 2 * FRAME_HEADER_SIZE) as u32;
        let place = (any::<u64>(), any::<u32>(), any::<bool>(), payload_size);
        let sums = (
            any::<u32>(),
            any::<u64>(),
            any::<u64>(),
            any::<u64>(),
            any::<u32>(),
        );
        (place, sums).prop_map(|((segment_id, index, continued, payload_size), sums)| {
            let (payload_crc, member_size, raw_size, row_count, raw_crc) = sums;
            FrameHeader {
                segment_id,
                index,
                continued,
                payload_size,
                payload_crc,
                totals: Totals {
                    member_size,
                    raw_size,
                    raw_crc,
                    row_count,
                },
            }
        })
    }

    proptest! {
        #[test]
        fn a_header_reads_back_and_no_single_flip_does(header in headers(), bit in 0..512_usize) {
            let mut bytes = header.encode();
            prop_assert_eq!(FrameHeader::decode(&bytes), Some(header));
            bytes[bit / 8] ^= 1 << (bit % 8);
            // The reserved bytes are under the checksum like the others.
            prop_assert_eq!(FrameHeader::decode(&bytes), None);
            prop_assert_eq!(FrameHeader::decode(&bytes[..63]), None);
        }
    }

    #[test]
    fn a_frame_is_whole_sectors_with_its_header_at_both_ends() {
        for payload_size in [0, 1, 383, 384, 385, 4_000] {
            let payload = vec![0xab; payload_size];
            let header = FrameHeader {
                segment_id: 7,
                index: 3,
                continued: false,
                payload_size: payload_size as u32,
                payload_crc: payload_crc(&payload),
                totals: Totals::default(),
            };
            let mut output = vec![0xff; 8_192];
            let size = write_frame(&mut output, &header, &payload);
            assert!(size.is_multiple_of(SECTOR_SIZE) && size < payload_size + 128 + SECTOR_SIZE);
            assert_eq!(FrameHeader::decode(&output), Some(header));
            assert_eq!(
                FrameHeader::decode(&output[size - FRAME_HEADER_SIZE..size]),
                Some(header)
            );
            assert_eq!(output[FRAME_HEADER_SIZE..][..payload_size], payload);
            assert!(output[size..].iter().all(|byte| *byte == 0xff));
        }
    }
}
