//! Answers: gathered in the order of their requests, once their promises are kept, and written together.
//!
//! Before it: [`crate::connection`] knows the outcome of a request, or what it waits for.
//! After it: the peer has its answers, and the connection goes on or closes.
//! Thread: one reactor. Allocates: never without TLS.
//! Invariant: exactly one answer per request, in order.
//! Not here: the text of an answer ([`crate::http::reply`]).

use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::time::Instant;

use tokio_uring::net::TcpStream;

use super::exchange::{self, Promise, Unserved};
use super::socket::discard;
use super::transport::Transport;
use super::{Connection, Gone, Next};
use crate::deadline::{Cut, Pace};
use crate::http::reply::Persistence;
use crate::limits::{LINGER_SIZE_MAX, LINGER_TIME, REPLY_BUFFER_SIZE, REPLY_SIZE_MAX};

/// A request whose answer waits for its promise.
#[derive(Clone, Copy)]
pub struct Unsettled {
    pub promise: Promise,
    pub persistence: Persistence,
}

/// As many as have room in the reply buffer.
pub const UNSETTLED_COUNT_MAX: usize = REPLY_BUFFER_SIZE / REPLY_SIZE_MAX;

impl Connection {
    /// Whether one more answer might not fit the reply buffer, besides those that are gathered and to be gathered.
    pub(super) fn is_full(&self) -> bool {
        let unsettled_count = self.unsettled.iter().flatten().count();
        !self.replies.has_room(unsettled_count + 1)
    }

    /// Waits until the promises made to this connection are kept, and gathers their answers.
    pub(super) async fn settle(&mut self) {
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
    pub(super) async fn flush_within(&mut self, pace: &mut Pace) -> Result<(), Gone> {
        if self.unsettled[0].is_none() && !self.transport.has_outgoing(&self.replies) {
            return Ok(());
        }
        let pause = self.core.connections.deadlines.pause();
        let flushed = self.flush().await;
        self.core.connections.deadlines.resume(pace, pause);
        flushed
    }

    /// Writes the gathered replies, once those that are to come are gathered too.
    pub(super) async fn flush(&mut self) -> Result<(), Gone> {
        self.settle().await;
        self.write_outgoing().await
    }

    async fn write_outgoing(&mut self) -> Result<(), Gone> {
        if !self.transport.has_outgoing(&self.replies) {
            return Ok(());
        }
        let outgoing = self.transport.take_outgoing(&mut self.replies)?;
        let pace = self.core.connections.deadlines.write();
        self.place.set_deadline(&pace, Cut::Both);
        let (outcome, bytes) = self.stream.write_all(outgoing).await;
        self.place.clear_deadline();
        self.transport.give_back(&mut self.replies, bytes);
        outcome.map_err(|_| Gone)
    }

    /// Counts and answers a request that was not accepted, once those before it have their answers.
    pub(super) async fn answer_unserved(
        &mut self,
        unserved: Unserved,
        keep: bool,
    ) -> Result<Next, Gone> {
        self.settle().await;
        let date = self.core.clock.date();
        let (keep, answer) = match unserved {
            Unserved::End => return Err(Gone),
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

    /// Says that nothing follows, or writes the alert that says why, where the transport has a word for that; whether it
    /// had and the peer may hear it.
    pub(super) async fn farewell(&mut self) -> bool {
        let Transport::Tls(session) = &mut self.transport else {
            return false;
        };
        // Answers that could not be written before are not to come after the end.
        self.replies.clear();
        session.close_notify();
        session.has_outgoing() && self.write_outgoing().await.is_ok()
    }
}

/// Closes so that the peer can still read the last answer (RFC 9112 §9.6): half-closes, then drops what comes,
/// for a while, until the peer closes too.
pub(super) async fn linger(stream: &TcpStream) {
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
