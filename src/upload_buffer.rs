//! Upload buffers: fixed memory in which a blob comes to be, and the pool of them that a core owns.
//!
//! Before it: [`crate::encoder`] appends rows for a table.
//! After it: a sealed buffer crosses to [`crate::uplink`] as a [`Batch`] and comes back empty.
//! Thread: one reactor; a batch moves to the uplink and back.
//! Allocates: at start only: memory and deflate states.
//! Invariant: `free + open + in_uplink == buffer_count`, at most one open buffer per table, and a row is only
//! appended where the worst that deflate can make of it has room.
//! Not here: what a row is, and where a batch goes.

use std::cell::RefCell;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::deflate::{ClosedMember, GzipMember};
use crate::limits::upload_buffer_size_min;
use crate::memory::Region;
use crate::metrics::{CoreMetrics, Count};
use crate::uplink::Handover;
use crate::wait::WaitQueue;

/// Memory for one blob, with the deflate state that fills it.
pub struct UploadBuffer {
    memory: Region,
    member: GzipMember,
}

/// A sealed upload buffer: one complete gzip member of rows for one table.
pub struct Batch {
    buffer: UploadBuffer,
    pub core_index: usize,
    pub table_index: usize,
    /// Counts the batches of this core since start, from 0.
    pub sequence: u64,
    pub row_count: u64,
    pub member: ClosedMember,
}

impl Batch {
    /// The blob: a complete `.gz` file.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer.memory[..self.member.size]
    }

    /// Gives the memory up for reuse.
    pub fn into_buffer(self) -> UploadBuffer {
        self.buffer
    }
}

struct Open {
    buffer: UploadBuffer,
    sequence: u64,
    row_count: u64,
    /// When the first row came; a buffer without rows has no age.
    first_row_at: Option<Instant>,
}

struct Pool {
    free: Vec<UploadBuffer>,
    /// By table.
    open: Vec<Option<Open>>,
    in_uplink_count: usize,
    sequence_next: u64,
}

/// How many upload buffers are where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UploadBufferCounts {
    pub free: usize,
    pub open: usize,
    pub in_uplink: usize,
}

/// The upload buffers of one core.
pub struct UploadBuffers {
    core_index: usize,
    buffer_count: usize,
    buffer_size: usize,
    pool: RefCell<Pool>,
    queue: WaitQueue,
    handover: Arc<Handover>,
    metrics: Arc<CoreMetrics>,
}

impl UploadBuffers {
    /// Maps `buffer_count` buffers of `buffer_size` bytes, and as many deflate states.
    pub fn map(
        core_index: usize,
        config: &crate::config::Config,
        handover: Arc<Handover>,
        metrics: Arc<CoreMetrics>,
    ) -> io::Result<Self> {
        let buffer_count = config.upload.buffer_count;
        let buffer_size = config.upload.buffer_size;
        assert!(
            buffer_size >= upload_buffer_size_min(config.limits.record),
            "every record fits an empty upload buffer"
        );
        let mut free = Vec::with_capacity(buffer_count);
        for _ in 0..buffer_count {
            free.push(UploadBuffer {
                memory: Region::map(buffer_size)?,
                member: GzipMember::new(config.compression.level),
            });
        }
        Ok(UploadBuffers {
            core_index,
            buffer_count,
            buffer_size,
            pool: RefCell::new(Pool {
                free,
                open: config.tables.iter().map(|_| None).collect(),
                in_uplink_count: 0,
                sequence_next: 0,
            }),
            // One request encodes at a time, so at most one waits here.
            queue: WaitQueue::new(1),
            handover,
            metrics,
        })
    }

    pub fn counts(&self) -> UploadBufferCounts {
        let pool = self.pool.borrow();
        let open = pool.open.iter().flatten().count();
        assert_eq!(
            pool.free.len() + open + pool.in_uplink_count,
            self.buffer_count,
            "upload buffers are neither made nor lost"
        );
        UploadBufferCounts {
            free: pool.free.len(),
            open,
            in_uplink: pool.in_uplink_count,
        }
    }

