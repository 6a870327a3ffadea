//! Counters and gauges of one core, written by its reactor and read by the admin server.
//!
//! Before it: every step of the flow counts what it did.
//! After it: [`crate::admin`] renders a snapshot as Prometheus text; `demo` shows the difference of two.
//! Thread: one writer (the reactor), any number of readers. Allocates: once, at start.
//! Invariant: a snapshot is of one moment, so `received = accepted + rejected + refused + aborted` holds in every one.
//! Not here: what the uplink counts ([`crate::uplink::UplinkMetrics`]).
//!
//! The writer never waits: it makes the version odd, stores, and makes it even again; a reader that saw an odd or a
//! changed version reads again (a sequence lock of one writer).

use std::sync::atomic::{AtomicU64, Ordering, fence};

use crate::error::{Refusal, Reject};
use crate::http::frames::ERROR_CODES;
use crate::limits::SLAB_CLASS_COUNT_MAX;

/// What a core counts. The order is that of the values in a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Count {
    /// Requests that have an outcome.
    Received,
    /// The promise of the route was kept for every record of the request.
    Accepted,
    /// The peer's fault: a 4xx or 501 was answered.
    Rejected,
    /// Not the peer's fault: 503 was answered.
    Refused,
    /// The stream ended within the request.
    Aborted,
    /// Records of accepted requests; each became one row.
    Records,
    /// Records that became rows, of requests that were refused then.
    RecordsUnacknowledged,
    /// Rows put into upload buffers.
    RowsAppended,
    /// Rows whose commit returned. A row that moves to another segment is counted where it is.
    RowsDurable,
    /// Bytes read from sockets.
    BytesReceived,
    /// Bytes of rows before compression.
    RowBytes,
    /// Upload buffers sealed.
    BatchesSealed,
    /// Bytes of sealed upload buffers: compressed.
    BatchBytes,
    Commits,
    /// Bytes of the frames of commits.
    CommitBytes,
    /// Time from the start of a commit to the return of its sync, all commits together.
    CommitMicroseconds,
    CommitFailures,
    /// Connections accepted since start.
    Connections,
    /// Connections turned away, as their address has too many.
    ConnectionsRefused,
    /// Connections cut because the peer took too long, idle ones too.
    DeadlinesPassed,
    /// TLS handshakes that were completed.
    TlsHandshakes,
    /// TLS connections that ended with an error, in the handshake or after.
    TlsFailures,
    /// Times that a listener failed to accept.
    AcceptErrors,
    /// Connections that spoke HTTP/2.
    Http2Connections,
    /// Of those, turned away as there were too many.
    Http2ConnectionsRefused,
    // Gauges from here on.
    ConnectionsOpen,
    Http2ConnectionsOpen,
    Http2StreamsOpen,
    UploadBuffersFree,
    UploadBuffersOpen,
    UploadBuffersSealed,
    UploadBuffersInUplink,
    /// Seconds since start at which the reactor last ticked.
    HeartbeatSeconds,
    /// 1 where nothing more can become durable on this core.
    StorageFailed,
    /// 1 where the slabs are registered with the ring.
    SlabsRegistered,
    /// The first of three gauges per slab class.
    Slabs,
}

const REFUSALS_BEGIN: usize = Count::Slabs as usize + 3 * SLAB_CLASS_COUNT_MAX;
const REJECTS_BEGIN: usize = REFUSALS_BEGIN + Refusal::ALL.len();
const GO_AWAYS_BEGIN: usize = REJECTS_BEGIN + Reject::CODES.len();
const VALUE_COUNT: usize = GO_AWAYS_BEGIN + ERROR_CODES.len();

/// One core's values.
pub struct CoreMetrics {
    version: AtomicU64,
    values: [AtomicU64; VALUE_COUNT],
}

/// The values of one core at one moment, or the sum of several cores'.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    values: [u64; VALUE_COUNT],
}

/// Changes to be seen together; made by [`CoreMetrics::update`].
pub struct Update<'a> {
    values: &'a [AtomicU64; VALUE_COUNT],
}

impl CoreMetrics {
    pub fn new() -> Self {
        CoreMetrics {
            version: AtomicU64::new(0),
            values: [const { AtomicU64::new(0) }; VALUE_COUNT],
        }
    }

    /// Makes several changes at one moment. Only the reactor that owns these metrics may call it.
    pub fn update(&self, change: impl FnOnce(&Update)) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        change(&Update {
            values: &self.values,
        });
        self.version.store(version + 2, Ordering::Release);
    }

    /// Reads all values of one moment.
    pub fn snapshot(&self) -> Snapshot {
        // The writer holds the version odd for some tens of instructions; the bound is for a writer that died there.
        for _ in 0..1_000_000 {
            let before = self.version.load(Ordering::Acquire);
            let values = std::array::from_fn(|index| self.values[index].load(Ordering::Relaxed));
            fence(Ordering::Acquire);
            if before.is_multiple_of(2) && before == self.version.load(Ordering::Relaxed) {
                return Snapshot { values };
            }
            std::hint::spin_loop();
        }
        panic!("a reactor died while it counted");
    }
}

