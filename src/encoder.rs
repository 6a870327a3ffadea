//! The encoder: a checked body becomes rows in upload buffers, all of them or none.
//!
//! Before it: [`crate::connection`] has the whole body in a slab.
//! After it: the rows are in the table's open upload buffer, and the request can be answered.
//! Thread: one reactor. Allocates: its scratch, once.
//! Invariant: validation finishes before the first byte is encoded, and so does the claim on all the disk space that
//! the request can need. What can still refuse it half way is a disk that fails meanwhile, or, where a route promises
//! memory alone, a destination that stands still.
//! Not here: compression ([`crate::deflate`]) and the buffers' life ([`crate::upload_buffer`]).
//!
//! One request encodes at a time. It matters only when the upload buffers run out in the middle of a request: that
//! request waits for one, and the others of this core queue behind it instead of overtaking it in the same scratch.

use std::cell::RefCell;
use std::time::Instant;

use crate::clock::Rfc3339Millis;
use crate::config::{Ack, Envelope, Route};
use crate::envelope::Frame;
use crate::error::{Refusal, Reject};
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
    /// The table's rows up to and including the request's last.
    pub position: u64,
}

/// Why a request was not encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotEncoded {
    /// Nothing of it was.
    Rejected(Reject),
    /// This many of its rows are in upload buffers nevertheless.
    Refused { refusal: Refusal, row_count: u64 },
}

impl From<Refusal> for NotEncoded {
    fn from(refusal: Refusal) -> Self {
        NotEncoded::Refused {
            refusal,
            row_count: 0,
        }
    }
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
            return Err(Refusal::Busy.into());
        };
        let outcome = self
            .encode_in_turn(&mut scratch, buffers, request, deadline)
            .await;
        buffers.unclaim();
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
                position: 0,
            });
        };
        frame.compose(route.envelope, path, &route.default_tag, &timestamp);
        let table_index = route.table_index;
        let row_bytes = records.size + records.count * frame.size();
        buffers.claim(table_index, records.count, row_bytes)?;
        let first_row_size = first.len() + frame.size();
        buffers
            .reserve(table_index, first_row_size, Some(deadline))
            .await?;
        let rows = Rows {
            buffers,
            table_index,
            // A disk that is slow makes a durable request late, and no more.
            deadline: Some(deadline).filter(|_| route.ack == Ack::Memory),
        };
        let position_before = buffers.position(table_index);
        let appended = rows.append_all(starts.iter(body), frame, staging).await;
        let position = buffers.position(table_index);
        buffers.complete(table_index, route.ack == Ack::Delivered);
        match appended {
            Ok(()) => Ok(Encoded {
                record_count: records.count as u64,
                row_bytes: row_bytes as u64,
                position,
            }),
            Err(refusal) => {
                staging.clear();
                Err(NotEncoded::Refused {
                    refusal,
                    row_count: position - position_before,
                })
            }
        }
    }
}

/// Where the rows of one request go.
struct Rows<'a> {
    buffers: &'a UploadBuffers,
    table_index: usize,
    /// Until when a row may wait for a buffer.
    deadline: Option<Instant>,
}

impl Rows<'_> {
    async fn append_all(
        &self,
        records: impl Iterator<Item = &[u8]>,
        frame: &Frame,
        staging: &mut Staging,
    ) -> Result<(), Refusal> {
        for record in records {
            let row_size = record.len() + frame.size();
            if !staging.has_room(row_size) {
                self.append_staged(staging).await?;
            }
            if staging.has_room(row_size) {
                staging.push_row(frame, record);
            } else {
                self.reserve(row_size).await?;
                self.buffers.append(self.table_index, frame.prefix(), 0);
                self.buffers.append(self.table_index, record, 0);
                self.buffers.append(self.table_index, frame.suffix(), 1);
            }
        }
        self.append_staged(staging).await
    }

    async fn append_staged(&self, staging: &mut Staging) -> Result<(), Refusal> {
        if staging.row_count > 0 {
            self.reserve(staging.size).await?;
            let rows = &staging.bytes[..staging.size];
            self.buffers
                .append(self.table_index, rows, staging.row_count);
            staging.clear();
        }
        Ok(())
    }

    async fn reserve(&self, raw_size: usize) -> Result<(), Refusal> {
        self.buffers
            .reserve(self.table_index, raw_size, self.deadline)
            .await
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

    fn clear(&mut self) {
        self.size = 0;
        self.row_count = 0;
    }
}
