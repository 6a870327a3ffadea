//! The frames of an HTTP/2 connection, seen from outside: what kinds pass, and whether too many do (RFC 9113 §4.1).
//!
//! Before it: bytes of the connection, cut anywhere.
//! After it: the `h2` crate, which reads what the frames mean; it bounds memory, but not how often a peer may ask for
//! work that carries nothing. [`crate::connection`] ends the connection where a [`Flood`] is found.
//! Thread: any; pure. Allocates: never.
//! Invariant: what is found does not depend on where the bytes are cut.
//! Not here: whether a frame is a valid one.

use crate::limits::{
    HTTP2_CONTROL_FRAME_COUNT_MAX, HTTP2_CONTROL_FRAMES_PER_REQUEST, HTTP2_METER_WINDOW,
    HTTP2_RESET_COUNT_MAX,
};

/// RFC 9113 §4.1: length (24 bits), type (8), flags (8), stream identifier (32).
pub const HEADER_SIZE: usize = 9;

/// RFC 9113 §3.4: what a client begins with.
pub const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The first bytes of a payload that are kept: a GOAWAY's last stream and error code (RFC 9113 §6.8).
const START_SIZE: usize = 8;

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const GOAWAY: u8 = 7;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;

/// One frame, as far as it is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    /// Bytes of the payload.
    pub size: usize,
    /// Its first bytes; zeros where it is shorter.
    pub start: [u8; START_SIZE],
}

/// Finds the frames in a stream of bytes.
#[derive(Debug, Default, Clone)]
pub struct Scanner {
    header: [u8; HEADER_SIZE],
    header_size: usize,
    start: [u8; START_SIZE],
    /// Of the payload, so far.
    passed: usize,
}

impl Scanner {
    /// Takes the next bytes, and gives each frame to `frame` once the start of its payload has passed.
    pub fn scan(&mut self, bytes: &[u8], mut frame: impl FnMut(&Frame)) {
        let mut rest = bytes;
        loop {
            if self.header_size < HEADER_SIZE {
                let (taken, left) = rest.split_at(rest.len().min(HEADER_SIZE - self.header_size));
                self.header[self.header_size..self.header_size + taken.len()]
                    .copy_from_slice(taken);
                self.header_size += taken.len();
                rest = left;
                if self.header_size < HEADER_SIZE {
                    return;
                }
                if self.size() == 0 {
                    frame(&self.frame());
                }
            }
            let size = self.size();
            let (taken, left) = rest.split_at(rest.len().min(size - self.passed));
            rest = left;
            let begin = self.passed;
            self.passed += taken.len();
            let start_size = size.min(START_SIZE);
            if begin < start_size {
                let end = self.passed.min(start_size);
                self.start[begin..end].copy_from_slice(&taken[..end - begin]);
                if end == start_size {
                    frame(&self.frame());
                }
            }
            if self.passed < size {
                return;
            }
            *self = Scanner::default();
        }
    }

    /// The kind of the frame that has begun and not ended; of its header at least all bytes are there.
    pub fn unfinished(&self) -> Option<u8> {
        (self.header_size == HEADER_SIZE).then_some(self.header[3])
    }

    fn size(&self) -> usize {
        let [high, middle, low, ..] = self.header;
        usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low)
    }

    fn frame(&self) -> Frame {
        Frame {
            kind: self.header[3],
            flags: self.header[4],
            size: self.size(),
            start: self.start,
        }
    }
}

/// More frames than a peer has a use for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flood {
    /// Frames that carry nothing of a request.
    Control,
    /// Streams that are opened to be given up.
    Resets,
}

/// A token bucket. What is in it is counted in frames times the milliseconds of the window, so that every
/// millisecond brings a whole number.
#[derive(Debug, Clone)]
struct Bucket {
    level: u64,
    level_max: u64,
    frame_count_max: u64,
}

const WINDOW_MILLIS: u64 = HTTP2_METER_WINDOW.as_millis() as u64;

impl Bucket {
    fn new(frame_count_max: u64) -> Self {
        let level_max = frame_count_max * WINDOW_MILLIS;
        Bucket {
            level: level_max,
            level_max,
            frame_count_max,
        }
    }

    fn add(&mut self, more: u64) {
        self.level = self.level.saturating_add(more).min(self.level_max);
    }

