//! One connection: wait, take a slab, read, parse, encode, reply, and again.
//!
//! Before it: [`crate::accept`] has a socket and a place for it.
//! After it: [`crate::encoder`] has the records, and the peer its answers.
//! Thread: one reactor; one task per connection. Allocates: at accept (the task, the reply buffer), then never.
//! Invariant: exactly one answer per request, in order; a success is answered once its promise is kept; an idle
//! connection holds no slab, nor does one that waits for nothing but a commit;
//! `begin ≤ received ≤ slab size`.
//! A peer that is too slow has its reading side shut down by [`crate::deadline`]'s sweep: the read in flight then ends.
//! It has a deadline only while it is the one that is waited for: never during a wait for memory, commit or delivery.
//!
//! ```text
//! slab:  | answered | head | body … | next request, pipelined … |        |
//!        0          begin                                       received size
//! ```

mod exchange;
pub mod http2;

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;
use std::time::Instant;

use bytes::Bytes;
use io_uring::{cqueue, opcode, types};
use tokio_uring::net::TcpStream;
use tokio_uring::{InFlightOneshot, OneshotOutputTransform, UnsubmittedOneshot};

use crate::accept::Place;
use crate::deadline::{Cut, Pace};
use crate::error::{Refusal, Reject};
use crate::http::chunked::Chunked;
use crate::http::frames::PREFACE;
use crate::http::h1::{self, Expectation, Framing, Head};
use crate::http::proxy;
use crate::http::reply::{Persistence, Replies};
use crate::limits::{
    HEAD_SIZE_MAX, LINGER_SIZE_MAX, LINGER_TIME, REPLY_BUFFER_SIZE, REPLY_SIZE_MAX, UNREAD_SIZE_MAX,
};
use crate::reactor::Core;
use crate::slab::Slab;
use exchange::{Promise, Unserved};
use http2::{Ending, Http2Place, Socket};

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

/// A request whose answer waits for its promise.
#[derive(Clone, Copy)]
struct Unsettled {
    promise: Promise,
    persistence: Persistence,
}

/// As many as have room in the reply buffer.
const UNSETTLED_COUNT_MAX: usize = REPLY_BUFFER_SIZE / REPLY_SIZE_MAX;

impl From<Gone> for Unserved {
    fn from(_: Gone) -> Self {
        Unserved::Gone
    }
}

struct Connection {
    core: Rc<Core>,
    stream: Rc<TcpStream>,
    place: Place,
    replies: Replies,
    request_count: u64,
    unsettled: [Option<Unsettled>; UNSETTLED_COUNT_MAX],
}

/// What was received of the requests in a slab.
struct Inbox {
    slab: Slab,
    begin: usize,
    received: usize,
}

/// How the part of a connection that speaks HTTP/1.1 has ended.
enum End {
    /// The last answer is written.
    Answered,
    /// It is HTTP/2 from here on, with what was received of it.
    Http2(Bytes),
}

/// Serves a connection to its end.
pub async fn serve(core: Rc<Core>, stream: Rc<TcpStream>, place: Place) {
    let mut connection = Connection {
        core,
        stream,
        place,
        replies: Replies::new(),
        request_count: 0,
        unsettled: [None; UNSETTLED_COUNT_MAX],
    };
    match connection.run().await {
        Ok(End::Answered) => linger(&connection.stream).await,
        Ok(End::Http2(received)) => connection.serve_http2(received).await,
        Err(Gone) => {}
    }
}

