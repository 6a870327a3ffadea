//! One connection: wait, take a slab, read, parse, encode, reply, and again.
//!
//! Before it: [`crate::accept`] has a socket and a place for it.
//! After it: [`crate::encoder`] has the records, and the peer its answers.
//! Thread: one reactor; one task per connection. Allocates: at accept (the task, the reply buffer), then never.
//! Invariant: exactly one answer per request, in order; a success is answered once its promise is kept; an idle
//! connection holds no slab, nor does one that waits for nothing but a commit.
//! A peer that is too slow has its reading side shut down by [`crate::deadline`]'s sweep: the read in flight then ends.
//! It has a deadline only while it is the one that is waited for: never during a wait for memory, commit or delivery.
//!
//! ```text
//! begin: PROXY header, TLS handshake          handshake.rs, once
//! ┌→ suspend: wait for bytes, without a slab
//! │  request: head → admit → body → encode     into inbox.rs, through transport.rs
//! └─ settle, flush: answers in order           answers.rs
//! farewell, linger: so that the last answer is read
//! ```

mod answers;
mod exchange;
mod handshake;
pub mod http2;
mod inbox;
mod socket;
mod transport;

use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::rc::Rc;

use tokio_uring::net::TcpStream;

use crate::accept::Place;
use crate::deadline::{Cut, Pace};
use crate::error::{Refusal, Reject};
use crate::http::chunked::Chunked;
use crate::http::frames::PREFACE;
use crate::http::h1::{self, Expectation, Framing, Head};
use crate::http::reply::{Persistence, Replies};
use crate::limits::{CONNECTION_TASK_SIZE_MAX, UNREAD_SIZE_MAX};
use crate::reactor::Core;
use answers::{UNSETTLED_COUNT_MAX, Unsettled, linger};
use exchange::{Peer, Promise, Shown, Unserved};
use inbox::Inbox;
use socket::{discard, poll_readable};
use transport::Transport;

/// The stream ended or failed: there is nobody to answer.
struct Gone;

/// What follows an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Request,
    /// The rest of a body that nobody wants, in bytes, and then a request.
    Skip(usize),
    Close,
}

impl From<Gone> for Unserved {
    fn from(_: Gone) -> Self {
        Unserved::Gone
    }
}

struct Connection {
    core: Rc<Core>,
    stream: Rc<TcpStream>,
    place: Place,
    transport: Transport,
    /// In the handshake.
    shown: Shown,
    replies: Replies,
    request_count: u64,
    unsettled: [Option<Unsettled>; UNSETTLED_COUNT_MAX],
}

/// How a connection has ended.
enum End {
    /// The last answer is written.
    Answered,
    /// It went on in HTTP/2, and that has ended.
    Served,
}

/// Serves a connection to its end.
pub fn serve(core: Rc<Core>, stream: Rc<TcpStream>, place: Place) -> impl Future<Output = ()> {
    let mut connection = Connection {
        core,
        stream,
        place,
        transport: Transport::Plain,
        shown: Shown::default(),
        replies: Replies::new(),
        request_count: 0,
        unsettled: [None; UNSETTLED_COUNT_MAX],
    };
    async move { connection.serve().await }
}

const fn size_of_output<A, B, C, F>(_: fn(A, B, C) -> F) -> usize {
    size_of::<F>()
}

// Every connection has one of these, idle ones too: what is seldom needed is boxed where it is.
const _: () = assert!(size_of_output(serve) <= CONNECTION_TASK_SIZE_MAX);

impl Connection {
    async fn serve(&mut self) {
        let served = match self.run().await {
            Ok(End::Served) => return,
            Ok(End::Answered) => Ok(()),
            Err(Gone) => Err(Gone),
        };
        let is_heard = self.farewell().await;
        if served.is_ok() || is_heard {
            linger(&self.stream).await;
        }
    }

    /// Serves requests until the peer is gone (an error) or the last answer is written.
    async fn run(&mut self) -> Result<End, Gone> {
        let mut received = match self.begin().await {
            Ok(received) => received,
            Err(unserved) => return self.end_unserved(unserved).await,
        };
        if self.transport.is_http2() {
            return self.go_on_in_http2(received).await;
        }
        let mut may_be_http2 = self.may_have_preface();
        loop {
            if received.is_none() {
                self.suspend(None).await?;
                match self.new_inbox().await {
                    Ok(inbox) => received = Some(inbox),
                    Err(refusal) => return self.end_unserved(refusal.into()).await,
                }
            }
            let inbox = received.as_mut().expect("there is one now");
            if std::mem::take(&mut may_be_http2) && self.receive_preface(inbox).await? {
                return self.go_on_in_http2(received).await;
            }
            loop {
                match self.request(inbox).await? {
                    Next::Request => {}
                    Next::Skip(size) if self.transport.is_tls() => {
                        Box::pin(self.skip_sealed(inbox, size)).await?;
                    }
                    Next::Skip(size) => {
                        received = None;
                        self.skip(size).await?;
                        break;
                    }
                    Next::Close => {
                        drop(received);
                        return self.flush().await.map(|()| End::Answered);
                    }
                }
                if inbox.is_empty() {
                    received = None;
                    break;
                }
                if self.is_full() {
                    self.flush().await?;
                }
                inbox.step_down(&self.core).await;
            }
        }
    }

