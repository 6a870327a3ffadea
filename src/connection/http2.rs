//! An HTTP/2 connection: accept its streams, watch its peer, end it well.
//!
//! Before it: [`super`] has seen the client's preface, or the TLS handshake has agreed on `h2`.
//! After it: each stream is a task of its own (`stream.rs`), which the connection waits for at its end.
//! Thread: one reactor; one task per connection, one per stream. Allocates: per connection, per stream and per frame,
//! within what the plan says (`limits.rs`, `HTTP2_*`).
//! Invariant: what is advertised can be stored: the window of the connection is that of all its streams together, and
//! what a stream has no slab for yet is moved out of the library's buffers into the stream's own window.
//! A connection never has more streams than `http2.streams`, those that the peer has reset included, until they end.
//! Not here: frames and flow control, which are the `h2` crate's.
//!
//! The connection looks at the clock some times a second instead of having a timer for each of its deadlines.

mod sealed;
mod socket;
mod stream;
mod wire;

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::net::{IpAddr, Shutdown};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;
use h2::Reason;
use h2::server::{Builder, Connection};
use tokio::io::{AsyncRead, AsyncWrite};

use super::Connection as Http1Connection;
use super::answers::linger;
use super::exchange::{Peer, Shown};
use super::inbox::Inbox;
use super::transport::Transport;
use crate::config::Config;
use crate::deadline::{Cut, Pace};
use crate::error::Reject;
use crate::http::h1::Head;
use crate::limits::{
    HEAD_SIZE_MAX, HTTP2_CONNECTION_AGE_MAX, HTTP2_DATA_FRAME_BUDGET, HTTP2_ERROR_RESET_COUNT_MAX,
    HTTP2_FRAME_SIZE_MAX, HTTP2_HEADER_LIST_SIZE_MAX, HTTP2_HEADER_TABLE_SIZE,
    HTTP2_PENDING_RESET_COUNT_MAX, HTTP2_RESET_TIME, HTTP2_SEND_BUFFER_SIZE,
    http2_connection_window_size,
};
use crate::metrics::Count;
use crate::reactor::Core;
use crate::wait::Bell;
use sealed::Sealed;
use socket::Socket;
use wire::{Metered, Wire};

/// What HTTP/2 has of a core.
pub struct Http2 {
    open_count: Cell<usize>,
    connections_max: usize,
    /// Where a head is judged before there is a slab for it.
    head: RefCell<Box<[u8]>>,
}

impl Http2 {
    pub fn new(config: &Config) -> Self {
        let is_spoken = config.http2_streams_max() > 0;
        Http2 {
            open_count: Cell::new(0),
            connections_max: if is_spoken {
                config.http2.connections
            } else {
                0
            },
            head: RefCell::new(vec![0; if is_spoken { HEAD_SIZE_MAX } else { 0 }].into()),
        }
    }

    /// Whether one more connection may speak HTTP/2.
    pub fn has_room(&self) -> bool {
        self.open_count.get() < self.connections_max
    }

    /// Writes the head of a request in HTTP/1.1's form, judges it, and gives both to `decide`. What was written is
    /// returned too: the fields themselves lie in buffers that the library reads many frames into.
    fn judge<T>(
        &self,
        parts: &http::request::Parts,
        has_body: bool,
        decide: impl FnOnce(&[u8], &Head) -> Result<T, Reject>,
    ) -> Result<(Head, Box<[u8]>, T), Reject> {
        let mut bytes = self.head.borrow_mut();
        let head = crate::http::h2::head(parts, has_body, &mut bytes)?;
        let text = &bytes[..head.size];
        let decided = decide(text, &head)?;
        Ok((head, text.into(), decided))
    }
}

/// One connection's place among those that speak HTTP/2, until it is dropped.
struct Http2Place {
    core: Rc<Core>,
}

