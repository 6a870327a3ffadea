//! Group commit: everything that came while one write was on its way is made durable by the next.
//!
//! Before it: [`crate::encoder`] has completed a request's rows and rings the bell.
//! After it: [`crate::ack`] wakes the requests that the commit covers.
//! Thread: one task per reactor. Allocates: the frame buffer, once.
//! Invariant: a row is called durable only after the synced write that covers it returned without an error.
//! Not here: what is committed and in which order ([`crate::upload_buffer`]), and the writing ([`crate::spool::disk`]).
//!
//! A lone request is committed at once: nothing waits for company. Under load company comes by itself, because a core
//! goes on encoding while the disk writes.

use std::rc::Rc;
use std::time::Instant;

use crate::memory::Region;
use crate::metrics::{CoreMetrics, Count};
use crate::spool::disk::Disk;
use crate::upload_buffer::{Commit, UploadBuffers};

/// Commits for as long as the reactor lives. `frame` is where frames are put together.
pub async fn commit<D: Disk>(
    buffers: Rc<UploadBuffers>,
    disk: D,
    mut frame: Region,
    metrics: std::sync::Arc<CoreMetrics>,
) {
    loop {
        while let Some(commit) = buffers.commit_begin() {
            let begun_at = Instant::now();
            frame = write(&buffers, &disk, frame, commit, &metrics).await;
            let elapsed = begun_at.elapsed().as_micros() as u64;
            metrics.update(|update| update.add(Count::CommitMicroseconds, elapsed));
        }
        buffers.dirty().await;
    }
}

/// Writes all frames of one commit, each synced before the next.
async fn write<D: Disk>(
    buffers: &UploadBuffers,
    disk: &D,
    mut frame: Region,
    commit: Commit,
    metrics: &CoreMetrics,
) -> Region {
    while let Some(write) = buffers.commit_stage(&commit, &mut frame) {
        let (outcome, returned) = disk
            .append(&commit.file, frame, write.size, write.offset)
            .await;
        frame = returned;
        if let Err(error) = outcome {
            tracing::error!(
                %error,
                segment = commit.file.slot.file_name(),
                "a commit failed: what it covers is not acknowledged, and its segment is not written again"
            );
            buffers.commit_fail(commit);
            return frame;
        }
        metrics.update(|update| update.add(Count::CommitBytes, write.size as u64));
        buffers.commit_advance(&commit, &write);
    }
    buffers.commit_end(commit);
    frame
}
