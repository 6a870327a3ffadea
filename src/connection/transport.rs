//! The transport: what is between the socket's bytes and those of HTTP, nothing or TLS.
//!
//! Before it: [`crate::connection`] has read into its inbox, or gathered replies.
//! After it: plaintext in the inbox, or bytes for the socket.
//! Thread: one reactor. Allocates: nothing without TLS; with it what [`crate::tls`] says.
//! Invariant: nothing is sent in clear on a connection whose handshake has begun.
//! Not here: the socket.

use crate::connection::Gone;
use crate::connection::inbox::Inbox;
use crate::http::reply::Replies;
use crate::limits::{
    REPLY_BUFFER_SIZE, TLS_EXPANSION_SIZE_MAX, TLS_HEADER_SIZE, TLS_RECORD_SIZE_MAX,
};
use crate::tls::{HTTP_2, Session, TlsError};

pub enum Transport {
    Plain,
    Tls(Box<Session>),
}

/// What a connection keeps of its buffer for ciphertext: sealed replies. A handshake needs more, once.
const OUTGOING_SIZE_KEPT: usize = REPLY_BUFFER_SIZE + TLS_HEADER_SIZE + TLS_EXPANSION_SIZE_MAX;

impl Transport {
    pub fn is_tls(&self) -> bool {
        matches!(self, Transport::Tls(_))
    }

    /// Makes plaintext of what was read; `false` where that was the last.
    pub fn open(&mut self, inbox: &mut Inbox) -> Result<bool, TlsError> {
        match self {
            Transport::Plain => {
                inbox.take_all();
                Ok(true)
            }
            Transport::Tls(session) => {
                let opened = session.open(inbox.sealed())?;
                inbox.opened(&opened);
                Ok(opened.plaintext > 0 || !opened.ended)
            }
        }
    }

    /// Whether HTTP/2 was agreed on (RFC 9113 §3.2).
    pub fn is_http2(&self) -> bool {
        match self {
            Transport::Plain => false,
            Transport::Tls(session) => session.handshaken() && session.alpn() == Some(HTTP_2),
        }
    }

    /// Whether the peer has said that nothing follows.
    pub fn ended(&self) -> bool {
        match self {
            Transport::Plain => false,
            Transport::Tls(session) => session.ended(),
        }
    }

    /// Whether requests can be received.
    pub fn handshaken(&self) -> bool {
        match self {
            Transport::Plain => true,
            Transport::Tls(session) => session.handshaken(),
        }
    }

    /// The room in a slab that a request of `request_size` bytes needs, of which `pending` are there.
    ///
    /// Of what is still to come, the last record is as long as the rest of the request where a peer waits for its
    /// answer. From one that pipelines more it may be longer: then the request moves on.
    pub fn room(&self, request_size: usize, pending: usize) -> usize {
        match self {
            Transport::Tls(_) if pending < request_size => {
                request_size + TLS_HEADER_SIZE + TLS_EXPANSION_SIZE_MAX
            }
            _ => request_size,
        }
    }

    /// The largest request that is sure to fit a slab of `slab_size`.
    pub fn request_size_max(&self, slab_size: usize) -> usize {
        match self {
            Transport::Plain => slab_size,
            Transport::Tls(_) => slab_size - TLS_RECORD_SIZE_MAX,
        }
    }

    /// Whether there is anything to send.
    pub fn has_outgoing(&self, replies: &Replies) -> bool {
        match self {
            Transport::Plain => !replies.is_empty(),
            Transport::Tls(session) => !replies.is_empty() || session.has_outgoing(),
        }
    }

    /// Lends the bytes to be sent; [`Transport::give_back`] returns their buffer.
    pub fn take_outgoing(&mut self, replies: &mut Replies) -> Result<Vec<u8>, Gone> {
        match self {
            Transport::Plain => Ok(replies.take()),
            Transport::Tls(session) => {
                if !replies.is_empty() {
                    if !session.handshaken() {
                        return Err(Gone);
                    }
                    let plaintext = replies.take();
                    let sealed = session.seal(&plaintext);
                    replies.give_back(plaintext);
                    sealed.map_err(|_| Gone)?;
                }
                Ok(std::mem::take(session.outgoing()))
            }
        }
    }

    pub fn give_back(&mut self, replies: &mut Replies, mut bytes: Vec<u8>) {
        match self {
            Transport::Plain => replies.give_back(bytes),
            Transport::Tls(session) => {
                bytes.clear();
                bytes.shrink_to(OUTGOING_SIZE_KEPT);
                *session.outgoing() = bytes;
            }
        }
    }
}
