//! What comes before the first request: the PROXY header, and the TLS handshake.
//!
//! Before it: [`crate::accept`] has a socket and a place for it.
//! After it: [`crate::connection`] serves requests, and knows what certificate the peer has shown.
//! Thread: one reactor. Allocates: the state of TLS, once per connection.
//! Invariant: between the messages of a handshake a connection holds no slab, and all of it has one deadline.
//! Not here: HTTP. A peer that speaks it where TLS is expected is told so in its own language.

use super::Connection;
use super::exchange::{Shown, Unserved};
use super::inbox::Inbox;
use super::transport::Transport;
use crate::error::Reject;
use crate::http::proxy;
use crate::metrics::Count;
use crate::tls::TlsError;

impl Connection {
    /// Receives all that comes before the first request; what was received of that already.
    pub(super) async fn begin(&mut self) -> Result<Option<Inbox>, Unserved> {
        let mut received = None;
        if self.place.is_of_proxy() {
            // A connection that ends here is no request that was aborted.
            self.suspend(None).await.map_err(|_| Unserved::End)?;
            let mut inbox = self.new_inbox().await?;
            if !self.receive_proxy_header(&mut inbox).await? {
                return Err(Unserved::End);
            }
            received = (!inbox.is_empty()).then_some(inbox);
        }
        let session = match self.core.tls.listener(self.place.listener_index) {
            Some(listener) => {
                let is_spoken = self.core.live().config.listeners[self.place.listener_index].http2;
                listener.session(is_spoken && self.core.http2.has_room())
            }
            None => return Ok(received),
        };
        match session {
            Ok(session) => self.transport = Transport::Tls(Box::new(session)),
            Err(error) => {
                self.count_tls_failure(&error);
                return Err(Unserved::End);
            }
        }
        // On the heap until it is over, not in every connection for good.
        match Box::pin(self.handshake(received)).await {
            Err(Unserved::Rejected(Reject::TlsExpected)) => Err(Reject::TlsExpected.into()),
            // There is no request yet that could be counted, and no way to answer one.
            Err(_) => Err(Unserved::End),
            Ok(received) => Ok(received),
        }
    }

    /// Reads the PROXY header that a connection of a proxy begins with; `false` where it ended before its first byte,
    /// as the probes of proxies do.
    async fn receive_proxy_header(&mut self, inbox: &mut Inbox) -> Result<bool, Unserved> {
        let mut pace = self.core.connections.deadlines.head();
        loop {
            if !self.fill(inbox, &mut pace).await? {
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

    /// Completes the TLS handshake; what was received behind it.
    async fn handshake(&mut self, mut received: Option<Inbox>) -> Result<Option<Inbox>, Unserved> {
        let mut pace = self.core.connections.deadlines.handshake();
        // Every turn needs a message of the peer, or ends.
        loop {
            let mut inbox = match received.take() {
                Some(mut inbox) => {
                    inbox.take_none();
                    if !self.open(&mut inbox)? {
                        return Err(Unserved::End);
                    }
                    inbox
                }
                None => {
                    self.suspend(Some(pace)).await?;
                    let mut inbox = self.new_inbox().await?;
                    if !self.fill(&mut inbox, &mut pace).await? {
                        return Err(Unserved::End);
                    }
                    inbox
                }
            };
            while !inbox.is_empty() && !self.transport.handshaken() {
                self.make_room(&mut inbox, &mut pace).await?;
                if !self.fill(&mut inbox, &mut pace).await? {
                    return Err(Unserved::End);
                }
            }
            if let Transport::Tls(session) = &self.transport
                && session.handshaken()
            {
                self.shown = Shown::new(session.peer_certificate());
                self.core
                    .metrics
                    .update(|update| update.add(Count::TlsHandshakes, 1));
                return Ok((!inbox.is_empty()).then_some(inbox));
            }
        }
    }

    /// Makes plaintext of what was read; `false` where that was the last, or is not TLS.
    pub(super) fn open(&mut self, inbox: &mut Inbox) -> Result<bool, Unserved> {
        match self.transport.open(inbox) {
            Ok(more) => Ok(more),
            Err(error) => {
                self.count_tls_failure(&error);
                // A method, where the first byte of a handshake should be (RFC 8446 §5.1: it is 22).
                let first = inbox.sealed().first().copied();
                if !self.transport.handshaken()
                    && first.is_some_and(|byte| byte.is_ascii_uppercase())
                {
                    self.transport = Transport::Plain;
                    return Err(Reject::TlsExpected.into());
                }
                Ok(false)
            }
        }
    }

    fn count_tls_failure(&self, error: &TlsError) {
        tracing::debug!(peer = %self.place.peer, %error, "TLS failed");
        self.core
            .metrics
            .update(|update| update.add(Count::TlsFailures, 1));
    }
}
