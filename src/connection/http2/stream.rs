//! One stream: judge its head, receive its body into a slab, encode, answer.
//!
//! Before it: [`super`] accepted the stream and had a place for it.
//! After it: [`crate::encoder`] has the records, and the peer its answer.
//! Thread: one reactor; one task per stream. Allocates: the task, what waits for a slab, the answer.
//! Invariant: at most one answer; a stream has no slab before something of its body is there, and none while it waits
//! for a commit; what it has waiting fits its window.
//! Not here: what is decided about a request ([`exchange`]).
//!
//! ```text
//! frames ──→ early ──→ slab: | head, as HTTP/1.1 says it | body … |
//!    └────────────────────↗    as soon as there is one
//! ```
//! Capacity goes back to the peer with the copy into the slab. While a stream waits for a slab its frames are moved
//! to `early` all the same: the library's buffers are shared, and a frame of some bytes would keep a whole one.

use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::{Request, Response, StatusCode, request};

use super::super::exchange::{self, Promise, Unserved};
use super::{Shared, StreamPlace, count_passed};
use crate::deadline::Pace;
use crate::error::{Refusal, Reject};
use crate::http::h1::{Expectation, Framing, Head};
use crate::http::h2::{response, trailers};
use crate::http::reply::{Persistence, Replies};
use crate::limits::{LINGER_SIZE_MAX, LINGER_TIME};
use crate::reactor::Core;
use crate::slab::Slab;

/// Serves a stream to its end.
pub(super) async fn serve(
    place: StreamPlace,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) {
    let shared = &*place.shared;
    let core = &shared.core;
    let (parts, stream) = request.into_parts();
    let mut body = Body::new(core.clone(), stream);
    let stored = receive_and_store(shared, parts, &mut body, &mut respond).await;
    let mut replies = Replies::new();
    match stored {
        Ok(promise) => match exchange::settle(core, &promise).await {
            Ok(()) => {
                let status = core.live().config.response.status.code();
                let (ack, record_count) = (promise.ticket.ack, promise.record_count);
                let date = core.clock.date();
                replies.accepted(status, ack, record_count, &date, Persistence::KeepAlive);
            }
            Err(refusal) => replies.refused(refusal, &core.clock.date(), Persistence::KeepAlive),
        },
        Err(Unserved::Refused(refusal)) => {
            core.count_refused(refusal);
            replies.refused(refusal, &core.clock.date(), Persistence::KeepAlive);
        }
        Err(Unserved::Rejected(reject)) => {
            core.count_reject(&reject);
            replies.rejected(&reject, &core.clock.date(), Persistence::KeepAlive);
        }
        Err(Unserved::Gone | Unserved::End) => return core.count_aborted(),
    }
    tokio::join!(answer(core, respond, replies), body.linger());
}

/// Receives the request and encodes it; what its answer waits for.
async fn receive_and_store(
    shared: &Shared,
    parts: request::Parts,
    body: &mut Body,
    respond: &mut SendResponse<Bytes>,
) -> Result<Promise, Unserved> {
    let core = &*shared.core;
    // To its end the request goes by what it began with, whatever a reload does meanwhile.
    let live = core.live();
    let has_body = !body.stream.is_end_stream();
    let (head, text, (route, admitted)) = core.http2.judge(&parts, has_body, |text, head| {
        exchange::admit(&live, &shared.peer(), text, head, core.slabs.size_max())
    })?;
    drop(parts);
    if head.expectation == Expectation::Continue && has_body {
        // RFC 9110 §10.1.1: the decision to read the body has been made.
        let mut interim = Response::new(());
        *interim.status_mut() = StatusCode::CONTINUE;
        respond
            .send_informational(interim)
            .map_err(|_| Unserved::Gone)?;
    }
    let (mut slab, size) = body.receive(&head, text).await?;
    exchange::store(
        core,
        &live,
        route,
        &admitted,
        &head,
        &mut slab.bytes()[..size],
    )
    .await
}