    /// Goes on in HTTP/2 to the end, on the heap: the many connections that never come to this have no room for it.
    fn go_on_in_http2(
        &mut self,
        received: Option<Inbox>,
    ) -> Pin<Box<impl Future<Output = Result<End, Gone>>>> {
        Box::pin(async {
            self.serve_http2(received).await;
            Ok(End::Served)
        })
    }

    /// Whether it may turn out to be HTTP/2 by its first bytes: over TLS that would have been agreed on (RFC 9113 §3.2).
    fn may_have_preface(&self) -> bool {
        let live = self.core.live();
        let listener = &live.config.listeners[self.place.listener_index];
        listener.http2 && listener.tls.is_none()
    }

    /// Answers what the connection ends with.
    async fn end_unserved(&mut self, unserved: Unserved) -> Result<End, Gone> {
        self.answer_unserved(unserved, false).await?;
        self.flush().await.map(|()| End::Answered)
    }

    /// Waits, without a slab, until there is something to read: for the next request, where no `pace` is given.
    /// Gathered replies are written meanwhile.
    async fn suspend(&mut self, pace: Option<Pace>) -> Result<(), Gone> {
        self.settle().await;
        self.place.set_idle(true);
        // Submitted together, the two cost one system call; the poll sees whatever comes after the replies.
        let readable = poll_readable(self.stream.as_raw_fd());
        let flushed = self.flush().await;
        let idle = || self.core.connections.deadlines.idle();
        self.set_deadline(&pace.unwrap_or_else(idle));
        // The poll holds the socket: end it, then wait for it.
        if flushed.is_err() {
            let _ = self.stream.shutdown(Shutdown::Both);
        } else if self.transport.ended() {
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        let polled = readable.await;
        self.place.clear_deadline();
        self.place.set_idle(false);
        if polled.is_err() {
            return Err(Gone);
        }
        flushed
    }

    /// An empty inbox, in a slab of the smallest class.
    async fn new_inbox(&mut self) -> Result<Inbox, Refusal> {
        let slab = self.core.slabs.acquire(0, self.core.wait_deadline()).await;
        slab.map(Inbox::new).ok_or(Refusal::Busy)
    }

    /// Serves one request, and gathers its answer.
    async fn request(&mut self, inbox: &mut Inbox) -> Result<Next, Gone> {
        let head = match self.receive_head(inbox).await {
            Ok(Some(head)) => head,
            Ok(None) => return Err(Gone),
            Err(unserved) => return self.answer_unserved(unserved, false).await,
        };
        let served = self.serve_request(inbox, &head).await;
        self.request_count += 1;
        // Only now: a drain that began meanwhile makes this the last answer.
        let is_last = self.core.draining()
            || self.place.expired()
            || self.request_count >= self.core.live().config.limits.requests_per_connection;
        let persistence = match (head.keep_alive && !is_last, head.keep_alive_confirm) {
            (false, _) => Persistence::Close,
            (true, false) => Persistence::KeepAlive,
            (true, true) => Persistence::KeepAliveConfirmed,
        };
        match served {
            Ok(promise) => {
                let free = self.unsettled.iter_mut().find(|place| place.is_none());
                *free.expect("flushed where it is full") = Some(Unsettled {
                    promise,
                    persistence,
                });
                Ok(match persistence {
                    Persistence::Close => Next::Close,
                    _ => Next::Request,
                })
            }
            Err((unserved, unread)) => {
                let unread = unread.filter(|_| persistence != Persistence::Close);
                let next = self.answer_unserved(unserved, unread.is_some()).await?;
                Ok(match (next, unread) {
                    (Next::Request, Some(size)) => match inbox.drop_unread(size) {
                        0 => Next::Request,
                        left => Next::Skip(left),
                    },
                    (next, _) => next,
                })
            }
        }
    }

    /// Reads until it is known whether the connection begins with the preface of HTTP/2 (RFC 9113 §3.3).
    async fn receive_preface(&mut self, inbox: &mut Inbox) -> Result<bool, Gone> {
        let mut pace = self.core.connections.deadlines.head();
        loop {
            let bytes = inbox.pending_bytes();
            if bytes.starts_with(PREFACE) {
                return Ok(true);
            }
            if !PREFACE.starts_with(bytes) {
                return Ok(false);
            }
            // What ends or takes too long here is answered as the head that it also is.
            if !matches!(self.fill(inbox, &mut pace).await, Ok(true)) {
                return Ok(false);
            }
        }
    }

    /// Reads until the head is complete. `None` where the peer ended the stream between two requests.
    async fn receive_head(&mut self, inbox: &mut Inbox) -> Result<Option<Head>, Unserved> {
        let mut examined = 0;
        let mut pace = self.core.connections.deadlines.head();
        loop {
            let bytes = inbox.pending_bytes();
            if h1::is_worth_parsing(bytes, examined)
                && let Some(head) = h1::parse(bytes)?
            {
                return Ok(Some(head));
            }
            examined = bytes.len();
            inbox.make_room_for_head();
            self.make_room(inbox, &mut pace).await?;
            if !self.fill(inbox, &mut pace).await? {
                return if inbox.pending() == 0 {
                    Ok(None)
                } else {
                    Err(Reject::BodyTruncated.into())
                };
            }
        }
    }

    /// Receives the body and encodes it; what the answer waits for.
    /// An error says how many unread bytes are before the next request, if that is known.
    async fn serve_request(
        &mut self,
        inbox: &mut Inbox,
        head: &Head,
    ) -> Result<Promise, (Unserved, Option<usize>)> {
        let core = self.core.clone();
        // To its end the request goes by what it began with, whatever a reload does meanwhile.
        let live = core.live();
        let head_bytes = &inbox.pending_bytes()[..head.size];
        let size_max = self.transport.request_size_max(core.slabs.size_max());
        let admitted = exchange::admit(&live, &self.peer(), head_bytes, head, size_max);
        let (route, admitted) = match admitted {
            Ok(admitted) => admitted,
            Err(reject) => {
                // Decided from the head alone; a small body that is sure to come is dropped to stay in sync.
                inbox.begin += head.size;
                return Err((reject.into(), unread_size(head)));
            }
        };
        let out_of_sync = |unserved| (unserved, None);
        if head.expectation == Expectation::Continue
            && inbox.pending() == head.size
            && head.framing != Framing::Length(0)
        {
            // RFC 9110 §10.1.1: the decision to read the body has been made.
            self.settle().await;
            self.replies.continue_100();
        }
        let mut pace = core.connections.deadlines.body(inbox.pending() - head.size);
        let (body_end, request_end) = match head.framing {
            Framing::Length(length) => {
                let request_size = head.size + length as usize;
                self.receive_length(inbox, request_size, &mut pace)
                    .await
                    .map_err(out_of_sync)?;
                let end = inbox.begin + request_size;
                (end, end)
            }
            Framing::Chunked => {
                let chunked = self
                    .receive_chunked(inbox, head.size, &mut pace)
                    .await
                    .map_err(out_of_sync)?;
                (chunked.decoded, chunked.examined)
            }
        };
        let begin = inbox.begin;
        inbox.begin = request_end;
        let request = &mut inbox.slab.bytes()[begin..body_end];
        exchange::store(&core, &live, route, &admitted, head, request)
            .await
            .map_err(|unserved| (unserved, Some(0)))
    }

    /// Reads until `request_size` bytes of the request are in one slab.
    async fn receive_length(
        &mut self,
        inbox: &mut Inbox,
        request_size: usize,
        pace: &mut Pace,
    ) -> Result<(), Unserved> {
        let room = self.transport.room(request_size, inbox.pending());
        if room > inbox.slab.size() {
            self.move_up(inbox, room, pace).await?;
        } else if inbox.begin + room > inbox.slab.size() {
            inbox.rewind();
        }
        while inbox.pending() < request_size {
            self.make_room(inbox, pace).await?;
            if !self.fill(inbox, pace).await? {
                return Err(Reject::BodyTruncated.into());
            }
        }
        Ok(())
    }

    /// Reads and decodes until the chunked body is complete in one slab.
    async fn receive_chunked(
        &mut self,
        inbox: &mut Inbox,
        head_size: usize,
        pace: &mut Pace,
    ) -> Result<Chunked, Unserved> {
        let mut chunked = Chunked::new(inbox.begin + head_size);
        loop {
            let received = inbox.received;
            if chunked.decode(inbox.slab.bytes(), received)? {
                return Ok(chunked);
            }
            let end = chunked.close_gap(inbox.slab.bytes(), inbox.end);
            inbox.received -= inbox.end - end;
            inbox.end = end;
            if inbox.is_full() {
                chunked.shift_down(inbox.rewind());
            }
            self.make_room(inbox, pace).await?;
            if !self.fill(inbox, pace).await? {
                return Err(Reject::BodyTruncated.into());
            }
        }
    }

    /// Makes room for at least one byte more.
    async fn make_room(&mut self, inbox: &mut Inbox, pace: &mut Pace) -> Result<(), Unserved> {
        if inbox.is_full() && inbox.rewind() == 0 {
            self.move_up(inbox, inbox.slab.size() + 1, pace).await?;
        }
        Ok(())
    }

    /// Moves the request to a slab that holds `request_size` bytes.
    async fn move_up(
        &mut self,
        inbox: &mut Inbox,
        request_size: usize,
        pace: &mut Pace,
    ) -> Result<(), Unserved> {
        let slabs = &self.core.slabs;
        let class_index = slabs.class_for(request_size).ok_or(Reject::BodySize)?;
        // Nobody may wait for an answer that waits for a slab.
        self.flush_within(pace).await?;
        let Core {
            slabs, connections, ..
        } = &*self.core;
        let pause = connections.deadlines.pause();
        let acquired = slabs.acquire(class_index, self.core.wait_deadline()).await;
        connections.deadlines.resume(pace, pause);
        inbox.move_to(acquired.ok_or(Refusal::Busy)?);
        Ok(())
    }

    /// Reads behind what was received, once; `false` at the end of the stream.
    async fn fill(&mut self, inbox: &mut Inbox, pace: &mut Pace) -> Result<bool, Unserved> {
        // A client that waits for an answer before it sends more must have it.
        self.flush_within(pace).await?;
        if self.transport.ended() {
            return Ok(false);
        }
        self.place
            .set_deadline_keeping(pace, inbox.slab.class_index());
        let began = inbox.pending() > 0;
        let read = inbox.read(&self.stream).await;
        self.place.clear_deadline();
        if began && self.place.expired() {
            return Err(Reject::Timeout.into());
        }
        // A reset is the end of the stream too: the request, if there is one, was aborted.
        let size = read.unwrap_or(0);
        self.core.connections.deadlines.came(pace, size);
        self.core.count_received(size);
        if size == 0 {
            return Ok(false);
        }
        self.open(inbox)
    }

    /// Until when the peer has to send something.
    fn set_deadline(&self, pace: &Pace) {
        self.place.set_deadline(pace, Cut::Reading);
    }

    /// Takes the rest of a body from the socket and drops it. The answer is written first: it is all the peer waits for.
    async fn skip(&mut self, size: usize) -> Result<(), Gone> {
        self.flush().await?;
        let mut left = size;
        let mut pace = self.core.connections.deadlines.body(0);
        while left > 0 {
            self.set_deadline(&pace);
            match discard(self.stream.as_raw_fd(), left).await {
                Ok(size @ 1..) => {
                    self.core.connections.deadlines.came(&mut pace, size);
                    self.core.count_received(size);
                    left -= size;
                }
                // The request has its answer, so nobody is told that its body was cut.
                _ => return Err(Gone),
            }
        }
        Ok(())
    }

    /// The same where the rest of the body is in records, which have to be opened to know where it ends.
    async fn skip_sealed(&mut self, inbox: &mut Inbox, size: usize) -> Result<(), Gone> {
        let mut left = size;
        let mut pace = self.core.connections.deadlines.body(0);
        while left > 0 {
            let made = self.make_room(inbox, &mut pace).await;
            // The request has its answer, so nobody is told that its body was cut.
            if made.is_err() || !matches!(self.fill(inbox, &mut pace).await, Ok(true)) {
                return Err(Gone);
            }
            left = inbox.drop_unread(left);
        }
        Ok(())
    }

    fn peer(&self) -> Peer<'_> {
        Peer {
            listener_index: self.place.listener_index,
            address: self.place.peer,
            shown: &self.shown,
        }
    }
}

/// The size of a body that is not wanted, where it is worth reading to its end.
///
/// A client that waits for `100 Continue` may send its body or not (RFC 9110 §10.1.1), so after another answer nobody
/// knows what the next bytes are. The end of a chunked body is only found by decoding it.
fn unread_size(head: &Head) -> Option<usize> {
    match (head.framing, head.expectation) {
        (Framing::Length(0), _) => Some(0),
        (Framing::Length(size), Expectation::None) if size <= UNREAD_SIZE_MAX as u64 => {
            Some(size as usize)
        }
        _ => None,
    }
}
