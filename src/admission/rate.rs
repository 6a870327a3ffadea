//! Rates: how many requests and bytes may come in a second, over all cores.
//!
//! Before it: a request whose principal and size are known.
//! After it: it is taken, or told when to come again.
//! Thread: any; one atomic for each rate. Allocates: never.
//! Invariant: over any time `t` at most `burst + t` seconds' worth is admitted, but for the last request: it may be
//! larger than what was left, and the next ones wait until that is made good. Cores that decide at the very same
//! moment may each admit one.
//! Not here: whose rates count for a request.
//!
//! A token bucket kept as the time at which it is full again, its theoretical arrival time (GCRA): no refilling, and
//! nothing but that one number.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::config::Rate;

const SECOND: u64 = 1_000_000_000;

/// What one route or principal may send; nothing where it may send all it can.
pub struct Limiter {
    requests: Option<Bucket>,
    bytes: Option<Bucket>,
}

struct Bucket {
    /// Nanoseconds since start.
    full_at: AtomicU64,
    per_second: u64,
    /// Nanoseconds' worth of what fits.
    burst: u64,
}

impl Limiter {
    pub fn new(rate: Option<Rate>) -> Self {
        let bucket = |per_second: Option<u64>| {
            let rate = rate?;
            Some(Bucket {
                full_at: AtomicU64::new(0),
                per_second: per_second?,
                burst: nanos(rate.burst),
            })
        };
        Limiter {
            requests: bucket(rate.and_then(|rate| rate.requests)),
            bytes: bucket(rate.and_then(|rate| rate.bytes)),
        }
    }

    pub fn is_unlimited(&self) -> bool {
        self.requests.is_none() && self.bytes.is_none()
    }

    /// How long a request with a body of `size` bytes has to wait at `now`; nothing where it can be taken.
    pub fn wait(&self, now: Duration, size: u64) -> Duration {
        let wait = |bucket: &Option<Bucket>, count| {
            bucket
                .as_ref()
                .map_or(0, |bucket| bucket.wait(nanos(now), count))
        };
        Duration::from_nanos(wait(&self.requests, 1).max(wait(&self.bytes, size)))
    }

    pub fn add_request(&self, now: Duration) {
        if let Some(bucket) = &self.requests {
            bucket.add(nanos(now), 1);
        }
    }

    pub fn add_size(&self, now: Duration, size: u64) {
        if let Some(bucket) = &self.bytes {
            bucket.add(nanos(now), size);
        }
    }
}

impl Bucket {
    /// Nanoseconds' worth of `count`, rounded up.
    fn worth(&self, count: u64) -> u64 {
        let worth = (u128::from(count) * u128::from(SECOND)).div_ceil(self.per_second.into());
        u64::try_from(worth).unwrap_or(u64::MAX)
    }

    fn wait(&self, now: u64, count: u64) -> u64 {
        let worth = self.worth(count);
        let used = self.full_at.load(Ordering::Relaxed).saturating_sub(now);
        // What is larger than the bucket is taken when that is full.
        let room = self.burst.max(worth);
        // A size that is not known yet still needs something left.
        (used.saturating_add(worth.max(1))).saturating_sub(room.max(1))
    }

    fn add(&self, now: u64, count: u64) {
        let worth = self.worth(count);
        let add = |full_at: u64| Some(full_at.max(now).saturating_add(worth));
        let added = self
            .full_at
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
        debug_assert!(added.is_ok(), "it always has a next value");
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limiter(requests: Option<u64>, bytes: Option<u64>, burst_ms: u64) -> Limiter {
        Limiter::new(Some(Rate {
            requests,
            bytes,
            burst: Duration::from_millis(burst_ms),
        }))
    }

    /// Offers a request of `size` bytes every `every`; how many are taken until `end`.
    fn taken(limiter: &Limiter, size: u64, every: Duration, end: Duration) -> u64 {
        let mut now = Duration::ZERO;
        let mut taken = 0;
        while now < end {
            if limiter.wait(now, size).is_zero() {
                limiter.add_request(now);
                limiter.add_size(now, size);
                taken += 1;
            }
            now += every;
        }
        taken
    }

    #[test]
    fn a_rate_is_kept_after_its_burst() {
        let millisecond = Duration::from_millis(1);
        let ten = Duration::from_secs(10);
        // A second's worth at once, then as many as a second brings.
        assert_eq!(
            taken(&limiter(Some(10), None, 1000), 5, millisecond, ten),
            109
        );
        assert_eq!(
            taken(&limiter(None, Some(50), 1000), 5, millisecond, ten),
            109
        );
        // The burst is less than one: one at a time.
        assert_eq!(taken(&limiter(Some(10), None, 1), 5, millisecond, ten), 100);
        // Below the rate nothing waits.
        assert_eq!(
            taken(
                &limiter(Some(10), Some(50), 100),
                5,
                Duration::from_millis(100),
                ten
            ),
            100
        );
        // The tighter of the two counts.
        assert_eq!(
            taken(
                &limiter(Some(1_000_000), Some(50), 1000),
                5,
                millisecond,
                ten
            ),
            109
        );
        assert_eq!(
            taken(&Limiter::new(None), 5, Duration::from_secs(1), ten),
            10
        );
    }

    #[test]
    fn what_is_larger_than_the_bucket_is_taken_and_made_good() {
        let limiter = limiter(None, Some(100), 1000);
        assert_eq!(limiter.wait(Duration::ZERO, 1_000), Duration::ZERO);
        limiter.add_size(Duration::ZERO, 1_000);
        assert_eq!(
            limiter.wait(Duration::ZERO, 1),
            Duration::from_millis(9_010)
        );
        // A chunked body, whose size nobody knows.
        assert!(!limiter.wait(Duration::from_secs(8), 0).is_zero());
        assert!(limiter.wait(Duration::from_secs(10), 0).is_zero());
        assert!(limiter.wait(Duration::from_secs(10), 1_000).is_zero());
    }
}
