//! A socket as the `h2` crate wants it: bytes straight into and out of its buffers, readiness by the ring.
//!
//! Before it: [`super::super`] has read the first bytes of the connection.
//! After it: [`super::wire`] sees all bytes that pass, through [`super::sealed`] where they are TLS.
//! Thread: one reactor. Allocates: never; each wait is an operation of the ring.
//! Invariant: at most one wait for reading and one for writing is with the kernel; neither has memory of this one, so
//! dropping them is safe. They end when the socket is shut down, which whoever drops this does.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_uring::InFlightOneshot;
use tokio_uring::net::TcpStream;

use super::super::socket::{ResultOf, poll_readable, poll_writable};

type Readiness = Option<InFlightOneshot<(), ResultOf>>;

/// A connected socket.
pub struct Socket {
    stream: Rc<TcpStream>,
    /// What was read before this had the socket.
    received: Bytes,
    readable: Readiness,
    writable: Readiness,
}

impl Socket {
    pub fn new(stream: Rc<TcpStream>, received: Bytes) -> Self {
        Socket {
            stream,
            received,
            readable: None,
            writable: None,
        }
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        // SAFETY: the stream owns the descriptor, and is held by `self`, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.stream.as_raw_fd()) }
    }
}

/// Waits for what was submitted, if anything was.
fn poll_ready(readiness: &mut Readiness, context: &mut Context<'_>) -> Poll<io::Result<()>> {
    if let Some(operation) = readiness {
        let polled = ready!(Pin::new(operation).poll(context));
        *readiness = None;
        polled?;
    }
    Poll::Ready(Ok(()))
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.received.has_remaining() {
            let size = buffer.remaining().min(self.received.len());
            buffer.put_slice(&self.received.split_to(size));
            return Poll::Ready(Ok(()));
        }
        loop {
            ready!(poll_ready(&mut self.readable, context))?;
            let unfilled = buffer.initialize_unfilled();
            match rustix::net::recv(self.descriptor(), unfilled, RecvFlags::DONTWAIT) {
                Ok((size, _)) => {
                    buffer.advance(size);
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::WOULDBLOCK) => {
                    self.readable = Some(poll_readable(self.stream.as_raw_fd()));
                }
                Err(Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(poll_ready(&mut self.writable, context))?;
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::send(self.descriptor(), bytes, flags) {
                Ok(size) => return Poll::Ready(Ok(size)),
                Err(Errno::WOULDBLOCK) => {
                    self.writable = Some(poll_writable(self.stream.as_raw_fd()));
                }
                Err(Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Nothing is gathered here.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.stream.shutdown(Shutdown::Write))
    }
}
