//! One streaming gzip member in a buffer of fixed size.
//!
//! Before it: [`crate::encoder`] hands it rows.
//! After it: [`crate::upload_buffer`] holds the output, which is the blob as it will be uploaded.
//! Thread: a reactor.
//! Allocates: the deflate state, once, in [`GzipMember::new`]; a new member resets it.
//! Invariant: the member always fits: before a row is appended there is room for the worst that deflate can make of it.
//! Not here: a second member. One blob is one member, because a reader that stops after the first loses the rest silently.

use zlib_rs::{Deflate, DeflateFlush, Status, crc32::crc32};

use crate::limits::{GZIP_HEADER_SIZE, GZIP_TRAILER_SIZE, deflate_size_max};

/// The header of every member: no name, no time, unknown system (RFC 1952 §2.3.1).
const HEADER: [u8; GZIP_HEADER_SIZE] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff];

/// What ends a deflate stream behind a flush: an empty final block with fixed codes (RFC 1951 §3.2.6).
const FINAL_BLOCK: [u8; 2] = [0x03, 0x00];

/// Bytes that [`member_end`] makes.
pub const MEMBER_END_SIZE: usize = FINAL_BLOCK.len() + GZIP_TRAILER_SIZE;

/// What completes a member whose last bytes were made by a flush: the final block, and the trailer
/// (RFC 1952 §2.3.1: CRC-32, then the size modulo 2³²). It takes no deflate state, so it can be done after a crash.
pub fn member_end(raw_crc: u32, raw_size: u64) -> [u8; MEMBER_END_SIZE] {
    let mut end = [0; MEMBER_END_SIZE];
    end[..2].copy_from_slice(&FINAL_BLOCK);
    end[2..6].copy_from_slice(&raw_crc.to_le_bytes());
    end[6..].copy_from_slice(&(raw_size as u32).to_le_bytes());
    end
}

/// The state of one gzip member (RFC 1952) that is written to a buffer its caller keeps.
pub struct GzipMember {
    deflate: Deflate,
    /// CRC-32 of the raw bytes so far (RFC 1952 §8).
    crc: u32,
    raw_size: u64,
    /// Bytes of the output so far, header included.
    size: usize,
    /// Raw bytes since the last flush: what is not yet in the output is among them.
    raw_size_unflushed: usize,
    /// Bytes of the output at the last flush.
    size_flushed: usize,
}

impl GzipMember {
    /// Allocates the deflate state for `level` (1 to 9).
    pub fn new(level: u8) -> Self {
        GzipMember {
            deflate: Deflate::new(i32::from(level), false, 15),
            crc: 0,
            raw_size: 0,
            size: 0,
            raw_size_unflushed: 0,
            size_flushed: 0,
        }
    }

    /// Begins a new member at the start of `output`.
    pub fn open(&mut self, output: &mut [u8]) {
        self.deflate.reset();
        output[..GZIP_HEADER_SIZE].copy_from_slice(&HEADER);
        self.crc = 0;
        self.raw_size = 0;
        self.size = GZIP_HEADER_SIZE;
        self.raw_size_unflushed = 0;
        self.size_flushed = GZIP_HEADER_SIZE;
    }

    /// Bytes of the output so far; deflate may hold some back until the next flush.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Whether `raw_size` more bytes are sure to fit `capacity`, whatever they are.
    ///
    /// The bound counts from the last flush, because only there is the output known to be complete.
    /// Where it says no, a flush makes the bound exact, and is worth its few bytes.
    pub fn fits(&mut self, output: &mut [u8], raw_size: usize) -> bool {
        if self.size_max_after(raw_size) <= output.len() {
            return true;
        }
        let hopeless = self.size + deflate_size_max(raw_size) > output.len();
        if hopeless || self.raw_size_unflushed == 0 {
            return false;
        }
        self.flush(output);
        self.size_max_after(raw_size) <= output.len()
    }

    /// CRC-32 of the raw bytes so far.
    pub fn raw_crc(&self) -> u32 {
        self.crc
    }

    /// Raw bytes so far.
    pub fn raw_size(&self) -> u64 {
        self.raw_size
    }

    /// The member's size if `raw_size` more bytes came and nothing could be compressed.
    pub fn size_max_after(&self, raw_size: usize) -> usize {
        self.size_flushed + deflate_size_max(self.raw_size_unflushed + raw_size) + GZIP_TRAILER_SIZE
    }