impl Default for CoreMetrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Update<'_> {
    pub fn add(&self, count: Count, more: u64) {
        self.add_at(count as usize, more);
    }

    pub fn sub(&self, count: Count, less: u64) {
        let value = &self.values[count as usize];
        value.store(value.load(Ordering::Relaxed) - less, Ordering::Relaxed);
    }

    pub fn set(&self, count: Count, value: u64) {
        self.values[count as usize].store(value, Ordering::Relaxed);
    }

    pub fn set_slabs(&self, class_index: usize, counts: crate::slab::SlabCounts) {
        let begin = Count::Slabs as usize + 3 * class_index;
        let counts = [counts.free, counts.parsing, counts.in_kernel];
        for (value, count) in self.values[begin..begin + 3].iter().zip(counts) {
            value.store(count as u64, Ordering::Relaxed);
        }
    }

    /// Counts a refusal under its code.
    pub fn add_refusal(&self, refusal: Refusal) {
        self.add_at(REFUSALS_BEGIN + refusal as usize, 1);
    }

    /// Counts a reject under its code.
    pub fn add_reject(&self, reject: &Reject) {
        self.add_at(REJECTS_BEGIN + reject.code_index(), 1);
    }

    /// Counts a GOAWAY under the index of its error code.
    pub fn add_go_away(&self, code_index: usize) {
        self.add_at(GO_AWAYS_BEGIN + code_index, 1);
    }

    // One writer: a load and a store, no locked instruction.
    fn add_at(&self, index: usize, more: u64) {
        let value = &self.values[index];
        value.store(value.load(Ordering::Relaxed) + more, Ordering::Relaxed);
    }
}

impl Snapshot {
    pub fn zero() -> Self {
        Snapshot {
            values: [0; VALUE_COUNT],
        }
    }

    pub fn value(&self, count: Count) -> u64 {
        self.values[count as usize]
    }

    /// Free, parsing, in the kernel.
    pub fn slabs(&self, class_index: usize) -> [u64; 3] {
        let begin = Count::Slabs as usize + 3 * class_index;
        std::array::from_fn(|index| self.values[begin + index])
    }

    /// Refusals by code.
    pub fn refusals(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Refusal::ALL
            .into_iter()
            .map(|refusal| refusal.answer().code)
            .zip(self.values[REFUSALS_BEGIN..].iter().copied())
    }

    /// Rejects by code.
    pub fn rejects(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Reject::CODES
            .into_iter()
            .zip(self.values[REJECTS_BEGIN..].iter().copied())
    }

    /// GOAWAY frames by error code.
    pub fn go_aways(&self) -> impl Iterator<Item = (&'static str, u64)> {
        ERROR_CODES
            .into_iter()
            .zip(self.values[GO_AWAYS_BEGIN..].iter().copied())
    }

    /// Adds another core's values to these.
    pub fn merge(&mut self, other: &Snapshot) {
        for (value, more) in self.values.iter_mut().zip(other.values) {
            *value += more;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use super::*;

    #[test]
    fn every_snapshot_is_of_one_moment() {
        let metrics = Arc::new(CoreMetrics::new());
        let done = Arc::new(AtomicBool::new(false));
        let reader = {
            let (metrics, done) = (metrics.clone(), done.clone());
            std::thread::spawn(move || {
                let mut snapshots = 0_u64;
                while !done.load(Ordering::Acquire) || snapshots == 0 {
                    let snapshot = metrics.snapshot();
                    assert_eq!(
                        snapshot.value(Count::Received),
                        snapshot.value(Count::Accepted) + snapshot.value(Count::Aborted)
                    );
                    snapshots += 1;
                }
            })
        };
        for round in 0..200_000 {
            metrics.update(|update| {
                update.add(Count::Received, 1);
                update.add(
                    if round % 3 == 0 {
                        Count::Aborted
                    } else {
                        Count::Accepted
                    },
                    1,
                );
            });
        }
        done.store(true, Ordering::Release);
        reader.join().unwrap();
        assert_eq!(metrics.snapshot().value(Count::Received), 200_000);
    }

    #[test]
    fn rejects_are_counted_under_their_code() {
        let metrics = CoreMetrics::new();
        metrics.update(|update| update.add_reject(&Reject::Method { head: false }));
        let snapshot = metrics.snapshot();
        let counted: Vec<_> = snapshot.rejects().filter(|(_, count)| *count > 0).collect();
        assert_eq!(counted, [("method_not_allowed", 1)]);
    }
}