/// The body of a request on its way into a slab.
struct Body {
    core: Rc<Core>,
    stream: RecvStream,
    pace: Pace,
    /// What came before there was room for it in a slab.
    early: Vec<u8>,
    ended: bool,
}

impl Body {
    fn new(core: Rc<Core>, stream: RecvStream) -> Self {
        Body {
            pace: core.connections.deadlines.body(0),
            core,
            stream,
            early: Vec::new(),
            ended: false,
        }
    }

    /// Receives all of it behind the head; the slab, and the end of the request in it.
    async fn receive(&mut self, head: &Head, text: Box<[u8]>) -> Result<(Slab, usize), Unserved> {
        if let Some(piece) = self.next().await? {
            self.keep(&piece);
        }
        let size = match head.framing {
            // That it fits the largest class was looked at when the request was admitted.
            Framing::Length(length) => head.size + length as usize,
            Framing::Chunked => head.size + self.early.len(),
        };
        let mut slab = self.acquire(size).await?;
        let mut received = text.len();
        slab.bytes()[..received].copy_from_slice(&text);
        drop(text);
        loop {
            let end = received + self.early.len();
            if end > slab.size() {
                slab = self.move_up(slab, received, end).await?;
                continue;
            }
            slab.bytes()[received..end].copy_from_slice(&self.early);
            self.release(self.early.len());
            self.early = Vec::new();
            received = end;
            match self.next_keeping(&slab).await? {
                None => break,
                Some(piece) if received + piece.len() > slab.size() => self.keep(&piece),
                Some(piece) => {
                    let end = received + piece.len();
                    slab.bytes()[received..end].copy_from_slice(&piece);
                    self.release(piece.len());
                    received = end;
                }
            }
        }
        let fields = self
            .stream
            .trailers()
            .await
            .map_err(|error| fault(&error))?;
        if let Some(fields) = fields {
            trailers(&fields)?;
        }
        match head.framing {
            // RFC 9113 §8.1.1: the library has reset the stream before it comes to this.
            Framing::Length(length) if length as usize != received - head.size => {
                Err(Reject::BodyTruncated.into())
            }
            _ => Ok((slab, received)),
        }
    }

    /// The next piece; `None` at the end.
    async fn next(&mut self) -> Result<Option<Bytes>, Unserved> {
        if self.ended {
            return Ok(None);
        }
        let deadline = self.core.connections.deadlines.instant(&self.pace);
        let next = poll_fn(|context| self.poll_next(context));
        match tokio::time::timeout_at(deadline.into(), next).await {
            Ok(next) => next,
            Err(_) => {
                count_passed(&self.core);
                Err(Reject::Timeout.into())
            }
        }
    }

    /// The same while a slab is kept, which after a while is somebody else's who waits for it.
    async fn next_keeping(&mut self, slab: &Slab) -> Result<Option<Bytes>, Unserved> {
        let core = self.core.clone();
        let deadlines = &core.connections.deadlines;
        while !self.ended {
            let look = (Instant::now() + deadlines.period())
                .max(deadlines.contended_instant(&self.pace))
                .min(deadlines.instant(&self.pace));
            let next = poll_fn(|context| self.poll_next(context));
            if let Ok(next) = tokio::time::timeout_at(look.into(), next).await {
                return next;
            }
            let is_wanted = core.slabs.waiting()[slab.class_index()] > 0;
            if is_wanted || deadlines.instant(&self.pace) <= Instant::now() {
                count_passed(&core);
                return Err(Reject::Timeout.into());
            }
        }
        Ok(None)
    }

    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Unserved>> {
        self.stream.poll_data(context).map(|next| match next {
            Some(Ok(piece)) => {
                let deadlines = &self.core.connections.deadlines;
                deadlines.came(&mut self.pace, piece.len());
                Ok(Some(piece))
            }
            Some(Err(error)) => Err(fault(&error)),
            None => {
                self.ended = true;
                Ok(None)
            }
        })
    }