    fn refill(&mut self, millis: u64) {
        self.add(millis.saturating_mul(self.frame_count_max));
    }

    fn take(&mut self) -> bool {
        match self.level.checked_sub(WINDOW_MILLIS) {
            Some(level) => {
                self.level = level;
                true
            }
            None => false,
        }
    }
}

/// Watches what a peer sends.
#[derive(Debug, Clone)]
pub struct FrameMeter {
    scanner: Scanner,
    control: Bucket,
    resets: Bucket,
    /// Milliseconds; the time of the last look.
    now: u64,
    /// A HEADERS frame has passed, and none yet that ends its header block.
    in_header_block: bool,
    header_blocks_ended: u64,
}

impl FrameMeter {
    /// For a peer whose preface has passed; `now` in milliseconds.
    pub fn new(now: u64) -> Self {
        FrameMeter {
            scanner: Scanner::default(),
            control: Bucket::new(HTTP2_CONTROL_FRAME_COUNT_MAX),
            resets: Bucket::new(HTTP2_RESET_COUNT_MAX),
            now,
            in_header_block: false,
            header_blocks_ended: 0,
        }
    }

    /// Takes the next bytes.
    pub fn received(&mut self, bytes: &[u8], now: u64) -> Result<(), Flood> {
        let passed = now.saturating_sub(self.now);
        self.now = now;
        self.control.refill(passed);
        self.resets.refill(passed);
        let mut flood = Ok(());
        let FrameMeter {
            scanner,
            control,
            resets,
            in_header_block,
            header_blocks_ended,
            ..
        } = self;
        scanner.scan(bytes, |frame| {
            let ends_headers = frame.flags & END_HEADERS != 0;
            if matches!(frame.kind, HEADERS | CONTINUATION) {
                *in_header_block = !ends_headers;
                *header_blocks_ended += u64::from(ends_headers);
            }
            let carries = match frame.kind {
                DATA => frame.size > 0 || frame.flags & END_STREAM != 0,
                // A request has a use for some of the others: its window, its priority.
                HEADERS if ends_headers => {
                    control.add(HTTP2_CONTROL_FRAMES_PER_REQUEST * WINDOW_MILLIS);
                    true
                }
                HEADERS | CONTINUATION => frame.size > 0,
                RST_STREAM => {
                    if !resets.take() {
                        flood = Err(Flood::Resets);
                    }
                    true
                }
                _ => false,
            };
            if !carries && !control.take() {
                flood = Err(Flood::Control);
            }
        });
        flood
    }

    /// Header blocks that have ended, and whether one has begun since.
    pub fn header_blocks(&self) -> (u64, bool) {
        let begun = self.in_header_block
            || matches!(self.scanner.unfinished(), Some(HEADERS | CONTINUATION));
        (self.header_blocks_ended, begun)
    }
}

/// Error codes, in their order (RFC 9113 §7), and one for all others.
pub const ERROR_CODES: [&str; 15] = [
    "no_error",
    "protocol_error",
    "internal_error",
    "flow_control_error",
    "settings_timeout",
    "stream_closed",
    "frame_size_error",
    "refused_stream",
    "cancel",
    "compression_error",
    "connect_error",
    "enhance_your_calm",
    "inadequate_security",
    "http_1_1_required",
    "other",
];

