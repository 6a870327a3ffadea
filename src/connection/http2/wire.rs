//! The bytes of an HTTP/2 connection on their way: counted, metered, and a turn at a time.
//!
//! Before it: a socket, or TLS over one.
//! After it: the `h2` crate reads and writes through this.
//! Thread: one reactor. Allocates: never.
//! Invariant: nothing is read past a flood, and no more than a turn before the streams have had theirs.
//! Not here: what is done about a flood or a deadline ([`super`] does it).

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::deadline::{Deadlines, Pace};
use crate::http::frames::{FrameMeter, PREFACE, Scanner, go_away};
use crate::limits::HTTP2_TURN_SIZE;
use crate::reactor::Core;

/// What the connection is told of its bytes.
#[derive(Default)]
pub struct Wire {
    turn_left: Cell<usize>,
    flood: Cell<Flood>,
    /// Until when the header block that has begun must end.
    head: Cell<Option<Pace>>,
    /// Until when the peer must take something of what waits to be written.
    write: Cell<Option<Pace>>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Flood {
    #[default]
    None,
    Found,
    Told,
}

impl Wire {
    /// Lets the connection read for another turn.
    pub fn begin_turn(&self) {
        self.turn_left.set(HTTP2_TURN_SIZE);
    }

    /// Whether a flood was found; says so once.
    pub fn take_flood(&self) -> bool {
        let is_found = self.flood.get() == Flood::Found;
        if is_found {
            self.flood.set(Flood::Told);
        }
        is_found
    }

    pub fn head_overdue(&self, deadlines: &Deadlines) -> bool {
        let is_overdue = has_passed(&self.head, deadlines);
        if is_overdue {
            self.head.set(None);
        }
        is_overdue
    }

    pub fn write_overdue(&self, deadlines: &Deadlines) -> bool {
        has_passed(&self.write, deadlines)
    }
}

fn has_passed(pace: &Cell<Option<Pace>>, deadlines: &Deadlines) -> bool {
    pace.get().is_some_and(|pace| deadlines.has_passed(&pace))
}

/// A stream of bytes that is watched.
pub struct Metered<T> {
    io: T,
    core: Rc<Core>,
    wire: Rc<Wire>,
    /// Of the client's preface, which is no frame.
    preface_left: usize,
    received: FrameMeter,
    /// As of the last read.
    header_blocks: (u64, bool),
    sent: Scanner,
}

impl<T> Metered<T> {
    pub fn new(io: T, core: Rc<Core>, wire: Rc<Wire>) -> Self {
        Metered {
            io,
            received: FrameMeter::new(core.connections.deadlines.now()),
            core,
            wire,
            preface_left: PREFACE.len(),
            header_blocks: (0, false),
            sent: Scanner::default(),
        }
    }

    /// Notes since when the peer has taken nothing.
    fn written<R>(&self, polled: Poll<R>) -> Poll<R> {
        let write = &self.wire.write;
        if polled.is_ready() {
            write.set(None);
        } else if write.get().is_none() {
            write.set(Some(self.core.connections.deadlines.write()));
        }
        polled
    }

    fn meter(&mut self, bytes: &[u8]) {
        self.core.count_received(bytes.len());
        let left = &self.wire.turn_left;
        left.set(left.get().saturating_sub(bytes.len()));
        let preface_size = self.preface_left.min(bytes.len());
        self.preface_left -= preface_size;
        let deadlines = &self.core.connections.deadlines;
        let frames = &bytes[preface_size..];
        if self.received.received(frames, deadlines.now()).is_err() {
            self.wire.flood.set(Flood::Found);
        }
        let header_blocks = self.received.header_blocks();
        if header_blocks != self.header_blocks {
            self.header_blocks = header_blocks;
            let (_, has_begun) = header_blocks;
            self.wire.head.set(has_begun.then(|| deadlines.head()));
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Metered<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.wire.flood.get() != Flood::None {
            // The connection that polls this ends it next.
            return Poll::Pending;
        }
        if self.wire.turn_left.get() == 0 {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let filled = buffer.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(context, buffer))?;
        self.meter(&buffer.filled()[filled..]);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Metered<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.io).poll_write(context, bytes);
        let outcome = ready!(self.written(polled));
        if let Ok(size) = outcome {
            let Metered { sent, core, .. } = &mut *self;
            sent.scan(&bytes[..size], |frame| {
                if let Some(code_index) = go_away(frame) {
                    core.metrics.update(|update| update.add_go_away(code_index));
                }
            });
        }
        Poll::Ready(outcome)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.io).poll_flush(context);
        self.written(polled)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.io).poll_shutdown(context);
        self.written(polled)
    }
}