impl Http2Place {
    /// `None` where all places are taken.
    fn take(core: &Rc<Core>) -> Option<Http2Place> {
        let has_room = core.http2.has_room();
        core.metrics.update(|update| {
            update.add(Count::Http2Connections, 1);
            update.add(
                match has_room {
                    true => Count::Http2ConnectionsOpen,
                    false => Count::Http2ConnectionsRefused,
                },
                1,
            );
        });
        has_room.then(|| {
            core.http2.open_count.set(core.http2.open_count.get() + 1);
            Http2Place { core: core.clone() }
        })
    }
}

impl Drop for Http2Place {
    fn drop(&mut self) {
        let open_count = &self.core.http2.open_count;
        open_count.set(open_count.get() - 1);
        self.core
            .metrics
            .update(|update| update.sub(Count::Http2ConnectionsOpen, 1));
    }
}

/// Empty SETTINGS, and GOAWAY before the first stream with ENHANCE_YOUR_CALM (RFC 9113 §3.4, §6.8): for who has no place.
const TURNED_AWAY: &[u8] =
    b"\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x08\x07\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x0b";

impl Http1Connection {
    /// Serves the connection to its end, now that it speaks HTTP/2; with what was received of it already.
    pub(super) async fn serve_http2(&mut self, received: Option<Inbox>) {
        let (core, stream, place) = (self.core.clone(), self.stream.clone(), &self.place);
        let transport = std::mem::replace(&mut self.transport, Transport::Plain);
        let shared = Rc::new(Shared {
            core: core.clone(),
            listener_index: place.listener_index,
            address: place.peer,
            shown: std::mem::take(&mut self.shown),
            stream_count: Cell::new(0),
            request_count: Cell::new(0),
            ended: Bell::default(),
        });
        let mut plaintext = Bytes::new();
        let mut ciphertext = Bytes::new();
        if let Some(mut inbox) = received {
            plaintext = Bytes::copy_from_slice(inbox.pending_bytes());
            ciphertext = Bytes::copy_from_slice(inbox.sealed());
        }
        let ending = match (Http2Place::take(&core), transport) {
            (Some(_http2_place), Transport::Plain) => {
                let socket = Socket::new(stream.clone(), plaintext);
                serve(shared, socket).await
            }
            (Some(_http2_place), Transport::Tls(session)) => {
                let socket = Socket::new(stream.clone(), Bytes::new());
                let sealed = Sealed::new(session, socket, plaintext, &ciphertext);
                serve(shared, sealed).await
            }
            (None, transport) => {
                let said = match transport {
                    Transport::Plain => TURNED_AWAY.to_vec(),
                    Transport::Tls(mut session) => {
                        let sealed = session.seal(TURNED_AWAY);
                        session.close_notify();
                        sealed.map_or(Vec::new(), |()| std::mem::take(session.outgoing()))
                    }
                };
                place.set_deadline(&core.connections.deadlines.write(), Cut::Both);
                let _ = stream.write_all(said).await;
                place.clear_deadline();
                Ending::Closed
            }
        };
        if ending == Ending::Closed {
            linger(&stream).await;
        }
        // The ring may still wait for the socket.
        let _ = stream.shutdown(Shutdown::Both);
    }
}

/// What a connection and its streams have in common.
struct Shared {
    core: Rc<Core>,
    listener_index: usize,
    address: IpAddr,
    shown: Shown,
    stream_count: Cell<usize>,
    request_count: Cell<u64>,
    ended: Bell,
}

impl Shared {
    fn peer(&self) -> Peer<'_> {
        Peer {
            listener_index: self.listener_index,
            address: self.address,
            shown: &self.shown,
        }
    }

    /// Whether one more stream can be served.
    fn has_room(&self) -> bool {
        self.stream_count.get() < self.core.live().config.http2.streams
    }
}

/// One stream's place among those of its connection, until it is dropped.
struct StreamPlace {
    shared: Rc<Shared>,
}