impl Connection {
    /// Serves requests until the peer is gone (an error) or the last answer is written.
    async fn run(&mut self) -> Result<End, Gone> {
        let mut expects_proxy_header = self.place.is_of_proxy();
        let mut may_be_http2 = self.core.config.listeners[self.place.listener_index].http2;
        loop {
            self.suspend().await?;
            let Some(slab) = self.core.slabs.acquire(0, self.core.wait_deadline()).await else {
                self.answer_unserved(Refusal::Busy.into(), false).await?;
                return self.flush().await.map(|()| End::Answered);
            };
            let mut inbox = Inbox {
                slab,
                begin: 0,
                received: 0,
            };
            if std::mem::take(&mut expects_proxy_header) {
                match self.receive_proxy_header(&mut inbox).await {
                    Ok(true) if inbox.pending() > 0 => {}
                    Ok(true) => continue,
                    Ok(false) => return Err(Gone),
                    Err(unserved) => {
                        self.answer_unserved(unserved, false).await?;
                        return self.flush().await.map(|()| End::Answered);
                    }
                }
            }
            if std::mem::take(&mut may_be_http2) && self.receive_preface(&mut inbox).await? {
                return Ok(End::Http2(Bytes::copy_from_slice(inbox.pending_bytes())));
            }
            loop {
                match self.request(&mut inbox).await? {
                    Next::Request => {}
                    Next::Skip(size) => {
                        drop(inbox);
                        self.skip(size).await?;
                        break;
                    }
                    Next::Close => {
                        drop(inbox);
                        return self.flush().await.map(|()| End::Answered);
                    }
                }
                if inbox.pending() == 0 {
                    break;
                }
                if self.is_full() {
                    self.flush().await?;
                }
                inbox.step_down(&self.core).await;
            }
        }
    }

