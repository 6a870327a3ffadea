//! Operations on a socket that tokio-uring has no call for.
//!
//! Before it: [`crate::connection`] has a descriptor.
//! After it: a completion with a count, or an error.
//! Thread: one reactor. Allocates: never; a future has a name, so that it can be kept in a struct.
//! Invariant: an operation that was submitted is awaited to its end, or ends when the socket is shut down: dropping it
//! does not take it back.
//! Not here: reading into slabs ([`crate::slab`]).

use std::io;
use std::os::fd::RawFd;

use io_uring::{cqueue, opcode, types};
use tokio_uring::{InFlightOneshot, OneshotOutputTransform, UnsubmittedOneshot};

/// Completes with the result of the operation: a count, or an error number.
pub struct ResultOf;

impl OneshotOutputTransform for ResultOf {
    type Output = io::Result<usize>;
    type StoredData = ();

    fn transform_oneshot_output(self, (): (), cqe: cqueue::Entry) -> Self::Output {
        usize::try_from(cqe.result()).map_err(|_| io::Error::from_raw_os_error(-cqe.result()))
    }
}

/// Completes when `fd` has bytes, or the end of the stream, to read.
pub fn poll_readable(fd: RawFd) -> InFlightOneshot<(), ResultOf> {
    let entry =
        opcode::PollAdd::new(types::Fd(fd), (libc::POLLIN | libc::POLLRDHUP) as u32).build();
    UnsubmittedOneshot::new((), ResultOf, entry).submit()
}

/// Completes when `fd` takes bytes again, or fails.
pub fn poll_writable(fd: RawFd) -> InFlightOneshot<(), ResultOf> {
    let entry = opcode::PollAdd::new(types::Fd(fd), libc::POLLOUT as u32).build();
    UnsubmittedOneshot::new((), ResultOf, entry).submit()
}

/// Takes up to `size` bytes from the socket and drops them: with `MSG_TRUNC`, `tcp(7)` needs no buffer.
pub fn discard(fd: RawFd, size: usize) -> InFlightOneshot<(), ResultOf> {
    let entry = opcode::Recv::new(types::Fd(fd), std::ptr::null_mut(), size as u32)
        .flags(libc::MSG_TRUNC)
        .build();
    UnsubmittedOneshot::new((), ResultOf, entry).submit()
}