impl StreamPlace {
    fn take(shared: &Rc<Shared>) -> StreamPlace {
        assert!(shared.has_room(), "a stream without a place");
        shared.stream_count.set(shared.stream_count.get() + 1);
        shared
            .core
            .metrics
            .update(|update| update.add(Count::Http2StreamsOpen, 1));
        StreamPlace {
            shared: shared.clone(),
        }
    }
}

impl Drop for StreamPlace {
    fn drop(&mut self) {
        let shared = &self.shared;
        shared.stream_count.set(shared.stream_count.get() - 1);
        shared
            .core
            .metrics
            .update(|update| update.sub(Count::Http2StreamsOpen, 1));
        shared.ended.ring();
    }
}

/// How a connection has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// The last frame was written, or nobody is there to read it.
    Closed,
    /// The peer does not read.
    Cut,
}

/// What is to be done about a connection at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Continue,
    /// No further streams; those that are open finish (RFC 9113 §6.8).
    Leave,
    GoAway(Reason),
    Cut,
}

/// Serves a connection to its end, its streams included.
async fn serve<T>(shared: Rc<Shared>, io: T) -> Ending
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let core = shared.core.clone();
    let wire = Rc::new(Wire::default());
    let ending = Watch::new(shared.clone(), wire.clone())
        .run(Metered::new(io, core, wire))
        .await;
    // Those that wait for their promise are counted when it is kept, though nobody hears of it.
    while shared.stream_count.get() > 0 {
        shared.ended.rung().await;
    }
    ending
}

fn builder(config: &Config) -> Builder {
    let (streams, window) = (config.http2.streams, config.http2.window);
    let mut builder = h2::server::Builder::new();
    builder
        .max_concurrent_streams(streams as u32)
        .initial_window_size(window as u32)
        .initial_connection_window_size(http2_connection_window_size(streams, window) as u32)
        .max_frame_size(HTTP2_FRAME_SIZE_MAX as u32)
        .max_header_list_size(HTTP2_HEADER_LIST_SIZE_MAX as u32)
        .header_table_size(HTTP2_HEADER_TABLE_SIZE as u32)
        .max_pending_accept_reset_streams(HTTP2_PENDING_RESET_COUNT_MAX)
        .max_local_error_reset_streams(Some(HTTP2_ERROR_RESET_COUNT_MAX))
        // Every stream that is refused by its head is reset, and what was on its way comes later.
        .max_concurrent_reset_streams(streams)
        .reset_stream_duration(HTTP2_RESET_TIME)
        .data_frame_budget(HTTP2_DATA_FRAME_BUDGET)
        .max_send_buffer_size(HTTP2_SEND_BUFFER_SIZE);
    builder
}

/// A connection's clock, and what it is held against.
struct Watch {
    shared: Rc<Shared>,
    wire: Rc<Wire>,
    /// When the connection is old enough.
    aged_at: Instant,
    /// Until when the next request has to come.
    idle: Option<Pace>,
    /// No more streams are taken; until when the peer has to go.
    leaving: Option<Pace>,
}

impl Watch {
    fn new(shared: Rc<Shared>, wire: Rc<Wire>) -> Self {
        let age = HTTP2_CONNECTION_AGE_MAX.mul_f64(0.9 + 0.2 * fastrand::f64());
        Watch {
            shared,
            wire,
            aged_at: Instant::now() + age,
            idle: None,
            leaving: None,
        }
    }