    fn keep(&mut self, piece: &[u8]) {
        self.early.reserve_exact(piece.len());
        self.early.extend_from_slice(piece);
    }

    /// Lets the peer send as much again.
    fn release(&mut self, size: usize) {
        // What was received may be released, unless the stream has ended meanwhile.
        let _ = self.stream.flow_control().release_capacity(size);
    }

    /// Drops what still comes although the answer does not wait for it, for a while: a peer that is writing sees the
    /// answer before the reset, which some take for all there is (curl 7.88 does). What nobody has read then goes back
    /// to the window of the connection.
    async fn linger(mut self) {
        let deadline = Instant::now() + LINGER_TIME;
        let mut left = LINGER_SIZE_MAX;
        while !self.ended {
            let next = poll_fn(|context| self.stream.poll_data(context));
            let Ok(Some(Ok(piece))) = tokio::time::timeout_at(deadline.into(), next).await else {
                return;
            };
            self.release(piece.len());
            match left.checked_sub(piece.len()) {
                Some(less) => left = less,
                None => return,
            }
        }
    }

    /// Takes a slab for `size` bytes, and keeps what comes meanwhile.
    async fn acquire(&mut self, size: usize) -> Result<Slab, Unserved> {
        let core = self.core.clone();
        let class_index = core.slabs.class_for(size).ok_or(Reject::BodySize)?;
        let deadlines = &core.connections.deadlines;
        let pause = deadlines.pause();
        let mut acquired = pin!(core.slabs.acquire(class_index, core.wait_deadline()));
        let slab = poll_fn(|context| {
            if let Poll::Ready(slab) = acquired.as_mut().poll(context) {
                return Poll::Ready(slab.ok_or(Refusal::Busy.into()));
            }
            while !self.ended {
                match self.poll_next(context) {
                    Poll::Ready(Ok(Some(piece))) => self.keep(&piece),
                    Poll::Ready(Ok(None)) => {}
                    Poll::Ready(Err(unserved)) => return Poll::Ready(Err(unserved)),
                    Poll::Pending => break,
                }
            }
            Poll::Pending
        })
        .await?;
        deadlines.resume(&mut self.pace, pause);
        Ok(slab)
    }

    /// Moves what was received to a slab for `size` bytes.
    async fn move_up(
        &mut self,
        mut slab: Slab,
        received: usize,
        size: usize,
    ) -> Result<Slab, Unserved> {
        let mut larger = self.acquire(size).await?;
        larger.bytes()[..received].copy_from_slice(&slab.bytes()[..received]);
        Ok(larger)
    }
}

/// What the end of a stream means for its request.
fn fault(error: &h2::Error) -> Unserved {
    // The library resets a stream whose frames are not what its head says (RFC 9113 §8.1.1).
    if error.is_reset() && error.is_library() {
        return Reject::Framing("the body is not of the size that its head says").into();
    }
    Unserved::Gone
}

/// Writes the one answer, as fast as the peer's window allows. Where the body does not end while [`Body::linger`] waits
/// for it, the library then resets the stream, without an error (RFC 9113 §8.1).
async fn answer(core: &Core, mut respond: SendResponse<Bytes>, mut replies: Replies) {
    let (head, mut content) = response(replies.take());
    let Ok(mut stream) = respond.send_response(head, content.is_empty()) else {
        return;
    };
    let deadlines = &core.connections.deadlines;
    let deadline = deadlines.instant(&deadlines.write());
    let sent = tokio::time::timeout_at(deadline.into(), async {
        while !content.is_empty() {
            stream.reserve_capacity(content.len());
            let Some(Ok(size)) = poll_fn(|context| stream.poll_capacity(context)).await else {
                return;
            };
            let part = content.split_to(size.min(content.len()));
            if stream.send_data(part, content.is_empty()).is_err() {
                return;
            }
        }
    });
    if sent.await.is_err() {
        count_passed(core);
        stream.send_reset(Reason::CANCEL);
    }
}