    /// Makes sure that the table has an open buffer where `raw_size` more bytes fit, sealing a full one on the way.
    /// `false` where `deadline` passes before a buffer comes free.
    pub async fn reserve(
        &self,
        table_index: usize,
        raw_size: usize,
        deadline: Option<Instant>,
    ) -> bool {
        self.queue
            .until(deadline, || {
                self.try_reserve(table_index, raw_size).then_some(())
            })
            .await
            .is_some()
    }

    /// [`UploadBuffers::reserve`] without waiting.
    pub fn try_reserve(&self, table_index: usize, raw_size: usize) -> bool {
        let mut pool = self.pool.borrow_mut();
        if let Some(open) = &mut pool.open[table_index] {
            if open.buffer.member.fits(&mut open.buffer.memory, raw_size) {
                return true;
            }
            assert!(
                open.row_count > 0,
                "{raw_size} bytes of rows fit no upload buffer"
            );
            self.seal(&mut pool, table_index);
        }
        if pool.free.is_empty() && pool.in_uplink_count == 0 {
            // More tables than buffers: the oldest open one makes room.
            let oldest = (0..pool.open.len())
                .filter(|index| pool.open[*index].is_some())
                .min_by_key(|index| pool.open[*index].as_ref().map(|open| open.sequence));
            if let Some(oldest) = oldest {
                self.seal(&mut pool, oldest);
            }
        }
        let Some(mut buffer) = pool.free.pop() else {
            return false;
        };
        buffer.member.open(&mut buffer.memory);
        assert!(
            buffer.member.fits(&mut buffer.memory, raw_size),
            "{raw_size} bytes of rows do not fit {} bytes",
            self.buffer_size
        );
        let sequence = pool.sequence_next;
        pool.sequence_next += 1;
        pool.open[table_index] = Some(Open {
            buffer,
            sequence,
            row_count: 0,
            first_row_at: None,
        });
        true
    }

    /// Appends `row_count` whole rows that were reserved for.
    pub fn append(&self, table_index: usize, rows: &[u8], row_count: u64) {
        let mut pool = self.pool.borrow_mut();
        let open = pool.open[table_index].as_mut().expect("reserved before");
        open.buffer.member.append(&mut open.buffer.memory, rows);
        open.row_count += row_count;
        if open.first_row_at.is_none() {
            open.first_row_at = Some(Instant::now());
        }
    }

    /// Seals every open buffer whose first row is at least `age` old.
    pub fn seal_older_than(&self, age: Duration) {
        let mut pool = self.pool.borrow_mut();
        for table_index in 0..pool.open.len() {
            let first_row_at = pool.open[table_index]
                .as_ref()
                .and_then(|open| open.first_row_at);
            if first_row_at.is_some_and(|at| at.elapsed() >= age) {
                self.seal(&mut pool, table_index);
            }
        }
    }

    /// Takes a buffer back from the uplink.
    pub fn give_back(&self, buffer: UploadBuffer) {
        let mut pool = self.pool.borrow_mut();
        assert!(
            pool.in_uplink_count > 0,
            "a buffer came back that was not away"
        );
        pool.in_uplink_count -= 1;
        pool.free.push(buffer);
        drop(pool);
        self.queue.wake_one();
    }

    /// Completes when the uplink has none; to be called when nobody encodes any more.
    pub async fn all_returned(&self) {
        let returned = || (self.pool.borrow().in_uplink_count == 0).then_some(());
        let _ = self.queue.until(None, returned).await;
    }

