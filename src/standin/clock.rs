//! The stand-in's only clock: the machine's, and as far ahead of it as a test has moved it.
//!
//! Before it: the operating system's clock. After it: every expiry (tokens, SAS, messages) and every age of a batch.
//! Thread: any. Allocates: never.
//! Invariant: it never goes back, except where the operating system's does.
//! Not here: the real pauses of [`super::Action::Delay`] and of polling an external queue.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use jiff::Timestamp;

/// Wall time that a test can move on without waiting.
#[derive(Debug, Default)]
pub(super) struct Clock {
    ahead_ms: AtomicI64,
}

impl Clock {
    pub fn now(&self) -> Timestamp {
        let now = Timestamp::now().as_millisecond() + self.ahead_ms.load(Ordering::Relaxed);
        Timestamp::from_millisecond(now).unwrap_or(Timestamp::MAX)
    }

    pub fn advance(&self, by: Duration) {
        let by = i64::try_from(by.as_millis()).unwrap_or(i64::MAX / 4);
        self.ahead_ms.fetch_add(by, Ordering::Relaxed);
    }
}

/// `time` and a duration later, as far as the calendar goes.
pub(super) fn later(time: Timestamp, by: Duration) -> Timestamp {
    time.saturating_add(jiff::SignedDuration::try_from(by).unwrap_or(jiff::SignedDuration::MAX))
        .unwrap_or(Timestamp::MAX)
}

/// `2026-11-23T09:15:02Z`, the form of SAS times.
pub(super) fn seconds_text(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// `2026-11-23T09:15:02.1230000Z`, the form of Kusto's `datetime`.
pub(super) fn ticks_text(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%S.%3f0000Z").to_string()
}

/// `Mon, 23 Nov 2026 09:15:02 GMT` (RFC 9110 §5.6.7), the form of storage headers and queue times.
pub(super) fn http_text(time: Timestamp) -> String {
    time.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moves_on_when_told() {
        let clock = Clock::default();
        let before = clock.now();
        clock.advance(Duration::from_secs(3600));
        assert!(clock.now() >= later(before, Duration::from_secs(3600)));
    }

    #[test]
    fn texts_have_their_forms() {
        let time: Timestamp = "2026-11-23T09:15:02.123Z".parse().unwrap();
        assert_eq!(seconds_text(time), "2026-11-23T09:15:02Z");
        assert_eq!(ticks_text(time), "2026-11-23T09:15:02.1230000Z");
        assert_eq!(http_text(time), "Mon, 23 Nov 2026 09:15:02 GMT");
    }
}