/// The index of a GOAWAY's error code in [`ERROR_CODES`]; `None` for another frame.
pub fn go_away(frame: &Frame) -> Option<usize> {
    let [.., a, b, c, d] = frame.start;
    let code = u32::from_be_bytes([a, b, c, d]) as usize;
    (frame.kind == GOAWAY).then_some(code.min(ERROR_CODES.len() - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let size = payload.len() as u32;
        let mut bytes = size.to_be_bytes()[1..].to_vec();
        bytes.extend_from_slice(&[kind, flags, 0, 0, 0, 1]);
        bytes.extend_from_slice(payload);
        bytes
    }

    fn scanned(bytes: &[u8], cuts: impl Iterator<Item = usize>) -> Vec<Frame> {
        let (mut scanner, mut frames, mut begin) = (Scanner::default(), Vec::new(), 0);
        for end in cuts.chain([bytes.len()]) {
            scanner.scan(&bytes[begin..end], |frame| frames.push(*frame));
            begin = end;
        }
        frames
    }

    #[test]
    fn frames_are_found_wherever_the_bytes_are_cut() {
        let mut bytes = frame(SETTINGS, 0, b"");
        bytes.extend(frame(HEADERS, END_HEADERS, b"123"));
        bytes.extend(frame(DATA, 0, &[7; 300]));
        bytes.extend(frame(GOAWAY, 0, &[0, 0, 0, 9, 0, 0, 0, 11, b'x']));
        bytes.extend(frame(200, 0xff, b"12345678"));
        let whole = scanned(&bytes, [].into_iter());
        let kinds: Vec<_> = whole.iter().map(|frame| (frame.kind, frame.size)).collect();
        assert_eq!(
            kinds,
            [
                (SETTINGS, 0),
                (HEADERS, 3),
                (DATA, 300),
                (GOAWAY, 9),
                (200, 8)
            ]
        );
        assert_eq!(whole[1].start, *b"123\0\0\0\0\0");
        assert_eq!(go_away(&whole[3]), Some(11));
        assert_eq!(ERROR_CODES[11], "enhance_your_calm");
        assert_eq!(go_away(&whole[0]), None);
        assert_eq!(scanned(&bytes, 1..bytes.len()), whole);
        for cut in 0..bytes.len() {
            assert_eq!(scanned(&bytes, [cut].into_iter()), whole, "{cut}");
        }
    }

    /// How many of `bytes` may follow each other at once.
    fn count_allowed(meter: &mut FrameMeter, bytes: &[u8], now: u64) -> (u64, Option<Flood>) {
        for count in 0..5_000 {
            if let Err(flood) = meter.received(bytes, now) {
                return (count, Some(flood));
            }
        }
        (5_000, None)
    }

    #[test]
    fn frames_that_carry_nothing_are_rationed_and_time_brings_more() {
        for (kind, flags, payload) in [
            (SETTINGS, 0, &b""[..]),
            (6, 0, b"12345678"),
            (8, 0, b"1234"),
            (2, 0, b"12345"),
            (0x42, 0, b"what"),
            (DATA, 0, b""),
            (CONTINUATION, 0, b""),
            (HEADERS, 0, b""),
        ] {
            let bytes = frame(kind, flags, payload);
            let mut meter = FrameMeter::new(5);
            let flood = Some(Flood::Control);
            assert_eq!(
                count_allowed(&mut meter, &bytes, 5),
                (1_000, flood),
                "{kind}"
            );
            assert_eq!(count_allowed(&mut meter, &bytes, 1_005), (100, flood));
            assert_eq!(count_allowed(&mut meter, &bytes, u64::MAX), (1_000, flood));
        }
    }

    #[test]
    fn resets_have_a_ration_of_their_own() {
        let mut meter = FrameMeter::new(0);
        let bytes = frame(RST_STREAM, 0, b"1234");
        let flood = Some(Flood::Resets);
        assert_eq!(count_allowed(&mut meter, &bytes, 0), (200, flood));
        assert_eq!(meter.received(&frame(SETTINGS, 0, b""), 0), Ok(()));
        assert_eq!(count_allowed(&mut meter, &bytes, 100), (2, flood));
    }

    #[test]
    fn requests_and_bodies_cost_nothing_and_pay_for_their_windows() {
        let mut meter = FrameMeter::new(0);
        let mut request = frame(HEADERS, END_HEADERS, b"head");
        request.extend(frame(DATA, 0, b"body"));
        request.extend(frame(DATA, END_STREAM, b""));
        for _ in 0..HTTP2_CONTROL_FRAMES_PER_REQUEST {
            request.extend(frame(8, 0, b"1234"));
        }
        assert_eq!(count_allowed(&mut meter, &request, 0), (5_000, None));
    }

    #[test]
    fn a_header_block_lasts_from_its_first_frame_to_its_last() {
        let mut meter = FrameMeter::new(0);
        let mut bytes = frame(HEADERS, 0, b"12");
        bytes.extend(frame(CONTINUATION, END_HEADERS, b"3"));
        for (at, byte) in bytes.iter().enumerate() {
            meter.received(&[*byte], 0).unwrap();
            let ended = at + 1 == bytes.len();
            assert_eq!(
                meter.header_blocks(),
                (u64::from(ended), at + 1 >= HEADER_SIZE && !ended),
                "{at}"
            );
        }
    }
}