    fn seal(&self, pool: &mut Pool, table_index: usize) {
        let Some(mut open) = pool.open[table_index].take() else {
            return;
        };
        if open.row_count == 0 {
            pool.free.push(open.buffer);
            return;
        }
        let member = open.buffer.member.close(&mut open.buffer.memory);
        self.metrics.update(|update| {
            update.add(Count::BatchesSealed, 1);
            update.add(Count::BatchBytes, member.size as u64);
        });
        pool.in_uplink_count += 1;
        self.handover.send(Batch {
            buffer: open.buffer,
            core_index: self.core_index,
            table_index,
            sequence: open.sequence,
            row_count: open.row_count,
            member,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn buffers(text: &str) -> (UploadBuffers, Arc<Handover>) {
        let config = Config::parse(text, "test.toml".as_ref(), ".".as_ref()).unwrap();
        let handover = Arc::new(Handover::new(config.upload.buffer_count));
        let metrics = Arc::new(CoreMetrics::new());
        let buffers = UploadBuffers::map(0, &config, handover.clone(), metrics).unwrap();
        (buffers, handover)
    }

    const TWO_TABLES: &str = r#"
        [upload]
        buffer_count = 2
        buffer_size = "64KiB"
        [limits]
        record = "16KiB"
        [[route]]
        path = "/a"
        table = "A"
        [[route]]
        path = "/b"
        table = "B"
        [[route]]
        path = "/c"
        table = "C"
    "#;

    #[test]
    fn a_full_buffer_is_sealed_and_the_pool_never_grows() {
        let (buffers, handover) = buffers(TWO_TABLES);
        let row = [b'x'; 1_000];
        let mut row_count = 0_u64;
        while buffers.try_reserve(0, row.len()) {
            buffers.append(0, &row, 1);
            row_count += 1;
            assert!(row_count < 1_000_000);
            if handover.sealed_count() == 2 {
                break;
            }
        }
        assert!(!buffers.try_reserve(0, row.len()));
        let batches = [handover.receive().unwrap(), handover.receive().unwrap()];
        assert!(handover.receive().is_none());
        assert_eq!(
            batches.iter().map(|batch| batch.row_count).sum::<u64>(),
            row_count
        );
        assert_eq!((batches[0].sequence, batches[1].sequence), (0, 1));
        for batch in batches {
            assert_eq!(batch.member.raw_size, batch.row_count * 1_000);
            buffers.give_back(batch.into_buffer());
        }
        assert_eq!(
            buffers.counts(),
            UploadBufferCounts {
                free: 2,
                open: 0,
                in_uplink: 0
            }
        );
    }

    #[test]
    fn with_more_tables_than_buffers_the_oldest_open_one_makes_room() {
        let (buffers, handover) = buffers(TWO_TABLES);
        for table_index in [0, 1] {
            assert!(buffers.try_reserve(table_index, 8));
            buffers.append(table_index, b"{\"a\":1}\n", 1);
        }
        assert!(
            !buffers.try_reserve(2, 8),
            "its buffer is still with the uplink"
        );
        let batch = handover.receive().unwrap();
        assert_eq!(batch.table_index, 0);
        buffers.give_back(batch.into_buffer());
        assert!(buffers.try_reserve(2, 8));
    }

    #[test]
    fn a_reservation_waits_for_a_buffer_to_come_back() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, async {
            let (buffers, handover) = buffers(TWO_TABLES);
            let buffers = std::rc::Rc::new(buffers);
            for table_index in [0, 1] {
                assert!(buffers.try_reserve(table_index, 8));
                buffers.append(table_index, b"{\"a\":1}\n", 1);
            }
            let waiting = {
                let buffers = buffers.clone();
                tokio::task::spawn_local(async move { buffers.reserve(2, 8, None).await })
            };
            tokio::task::yield_now().await;
            assert!(!waiting.is_finished());
            buffers.give_back(handover.receive().unwrap().into_buffer());
            assert!(waiting.await.unwrap());
        });
    }

    #[test]
    fn an_open_buffer_without_rows_has_no_age_and_makes_no_blob() {
        let (buffers, handover) = buffers(TWO_TABLES);
        assert!(buffers.try_reserve(0, 8));
        buffers.seal_older_than(Duration::ZERO);
        assert!(handover.receive().is_none());
        buffers.append(0, b"{\"a\":1}\n", 1);
        buffers.seal_older_than(Duration::from_secs(3_600));
        assert!(handover.receive().is_none());
        buffers.seal_older_than(Duration::ZERO);
        assert_eq!(handover.receive().unwrap().row_count, 1);
    }
}
