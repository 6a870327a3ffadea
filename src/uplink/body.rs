//! Bodies: the bytes of a batch as an HTTP client wants them, from memory or from the segment.
//!
//! Before it: [`super::courier`] has a batch to deliver to Kusto.
//! After it: the client sends the body, as often as the delivery tries.
//! Thread: the uplink's runtime; a segment is read on a thread that may block.
//! Allocates: nothing for a batch in memory; per body read from a segment a window, and pieces of at most a frame.
//! Invariant: the memory of an upload buffer goes back to its core when the last body made of it is gone, and not
//! before: a body may outlive its attempt.
//! Not here: when to try, and what of.

use std::io::{self, Write};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::poll_fn;
use reqwest::Body;
use tokio::sync::mpsc;

use super::Handover;
use super::kusto::BlobSource;
use crate::limits::FRAME_BUFFER_SIZE;
use crate::spool::disk::Disk;
use crate::spool::frame::Totals;
use crate::spool::{Spool, Spooled};
use crate::upload_buffer::BatchMemory;

/// The memory of a batch, while bodies are made of it.
struct Lent {
    memory: Option<BatchMemory>,
    handover: Arc<Handover>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        self.memory.as_ref().map_or(&[], BatchMemory::bytes)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            self.handover.give_back(memory.into_buffer());
        }
    }
}

/// The blob that is in `memory`, which goes back through `handover` with the last of the bytes.
pub fn lend(memory: BatchMemory, handover: Arc<Handover>) -> Bytes {
    Bytes::from_owner(Lent {
        memory: Some(memory),
        handover,
    })
}

/// A blob that is read from its segment.
pub struct SegmentBlob<D> {
    pub spool: Arc<Spool<D>>,
    pub spooled: Spooled,
    pub totals: Totals,
}

impl<D: Disk> BlobSource for SegmentBlob<D> {
    fn body(&self) -> io::Result<Body> {
        // One piece waits while one is sent and the next is read.
        let (sender, mut receiver) = mpsc::channel(1);
        let (spool, spooled, totals) = (self.spool.clone(), self.spooled.clone(), self.totals);
        tokio::task::spawn_blocking(move || {
            let mut window = vec![0; FRAME_BUFFER_SIZE];
            let mut pieces = Pieces { sender };
            let mut reader = spool.reader(&spooled, &mut window);
            if let Err(error) = reader.copy_member(&totals, &mut pieces) {
                // Nobody listens where the attempt is over, and then that is the error.
                let _ = pieces.sender.blocking_send(Err(error));
            }
        });
        Ok(Body::wrap_stream(poll_fn(move |context| {
            receiver.poll_recv(context)
        })))
    }
}

/// Sends what is written to it.
struct Pieces {
    sender: mpsc::Sender<io::Result<Bytes>>,
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = Bytes::copy_from_slice(bytes);
        let sent = self.sender.blocking_send(Ok(piece));
        sent.map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
