//! The core's clock: the two texts a request needs, made at most once per millisecond and per second.
//!
//! Before it: the operating system's clock.
//! After it: [`crate::envelope`] takes the timestamp, [`crate::http::reply`] the date.
//! Thread: one reactor. Allocates: never.
//! Invariant: wall time is only ever shown; every deadline in weir is monotonic (`std::time::Instant`).

use std::cell::Cell;

use jiff::Timestamp;
use jiff::fmt::{StdFmtWrite, rfc2822, temporal};

/// `2026-11-23T09:15:02.123Z`.
pub type Rfc3339Millis = [u8; 24];

/// `Mon, 23 Nov 2026 09:15:02 GMT` (RFC 9110 §5.6.7).
pub type HttpDate = [u8; 29];

const RFC3339: temporal::DateTimePrinter = temporal::DateTimePrinter::new().precision(Some(3));
const HTTP_DATE: rfc2822::DateTimePrinter = rfc2822::DateTimePrinter::new();

/// The texts of the present.
pub struct Clock {
    millisecond: Cell<i64>,
    second: Cell<i64>,
    timestamp: Cell<Rfc3339Millis>,
    date: Cell<HttpDate>,
}

impl Clock {
    pub fn new() -> Self {
        Clock {
            millisecond: Cell::new(i64::MIN),
            second: Cell::new(i64::MIN),
            timestamp: Cell::new([0; 24]),
            date: Cell::new([0; 29]),
        }
    }

    /// The time as an envelope shows it: UTC, to the millisecond.
    pub fn timestamp(&self) -> Rfc3339Millis {
        let now = Timestamp::now();
        if self.millisecond.replace(now.as_millisecond()) != now.as_millisecond() {
            self.timestamp.set(fixed(|text| {
                RFC3339.print_timestamp(&now, StdFmtWrite(text)).is_ok()
            }));
        }
        self.timestamp.get()
    }

    /// The time as a `Date` field shows it.
    pub fn date(&self) -> HttpDate {
        let now = Timestamp::now();
        if self.second.replace(now.as_second()) != now.as_second() {
            self.date.set(fixed(|text| {
                HTTP_DATE
                    .print_timestamp_rfc9110(&now, StdFmtWrite(text))
                    .is_ok()
            }));
        }
        self.date.get()
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

/// Text of exactly `N` bytes.
fn fixed<const N: usize>(print: impl FnOnce(&mut FixedText<N>) -> bool) -> [u8; N] {
    let mut text = FixedText {
        bytes: [b' '; N],
        size: 0,
    };
    let printed = print(&mut text);
    assert!(printed && text.size == N, "a year beyond 9999");
    text.bytes
}

struct FixedText<const N: usize> {
    bytes: [u8; N],
    size: usize,
}

impl<const N: usize> std::fmt::Write for FixedText<N> {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let end = self.size + text.len();
        self.bytes
            .get_mut(self.size..end)
            .ok_or(std::fmt::Error)?
            .copy_from_slice(text.as_bytes());
        self.size = end;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_texts_read_back_as_now() {
        let clock = Clock::new();
        let before = Timestamp::now();
        let timestamp: Timestamp = std::str::from_utf8(&clock.timestamp())
            .unwrap()
            .parse()
            .unwrap();
        let date = clock.date();
        let date = jiff::fmt::rfc2822::parse(std::str::from_utf8(&date).unwrap()).unwrap();
        let after = Timestamp::now();
        assert!(timestamp.as_millisecond() >= before.as_millisecond() && timestamp <= after);
        assert!(date.timestamp().as_second() >= before.as_second() && date.timestamp() <= after);
    }
}