    /// Compresses `raw`, which [`GzipMember::fits`] has said yes to.
    pub fn append(&mut self, output: &mut [u8], raw: &[u8]) {
        self.crc = crc32(self.crc, raw);
        self.raw_size += raw.len() as u64;
        self.raw_size_unflushed += raw.len();
        self.compress(output, raw, DeflateFlush::NoFlush);
    }

    /// Ends the output on a byte boundary; what was appended can be inflated from it. Without new bytes it does nothing.
    pub fn flush(&mut self, output: &mut [u8]) {
        if self.raw_size_unflushed > 0 {
            self.compress(output, &[], DeflateFlush::SyncFlush);
            self.raw_size_unflushed = 0;
            self.size_flushed = self.size;
        }
    }

    /// Completes the member. The same bytes come out whether it was flushed before or not.
    pub fn close(&mut self, output: &mut [u8]) {
        self.flush(output);
        let end = self.size..self.size + MEMBER_END_SIZE;
        output[end].copy_from_slice(&member_end(self.crc, self.raw_size));
    }

    fn compress(&mut self, output: &mut [u8], raw: &[u8], flush: DeflateFlush) {
        let in_before = self.deflate.total_in();
        let out_before = self.deflate.total_out();
        let status = self.deflate.compress(raw, &mut output[self.size..], flush);
        let consumed = self.deflate.total_in() - in_before;
        self.size += (self.deflate.total_out() - out_before) as usize;
        // With room for the worst case, deflate takes everything and leaves some output unused.
        assert_eq!(consumed, raw.len() as u64, "deflate left input behind");
        assert!(
            self.size + GZIP_TRAILER_SIZE <= output.len(),
            "deflate exceeded its bound"
        );
        assert!(
            matches!(status, Ok(Status::Ok | Status::BufError)),
            "deflate failed: {status:?}"
        );
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    /// Bytes that no compressor can shorten, the same at every run.
    fn incompressible(size: usize, seed: u64) -> Vec<u8> {
        let mut state = seed | 1;
        (0..size)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 24) as u8
            })
            .collect()
    }

    fn inflate_one_member(bytes: &[u8]) -> Vec<u8> {
        let mut decoder = flate2::bufread::GzDecoder::new(bytes);
        let mut raw = Vec::new();
        decoder.read_to_end(&mut raw).unwrap();
        assert!(decoder.into_inner().is_empty(), "bytes after the member");
        raw
    }

    #[test]
    fn every_level_fills_a_buffer_to_the_brim_and_never_over() {
        let random = incompressible(1 << 20, 7);
        let text: Vec<u8> = b"abcdefgh".iter().copied().cycle().take(1 << 20).collect();
        let mut output = vec![0; 100_000];
        for level in 1..=9 {
            let mut member = GzipMember::new(level);
            for append_size in [1, 3, 200, 4_096, 30_000] {
                for raw in [&random, &text] {
                    member.open(&mut output);
                    let mut appended = 0;
                    for piece in raw.chunks(append_size) {
                        if !member.fits(&mut output, piece.len()) {
                            break;
                        }
                        member.append(&mut output, piece);
                        appended += piece.len();
                    }
                    member.close(&mut output);
                    let size = member.size() + MEMBER_END_SIZE;
                    assert_eq!(member.raw_size(), appended as u64);
                    assert_eq!(inflate_one_member(&output[..size]), raw[..appended]);
                    if raw == &random {
                        // What is left is less than the worst case of one more piece.
                        let left = output.len() - size;
                        assert!(
                            left <= deflate_size_max(append_size) + 64,
                            "level {level}: {left}"
                        );
                    } else {
                        assert_eq!(appended, raw.len(), "level {level}");
                    }
                }
            }
        }
    }

    #[test]
    fn an_empty_member_is_a_complete_member() {
        let mut output = vec![0; 256];
        let mut member = GzipMember::new(2);
        member.open(&mut output);
        member.close(&mut output);
        assert_eq!(
            inflate_one_member(&output[..member.size() + MEMBER_END_SIZE]),
            b""
        );
    }

    #[test]
    fn a_flush_makes_what_was_appended_inflatable() {
        let mut output = vec![0; 65_536];
        let mut member = GzipMember::new(2);
        member.open(&mut output);
        member.append(&mut output, b"{\"a\":1}\n");
        member.flush(&mut output);
        let mut raw = Vec::new();
        let mut decoder = flate2::bufread::GzDecoder::new(&output[..member.size()]);
        let mut chunk = [0; 64];
        while let Ok(read @ 1..) = decoder.read(&mut chunk) {
            raw.extend_from_slice(&chunk[..read]);
        }
        assert_eq!(raw, b"{\"a\":1}\n");
    }
}
