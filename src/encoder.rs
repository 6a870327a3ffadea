//! The encoder: a checked body becomes rows in upload buffers, all of them or none.
//!
//! Before it: [`crate::connection`] has the whole body in a slab.
//! After it: the rows are in the table's open upload buffer, and the request can be answered.
//! Thread: one reactor. Allocates: its scratch, once.
//! Invariant: validation finishes before the first byte is encoded, and once a byte is encoded the request can no
//! longer be refused.
//! Not here: compression ([`crate::deflate`]) and the buffers' life ([`crate::upload_buffer`]).
//!
//! One request encodes at a time. It matters only when the upload buffers run out in the middle of a request: that
//! request waits for one, and the others of this core queue behind it instead of overtaking it in the same scratch.

use std::cell::RefCell;
use std::time::Instant;

use crate::clock::Rfc3339Millis;
use crate::config::{Envelope, Route};
use crate::envelope::Frame;
use crate::error::Reject;
use crate::limits::{STAGING_SIZE, row_size_max};
use crate::records::RecordStarts;
use crate::records::json::Checker;
use crate::upload_buffer::UploadBuffers;
use crate::wait::WaitQueue;

struct Scratch {
    checker: Checker,
    starts: RecordStarts,
    frame: Frame,
    staging: Staging,
}

/// Rows on their way to deflate: small ones are gathered, so that deflate is called for many at once.
struct Staging {
    bytes: Box<[u8]>,
    size: usize,
    row_count: u64,
}

/// A core's encoder.
pub struct Encoder {
    /// Absent while a request encodes.
    scratch: RefCell<Option<Box<Scratch>>>,
    queue: WaitQueue,
    record_size_max: usize,
}

/// What there is to encode.
pub struct Request<'a> {
    pub route: &'a Route,
    /// As it was sent, without query.
    pub path: &'a [u8],
    /// As it was received; it is compacted where it lies.
    pub body: &'a mut [u8],
    pub timestamp: Rfc3339Millis,
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Encoded {
    pub record_count: u64,
    /// Bytes of rows, before compression.
    pub row_bytes: u64,
}

/// Why a request was not encoded; nothing of it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotEncoded {
    Rejected(Reject),
    /// No upload buffer came free in time.
    Refused,
}

impl Encoder {
    /// `body_size_max` is the size of the largest slab.
    pub fn new(body_size_max: usize, record_size_max: usize, waiters_max: usize) -> Self {
        // What is staged must fit an empty upload buffer, and those are only sure to hold the largest row.
        let staging_size = STAGING_SIZE.min(row_size_max(record_size_max));
        Encoder {
            scratch: RefCell::new(Some(Box::new(Scratch {
                checker: Checker::new(),
                starts: RecordStarts::with_body_size_max(body_size_max),
                frame: Frame::new(),
                staging: Staging {
                    bytes: vec![0; staging_size].into_boxed_slice(),
                    size: 0,
                    row_count: 0,
                },
            }))),
            queue: WaitQueue::new(waiters_max),
            record_size_max,
        }
    }

    /// Checks a request's body, compacts it where it lies, and encodes its records.
    pub async fn encode(
        &self,
        buffers: &UploadBuffers,
        request: Request<'_>,
        deadline: Instant,
    ) -> Result<Encoded, NotEncoded> {
        let turn = self
            .queue
            .until(Some(deadline), || self.scratch.borrow_mut().take())
            .await;
        let Some(mut scratch) = turn else {
            return Err(NotEncoded::Refused);
        };
        let outcome = self
            .encode_in_turn(&mut scratch, buffers, request, deadline)
            .await;
        *self.scratch.borrow_mut() = Some(scratch);
        self.queue.wake_one();
        outcome
    }

    async fn encode_in_turn(
        &self,
        scratch: &mut Scratch,
        buffers: &UploadBuffers,
        request: Request<'_>,
        deadline: Instant,
    ) -> Result<Encoded, NotEncoded> {
        let Scratch {
            checker,
            starts,
            frame,
            staging,
        } = scratch;
        let Request {
            route,
            path,
            body,
            timestamp,
        } = request;
        let rejected = |reject| Err(NotEncoded::Rejected(reject));
        let records = match checker.check(body, starts) {
            Ok(records) => records,
            Err(error) => return rejected(Reject::Json(error)),
        };
        if route.envelope == Envelope::None && !records.all_objects {
            return rejected(Reject::RecordNotObject);
        }
        let body = &body[..records.size];
        // A body that is small enough has no record that is too large.
        if records.size > self.record_size_max
            && starts.record_size_max(body) > self.record_size_max
        {
            return rejected(Reject::RecordSize);
        }
        let Some(first) = starts.iter(body).next() else {
            return Ok(Encoded {
                record_count: 0,
                row_bytes: 0,
            });
        };
        frame.compose(route.envelope, path, &route.default_tag, &timestamp);
        let table_index = route.table_index;
        let first_row_size = first.len() + frame.size();
        if !buffers
            .reserve(table_index, first_row_size, Some(deadline))
            .await
        {
            return Err(NotEncoded::Refused);
        }
        // From here on the request is accepted: what follows may wait, but cannot fail.
        let mut row_bytes = 0;
        for record in starts.iter(body) {
            let row_size = record.len() + frame.size();
            row_bytes += row_size as u64;
            if !staging.has_room(row_size) {
                staging.drain(buffers, table_index).await;
            }
            if staging.has_room(row_size) {
                staging.push_row(frame, record);
            } else {
                append_large_row(buffers, table_index, frame, record, row_size).await;
            }
        }
        staging.drain(buffers, table_index).await;
        Ok(Encoded {
            record_count: records.count as u64,
            row_bytes,
        })
    }
}

impl Staging {
    fn has_room(&self, row_size: usize) -> bool {
        // Rows from a quarter of the staging on are not worth a copy.
        row_size < self.bytes.len() / 4 && self.size + row_size <= self.bytes.len()
    }

    fn push_row(&mut self, frame: &Frame, record: &[u8]) {
        for part in [frame.prefix(), record, frame.suffix()] {
            self.bytes[self.size..self.size + part.len()].copy_from_slice(part);
            self.size += part.len();
        }
        self.row_count += 1;
    }

    async fn drain(&mut self, buffers: &UploadBuffers, table_index: usize) {
        if self.row_count > 0 {
            reserve_without_deadline(buffers, table_index, self.size).await;
            buffers.append(table_index, &self.bytes[..self.size], self.row_count);
            self.size = 0;
            self.row_count = 0;
        }
    }
}

async fn append_large_row(
    buffers: &UploadBuffers,
    table_index: usize,
    frame: &Frame,
    record: &[u8],
    row_size: usize,
) {
    reserve_without_deadline(buffers, table_index, row_size).await;
    buffers.append(table_index, frame.prefix(), 0);
    buffers.append(table_index, record, 0);
    buffers.append(table_index, frame.suffix(), 1);
}

async fn reserve_without_deadline(buffers: &UploadBuffers, table_index: usize, raw_size: usize) {
    let reserved = buffers.reserve(table_index, raw_size, None).await;
    assert!(
        reserved,
        "one request encodes at a time, so the queue has room"
    );
}