    async fn run<T>(mut self, io: Metered<T>) -> Ending
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        let core = self.shared.core.clone();
        let period = core.connections.deadlines.period();
        let mut tick = pin!(tokio::time::sleep(period));
        let mut ticks = |context: &mut Context<'_>| {
            let has_ticked = tick.as_mut().poll(context).is_ready();
            if has_ticked {
                tick.as_mut().reset(tokio::time::Instant::now() + period);
                // To be woken by the next one.
                let _ = tick.as_mut().poll(context);
            }
            has_ticked
        };
        let mut handshake = pin!(builder(&core.live().config).handshake::<_, Bytes>(io));
        let pace = core.connections.deadlines.head();
        let connected = poll_fn(|context| {
            self.wire.begin_turn();
            if let Poll::Ready(outcome) = handshake.as_mut().poll(context) {
                return Poll::Ready(outcome.ok());
            }
            if ticks(context) && core.connections.deadlines.has_passed(&pace) {
                count_passed(&core);
                return Poll::Ready(None);
            }
            Poll::Pending
        });
        let Some(mut connection) = connected.await else {
            return Ending::Cut;
        };
        poll_fn(|context| {
            self.wire.begin_turn();
            loop {
                if self.accept(&mut connection, context).is_ready() {
                    return Poll::Ready(Ending::Closed);
                }
                let next = if self.wire.take_flood() {
                    Next::GoAway(Reason::ENHANCE_YOUR_CALM)
                } else if ticks(context) {
                    self.look()
                } else {
                    Next::Continue
                };
                match next {
                    Next::Continue => return Poll::Pending,
                    Next::Leave => {
                        self.leaving = Some(core.connections.deadlines.write());
                        connection.graceful_shutdown();
                    }
                    Next::GoAway(reason) => connection.abrupt_shutdown(reason),
                    Next::Cut => return Poll::Ready(Ending::Cut),
                }
            }
        })
        .await
    }

    /// Takes the streams that have come; ready once the connection has ended.
    fn accept<T>(
        &mut self,
        connection: &mut Connection<T, Bytes>,
        context: &mut Context<'_>,
    ) -> Poll<()>
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        let shared = &self.shared;
        loop {
            if !shared.has_room() {
                // Those that the peer has reset still end here, and no other stream begins before.
                if connection.poll_closed(context).is_ready() {
                    return Poll::Ready(());
                }
                ready!(shared.ended.poll_rung(context));
                continue;
            }
            let (request, respond) = match connection.poll_accept(context) {
                Poll::Ready(Some(Ok(accepted))) => accepted,
                Poll::Ready(Some(Err(error))) => {
                    tracing::debug!(%error, "an HTTP/2 connection ended");
                    return Poll::Ready(());
                }
                Poll::Ready(None) => return Poll::Ready(()),
                Poll::Pending => return Poll::Pending,
            };
            self.idle = None;
            let place = StreamPlace::take(shared);
            tokio_uring::spawn(stream::serve(place, request, respond));
            shared.request_count.set(shared.request_count.get() + 1);
            if shared.request_count.get()
                == shared.core.live().config.limits.requests_per_connection
            {
                self.leaving = Some(shared.core.connections.deadlines.write());
                connection.graceful_shutdown();
            }
        }
    }

    /// Looks at the clock.
    fn look(&mut self) -> Next {
        let core = &self.shared.core;
        let deadlines = &core.connections.deadlines;
        if self.wire.write_overdue(deadlines) {
            count_passed(core);
            return Next::Cut;
        }
        if self.wire.head_overdue(deadlines) {
            count_passed(core);
            return Next::GoAway(Reason::ENHANCE_YOUR_CALM);
        }
        let is_idle = self.shared.stream_count.get() == 0;
        if let Some(leaving) = &mut self.leaving {
            // What is left then is to hear that the peer has seen it.
            if !is_idle {
                *leaving = deadlines.write();
            } else if deadlines.has_passed(leaving) {
                return Next::GoAway(Reason::NO_ERROR);
            }
            return Next::Continue;
        }
        if !is_idle {
            self.idle = None;
        } else if deadlines.has_passed(self.idle.get_or_insert_with(|| deadlines.idle())) {
            count_passed(core);
            return Next::Leave;
        }
        match core.draining() || Instant::now() >= self.aged_at {
            true => Next::Leave,
            false => Next::Continue,
        }
    }
}

fn count_passed(core: &Core) {
    core.metrics
        .update(|update| update.add(Count::DeadlinesPassed, 1));
}
