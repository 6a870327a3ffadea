//! Floor B: what the compressor alone costs, for rows that are encoded already.
//!
//! One gzip member's deflate stream and CRC-32 over the rows of each request, at the server's level, into a buffer of
//! the server's size; the member ends when the buffer is nearly full and the next begins, as in the server.
//! Runs on the server's CPU, pinned by the caller, while no server works there.
//!
//! Allocates once, before the clock starts.
//! Not here: the gzip header and trailer; some 18 bytes per 4 MiB cost nothing that could be measured.

use crate::cpu;
use crate::request::Request;
use anyhow::{Result, bail, ensure};
use std::hint::black_box;
use std::time::{Duration, Instant};
use zlib_rs::{Deflate, DeflateFlush, Status};

const BUFFER_SIZE: usize = 4 << 20;

/// Time is read once per this many bytes of rows, so that small requests do not pay for the clock.
const CLOCK_BYTES: usize = 64 << 10;

/// Time per request, by the clock and of the CPU; on an idle machine the same.
#[derive(Clone, Copy)]
pub struct Cost {
    pub seconds: f64,
    pub cpu_seconds: f64,
}

/// Raw deflate into a fixed buffer, started over when it is nearly full.
struct Member {
    deflate: Deflate,
    buffer: Vec<u8>,
    size: usize,
    crc: u32,
    members_closed: u64,
    /// Compressed bytes of closed members.
    bytes_closed: u64,
}

impl Member {
    fn new(level: u8) -> Self {
        Member {
            deflate: Deflate::new(i32::from(level), false, 15),
            buffer: vec![0; BUFFER_SIZE],
            size: 0,
            crc: 0,
            members_closed: 0,
            bytes_closed: 0,
        }
    }

    /// Output that `rows` and everything deflate still holds back may need, plus the end of the stream.
    fn worst_case(rows: usize) -> usize {
        // Stored blocks add 5 bytes per 16 KiB at the worst; deflate holds back at most 256 KiB of symbols.
        let pending = 256 << 10;
        (rows + pending) + (rows + pending) / 1024 + 64
    }

    fn append(&mut self, rows: &[u8]) -> Result<()> {
        if self.buffer.len() - self.size < Member::worst_case(rows.len()) {
            self.close()?;
        }
        self.crc = zlib_rs::crc32::crc32(self.crc, rows);
        let consumed = self.deflate.total_in();
        self.compress(rows, DeflateFlush::NoFlush)?;
        ensure!(
            self.deflate.total_in() - consumed == rows.len() as u64,
            "the compressor left rows behind"
        );
        Ok(())
    }

    fn close(&mut self) -> Result<()> {
        let status = self.compress(&[], DeflateFlush::Finish)?;
        ensure!(status == Status::StreamEnd, "the member did not end");
        black_box((self.crc, &self.buffer[..self.size]));
        self.members_closed += 1;
        self.bytes_closed += self.size as u64;
        self.size = 0;
        self.crc = 0;
        self.deflate.reset();
        Ok(())
    }

    fn compress(&mut self, rows: &[u8], flush: DeflateFlush) -> Result<Status> {
        let written = self.deflate.total_out();
        let result = self
            .deflate
            .compress(rows, &mut self.buffer[self.size..], flush);
        self.size += (self.deflate.total_out() - written) as usize;
        match result {
            Ok(status) => Ok(status),
            Err(error) => bail!("deflate: {}", error.as_str()),
        }
    }
}

/// The compressor, warm, with the rows of a pool of requests.
pub struct FloorB<'a> {
    member: Member,
    requests: &'a [Request],
    next: usize,
}

impl<'a> FloorB<'a> {
    /// Compresses the whole pool once.
    pub fn new(level: u8, requests: &'a [Request]) -> Result<Self> {
        ensure!(!requests.is_empty(), "no rows to compress");
        let mut member = Member::new(level);
        for request in requests {
            ensure!(
                Member::worst_case(request.rows.len()) <= BUFFER_SIZE,
                "the rows of one request do not fit the buffer"
            );
            member.append(&request.rows)?;
        }
        Ok(FloorB {
            member,
            requests,
            next: 0,
        })
    }

    /// Time per request, measured for about `duration`.
    pub fn measure(&mut self, duration: Duration) -> Result<Cost> {
        let start = Instant::now();
        let cpu_start = cpu::thread_time();
        let mut count = 0u64;
        loop {
            let mut bytes = 0;
            while bytes < CLOCK_BYTES {
                let rows = &self.requests[self.next].rows;
                self.next = (self.next + 1) % self.requests.len();
                self.member.append(rows)?;
                // A request without rows must not make this endless.
                bytes += rows.len().max(1);
                count += 1;
            }
            let elapsed = start.elapsed();
            if elapsed >= duration {
                let cpu = cpu::thread_time().saturating_sub(cpu_start);
                return Ok(Cost {
                    seconds: elapsed.as_secs_f64() / count as f64,
                    cpu_seconds: cpu.as_secs_f64() / count as f64,
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zlib_rs::{Inflate, InflateFlush};

    #[test]
    fn a_member_holds_what_was_appended() {
        let mut member = Member::new(2);
        let mut expected = Vec::new();
        for index in 0..20 {
            let rows = Request::single(&weir_perf::event::large_event(3, index)).rows;
            member.append(&rows).expect("fits");
            expected.extend_from_slice(&rows);
        }
        assert_eq!(member.crc, zlib_rs::crc32::crc32(0, &expected));
        member.compress(&[], DeflateFlush::Finish).expect("ends");
        let mut inflated = vec![0; expected.len() + 1];
        let mut inflate = Inflate::new(false, 15);
        let status = inflate
            .decompress(
                &member.buffer[..member.size],
                &mut inflated,
                InflateFlush::Finish,
            )
            .expect("valid deflate");
        assert_eq!(status, Status::StreamEnd);
        assert_eq!(inflated[..inflate.total_out() as usize], expected);
    }

    #[test]
    fn a_full_buffer_begins_a_new_member() {
        let mut member = Member::new(1);
        // Bytes that do not compress, so that the buffer fills quickly.
        let noise: String = (0..2_000)
            .map(|index| weir_perf::event::small_event(9, index)[70..100].to_owned())
            .collect();
        for _ in 0..400 {
            member.append(noise.as_bytes()).expect("fits");
        }
        assert!(member.members_closed > 0);
        assert!(member.bytes_closed <= member.members_closed * BUFFER_SIZE as u64);
        assert!(member.size <= BUFFER_SIZE);
    }

    #[test]
    fn a_measurement_ends() {
        let requests = [Request::single("{}"), Request::single("{\"a\":1}")];
        let mut floor = FloorB::new(2, &requests).expect("small");
        assert!(floor.measure(Duration::ZERO).expect("measures").seconds > 0.0);
    }
}
