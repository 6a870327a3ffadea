//! TLS between the `h2` crate and a socket.
//!
//! Before it: [`super::socket`] has ciphertext.
//! After it: [`super::wire`] reads plaintext and writes frames.
//! Thread: one reactor. Allocates: a buffer of one record, once; what waits to be sent, at most two records.
//! Invariant: one record at a time is sealed, and only once those before it are with the kernel; nothing is read past
//! the peer's `close_notify`.
//! Not here: the handshake, which came before.
//!
//! ```text
//! buffer:  | read | plaintext | part of a record |      |
//!          0      begin       opened             end    TLS_RECORD_SIZE_MAX
//! ```

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::limits::{TLS_PLAINTEXT_SIZE_MAX, TLS_RECORD_SIZE_MAX};
use crate::tls::Session;

/// A stream of bytes over TLS.
pub struct Sealed<S> {
    session: Box<Session>,
    socket: S,
    buffer: Box<[u8]>,
    begin: usize,
    opened: usize,
    end: usize,
    /// Plaintext that was received before, in front of that in the buffer.
    received: Bytes,
    outgoing: Vec<u8>,
    /// Of that, what the kernel has.
    sent: usize,
    closing: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Sealed<S> {
    /// For a session whose handshake is done, and what of its records was received already.
    pub fn new(session: Box<Session>, socket: S, plaintext: Bytes, ciphertext: &[u8]) -> Self {
        let mut buffer = vec![0; TLS_RECORD_SIZE_MAX].into_boxed_slice();
        // What is not opened is less than a record.
        buffer[..ciphertext.len()].copy_from_slice(ciphertext);
        Sealed {
            session,
            socket,
            buffer,
            begin: 0,
            opened: 0,
            end: ciphertext.len(),
            received: plaintext,
            outgoing: Vec::new(),
            sent: 0,
            closing: false,
        }
    }

    /// Sends what is sealed.
    fn poll_send(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            if self.sent == self.outgoing.len() {
                self.outgoing.clear();
                self.sent = 0;
                if !self.session.has_outgoing() {
                    return Poll::Ready(Ok(()));
                }
                std::mem::swap(&mut self.outgoing, self.session.outgoing());
            }
            let rest = &self.outgoing[self.sent..];
            self.sent += ready!(Pin::new(&mut self.socket).poll_write(context, rest))?;
        }
    }

    /// Reads and opens until there is plaintext; `false` at the end of the stream.
    fn poll_open(&mut self, context: &mut Context<'_>) -> Poll<io::Result<bool>> {
        while self.begin == self.opened {
            if self.session.ended() {
                return Poll::Ready(Ok(false));
            }
            self.buffer.copy_within(self.opened..self.end, 0);
            self.end -= self.opened;
            (self.begin, self.opened) = (0, 0);
            let mut free = ReadBuf::new(&mut self.buffer[self.end..]);
            assert!(free.remaining() > 0, "a whole record would be open");
            ready!(Pin::new(&mut self.socket).poll_read(context, &mut free))?;
            let size = free.filled().len();
            if size == 0 {
                return Poll::Ready(Ok(false));
            }
            self.end += size;
            let opened = self.session.open(&mut self.buffer[..self.end]);
            // An alert that says why, or what the peer's records ask for. If it has to wait, then for the next frame.
            let _ = self.poll_send(context)?;
            let opened =
                opened.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            self.opened = opened.plaintext;
            self.end = opened.plaintext + opened.tail;
        }
        Poll::Ready(Ok(true))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Sealed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.received.is_empty() {
            let size = buffer.remaining().min(self.received.len());
            buffer.put_slice(&self.received.split_to(size));
            return Poll::Ready(Ok(()));
        }
        if ready!(self.poll_open(context))? {
            let size = buffer.remaining().min(self.opened - self.begin);
            buffer.put_slice(&self.buffer[self.begin..self.begin + size]);
            self.begin += size;
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Sealed<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_send(context))?;
        let size = bytes.len().min(TLS_PLAINTEXT_SIZE_MAX);
        self.session
            .seal(&bytes[..size])
            .map_err(|error| io::Error::new(io::ErrorKind::BrokenPipe, error))?;
        // Whatever has to wait is sent before the next record, or by a flush.
        let _ = self.poll_send(context)?;
        Poll::Ready(Ok(size))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_send(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.closing {
            self.closing = true;
            self.session.close_notify();
        }
        ready!(self.poll_send(context))?;
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}