    /// Waits, without a slab, until there is something to read. Gathered replies are written meanwhile.
    async fn suspend(&mut self) -> Result<(), Gone> {
        self.settle().await;
        self.place.set_idle(true);
        // Submitted together, the two cost one system call; the poll sees whatever comes after the replies.
        let readable = poll_readable(self.stream.as_raw_fd());
        let flushed = self.flush().await;
        self.set_deadline(&self.core.connections.deadlines.idle());
        if flushed.is_err() {
            // The poll holds the socket: end it, then wait for it.
            let _ = self.stream.shutdown(Shutdown::Both);
        }
        let polled = readable.await;
        self.place.clear_deadline();
        self.place.set_idle(false);
        if polled.is_err() {
            return Err(Gone);
        }
        flushed
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
            || self.request_count >= self.core.config.limits.requests_per_connection;
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
                    (Next::Request, Some(size)) => inbox.drop_unread(size),
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
            if !matches!(self.fill(inbox, &mut pace).await, Ok(1..)) {
                return Ok(false);
            }
        }
    }

    /// Serves the connection to its end, now that it speaks HTTP/2.
    async fn serve_http2(self, received: Bytes) {
        let Connection {
            core,
            stream,
            place,
            ..
        } = self;
        let ending = match Http2Place::take(&core) {
            Some(http2_place) => {
                let socket = Socket::new(stream.clone(), received);
                http2::serve(http2_place, &place, socket).await
            }
            None => {
                place.set_deadline(&core.connections.deadlines.write(), Cut::Both);
                let _ = stream.write_all(http2::TURNED_AWAY).await;
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

    /// Reads the PROXY header that a connection of a proxy begins with; `false` where it ended before its first byte,
    /// as the probes of proxies do.
    async fn receive_proxy_header(&mut self, inbox: &mut Inbox) -> Result<bool, Unserved> {
        let mut pace = self.core.connections.deadlines.head();
        loop {
            if self.fill(inbox, &mut pace).await? == 0 {
                return match inbox.pending() {
                    0 => Ok(false),
                    _ => Err(Reject::BodyTruncated.into()),
                };
            }
            if let Some(header) = proxy::parse(inbox.pending_bytes())? {
                inbox.begin = header.size;
                if let Some(source) = header.source {
                    self.place.set_source(source)?;
                }
                return Ok(true);
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
            inbox.make_room();
            if self.fill(inbox, &mut pace).await? == 0 {
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
        let head_bytes = &inbox.pending_bytes()[..head.size];
        let place = &self.place;
        let admitted = exchange::admit(&core, place.listener_index, place.peer, head_bytes, head);
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
        exchange::store(&core, route, &admitted, head, request)
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
        if request_size > inbox.slab.size() {
            self.move_up(inbox, request_size, pace).await?;
        } else if inbox.begin + request_size > inbox.slab.size() {
            inbox.rewind();
        }
        while inbox.pending() < request_size {
            if self.fill(inbox, pace).await? == 0 {
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
            inbox.received = chunked.close_gap(inbox.slab.bytes(), received);
            if inbox.received == inbox.slab.size() {
                chunked.shift_down(inbox.rewind());
            }
            if inbox.received == inbox.slab.size() {
                self.move_up(inbox, inbox.slab.size() + 1, pace).await?;
            }
            if self.fill(inbox, pace).await? == 0 {
                return Err(Reject::BodyTruncated.into());
            }
        }
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

    /// Reads behind what was received; the number of bytes, 0 at the end of the stream.
    async fn fill(&mut self, inbox: &mut Inbox, pace: &mut Pace) -> Result<usize, Unserved> {
        // A client that waits for an answer before it sends more must have it.
        self.flush_within(pace).await?;
        self.set_deadline(pace);
        let began = inbox.pending() > 0;
        let read = inbox.slab.read(&self.stream, inbox.received).await;
        self.place.clear_deadline();
        if began && self.place.expired() {
            return Err(Reject::Timeout.into());
        }
        // A reset is the end of the stream too: the request, if there is one, was aborted.
        let size = read.unwrap_or(0);
        inbox.received += size;
        self.core.connections.deadlines.came(pace, size);
        self.core.count_received(size);
        Ok(size)
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

    /// Whether one more answer might not fit the reply buffer, besides those that are gathered and to be gathered.
    fn is_full(&self) -> bool {
        let unsettled_count = self.unsettled.iter().flatten().count();
        !self.replies.has_room(unsettled_count + 1)
    }

    /// Waits until the promises made to this connection are kept, and gathers their answers.
    async fn settle(&mut self) {
        for index in 0..UNSETTLED_COUNT_MAX {
            let Some(unsettled) = self.unsettled[index].take() else {
                return;
            };
            let Unsettled {
                promise,
                persistence,
            } = unsettled;
            let core = &self.core;
            let kept = exchange::settle(core, &promise).await;
            let date = core.clock.date();
            match kept {
                Ok(()) => {
                    let status = core.config.response.status.code();
                    let (ack, record_count) = (promise.ticket.ack, promise.record_count);
                    self.replies
                        .accepted(status, ack, record_count, &date, persistence);
                }
                Err(refusal) => self.replies.refused(refusal, &date, persistence),
            }
        }
    }

    /// Flushes in the middle of a request, at nobody's expense: until its answers are written, a peer need not send.
    async fn flush_within(&mut self, pace: &mut Pace) -> Result<(), Gone> {
        if self.replies.is_empty() && self.unsettled[0].is_none() {
            return Ok(());
        }
        let pause = self.core.connections.deadlines.pause();
        let flushed = self.flush().await;
        self.core.connections.deadlines.resume(pace, pause);
        flushed
    }

    /// Writes the gathered replies, once those that are to come are gathered too.
    async fn flush(&mut self) -> Result<(), Gone> {
        self.settle().await;
        if self.replies.is_empty() {
            return Ok(());
        }
        let pace = self.core.connections.deadlines.write();
        self.place.set_deadline(&pace, Cut::Both);
        let (outcome, bytes) = self.stream.write_all(self.replies.take()).await;
        self.place.clear_deadline();
        self.replies.give_back(bytes);
        outcome.map_err(|_| Gone)
    }

    /// Counts and answers a request that was not accepted, once those before it have their answers.
    async fn answer_unserved(&mut self, unserved: Unserved, keep: bool) -> Result<Next, Gone> {
        self.settle().await;
        let date = self.core.clock.date();
        let (keep, answer) = match unserved {
            Unserved::Gone => {
                self.core.count_aborted();
                return Err(Gone);
            }
            Unserved::Refused(refusal) => {
                self.core.count_refused(refusal);
                (keep, Err(refusal))
            }
            Unserved::Rejected(reject) => {
                self.core.count_reject(&reject);
                (keep && reject.answer().in_sync, Ok(reject))
            }
        };
        let persistence = if keep {
            Persistence::KeepAlive
        } else {
            Persistence::Close
        };
        match answer {
            Ok(reject) => self.replies.rejected(&reject, &date, persistence),
            Err(refusal) => self.replies.refused(refusal, &date, persistence),
        }
        Ok(if keep { Next::Request } else { Next::Close })
    }
}

/// Closes so that the peer can still read the last answer (RFC 9112 §9.6): half-closes, then drops what comes,
/// for a while, until the peer closes too.
async fn linger(stream: &TcpStream) {
    if stream.shutdown(Shutdown::Write).is_err() {
        return;
    }
    let deadline = Instant::now() + LINGER_TIME;
    let mut dropped = 0;
    while dropped < LINGER_SIZE_MAX {
        let mut discard = discard(stream.as_raw_fd(), LINGER_SIZE_MAX - dropped);
        match tokio::time::timeout_at(deadline.into(), &mut discard).await {
            Ok(Ok(size @ 1..)) => dropped += size,
            Ok(_) => return,
            Err(_) => {
                // A receive cannot be cancelled: make it fail, then wait for it.
                let _ = stream.shutdown(Shutdown::Both);
                let _ = discard.await;
                return;
            }
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

impl Inbox {
    /// Bytes received and not yet answered.
    fn pending(&self) -> usize {
        self.received - self.begin
    }

    fn pending_bytes(&mut self) -> &[u8] {
        let range = self.begin..self.received;
        &self.slab.bytes()[range]
    }

    /// Drops what came of the next `size` bytes, which nobody reads.
    fn drop_unread(&mut self, size: usize) -> Next {
        let here = size.min(self.pending());
        self.begin += here;
        match size - here {
            0 => Next::Request,
            left => Next::Skip(left),
        }
    }

    /// Moves the request to the start of the slab; by how much.
    fn rewind(&mut self) -> usize {
        let distance = self.begin;
        if distance > 0 {
            let range = self.begin..self.received;
            self.slab.bytes().copy_within(range, 0);
            self.begin = 0;
            self.received -= distance;
        }
        distance
    }

    /// Makes room for at least one more byte of a head.
    fn make_room(&mut self) {
        if self.pending() == 0 {
            self.begin = 0;
            self.received = 0;
        } else if self.begin + HEAD_SIZE_MAX > self.slab.size() {
            self.rewind();
        }
        assert!(
            self.received < self.slab.size(),
            "a head always leaves room"
        );
    }

    /// Goes on in another slab.
    fn move_to(&mut self, mut slab: Slab) {
        let pending = self.pending();
        assert!(pending <= slab.size());
        slab.bytes()[..pending].copy_from_slice(self.pending_bytes());
        self.slab = slab;
        self.begin = 0;
        self.received = pending;
    }

    /// Gives a large slab back when a few pipelined bytes are all it still holds.
    async fn step_down(&mut self, core: &Core) {
        if self.slab.class_index() == 0 || self.pending() > core.slabs.class_size(0) {
            return;
        }
        // Only if there is one now: the large slab is in hand.
        if let Some(slab) = core.slabs.acquire(0, Instant::now()).await {
            self.move_to(slab);
        }
    }
}

/// Completes with the result of the operation: a count, or an error number.
struct ResultOf;

impl OneshotOutputTransform for ResultOf {
    type Output = io::Result<usize>;
    type StoredData = ();

    fn transform_oneshot_output(self, (): (), cqe: cqueue::Entry) -> Self::Output {
        usize::try_from(cqe.result()).map_err(|_| io::Error::from_raw_os_error(-cqe.result()))
    }
}

/// Completes when `fd` has bytes, or the end of the stream, to read.
fn poll_readable(fd: RawFd) -> InFlightOneshot<(), ResultOf> {
    let entry =
        opcode::PollAdd::new(types::Fd(fd), (libc::POLLIN | libc::POLLRDHUP) as u32).build();
    UnsubmittedOneshot::new((), ResultOf, entry).submit()
}

/// Completes when `fd` takes bytes again, or fails.
fn poll_writable(fd: RawFd) -> InFlightOneshot<(), ResultOf> {
    let entry = opcode::PollAdd::new(types::Fd(fd), libc::POLLOUT as u32).build();
    UnsubmittedOneshot::new((), ResultOf, entry).submit()
}

/// Takes up to `size` bytes from the socket and drops them: with `MSG_TRUNC`, `tcp(7)` needs no buffer.
fn discard(fd: RawFd, size: usize) -> InFlightOneshot<(), ResultOf> {
    let entry = opcode::Recv::new(types::Fd(fd), std::ptr::null_mut(), size as u32)
        .flags(libc::MSG_TRUNC)
        .build();
    UnsubmittedOneshot::new((), ResultOf, entry).submit()
}
